"""Run the verbs that ask a model, look at a run or at this machine: evaluate, compare, report, chat, doctor."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from qlora_sft.errors import ConfigError
from qlora_sft.ranges import whole
from qlora_sft.say import tell
from qlora_sft.verbs.verb import AddVerb, CommandResult


def add_asking_verbs(add: AddVerb) -> None:
    """Adds ``evaluate``, ``compare``, ``report``, ``chat`` and ``doctor`` to the command line."""
    evaluate = add("evaluate", _evaluate, "ask a run and its base questions with known answers, and compare")
    evaluate.add_argument("run", help="run folder or model folder")
    evaluate.add_argument(
        "--task", action="append", default=[], metavar="[NAME=]FILE",
        help="questions, in the form of MMLU, ARC, GSM8K, HumanEval or training data; may be given again (default: "
        "evaluation.tasks of the run)",
    )  # fmt: skip
    evaluate.add_argument(
        "--form", choices=["choices", "number", "exact", "code", "refusal", "loss"], help="default: detected"
    )
    # Their ranges are those of a task of the configuration.
    evaluate.add_argument("--samples", type=int, metavar="N", help="answers per question, for pass@k (default: 1)")
    evaluate.add_argument("--temperature", type=float, metavar="T", help="of sampled answers (default: 0.8)")
    evaluate.add_argument("--max-rows", type=int, metavar="N", help="ask only this many of each task, drawn at random")
    evaluate.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an answer (default: 512)")
    evaluate.add_argument("--thinking", choices=["on", "off"], help="default: as in training, by the reference")
    evaluate.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="of drawn questions and sampled answers (default: 0)"
    )
    evaluate.add_argument("--no-base", action="store_true", help="do not ask the base under the adapter")
    evaluate.add_argument(
        "--run-code", action="store_true", help="run the programs that answer code tasks, in a sandbox if possible"
    )

    evaluate.add_argument(
        "--diagnose", action="store_true",
        help="also ask with examples, in other words, and harmless questions: forgetting or alignment tax?",
    )  # fmt: skip
    evaluate.add_argument(
        "--keep-right", metavar="FILE", help="write the right answers as training rows (rejection sampling)"
    )

    evaluate.add_argument(
        "--harness", metavar="TASK[=FILE],...",
        help="ask tasks of lm-evaluation-harness instead, by name or as YAML files; FILE: local questions for one",
    )  # fmt: skip
    evaluate.add_argument("--harness-chat", action="store_true", help="present the harness' prompts as user turns")

    compare = add("compare", _compare, "compare two evaluated runs, question by question")
    compare.add_argument("runs", nargs=2, metavar="RUN", help="run folder with results of evaluate")
    compare.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of the bootstrap (default: 0)")

    report = add("report", _report, "draw the report of a run, or compare several, as a web page")
    report.add_argument("run", nargs="+", metavar="RUN", help="run folders, also of interrupted runs")
    report.add_argument("--out", metavar="FILE", help="file to write (default: RUN/report.html; of several runs "
                        "also FIRST/comparison.html)")  # fmt: skip

    chat = add("chat", _chat, "talk to a run, a model folder or a GGUF file")
    chat.add_argument("model", help="run folder, model folder or .gguf file")
    chat.add_argument("--message", help="ask this one thing, print the answer, and end")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-new-tokens", type=whole(), default=512, help="most tokens of an answer (default: 512)")
    chat.add_argument(
        "--serve", action="store_true", help="serve a .gguf file with llama.cpp's OpenAI-compatible server"
    )
    chat.add_argument(
        "--port", type=whole(0, 65_535), default=8080, help="of --serve, on 127.0.0.1 (default: 8080; 0: any free)"
    )

    add("doctor", _doctor, "try a small example of every part: what works here, what does not, and how to get it")


def _evaluate(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.config import TaskConfig
    from qlora_sft.evaluation.evaluate_run import TaskSettings, diagnose_run, evaluate_run
    from qlora_sft.evaluation.keep_right import check_target, keep_right

    if arguments.harness:
        return _harness(arguments)
    if arguments.harness_chat:
        raise ConfigError("--harness-chat has an effect with --harness only")
    if arguments.diagnose and arguments.no_base:
        raise ConfigError("--diagnose compares with the base under the adapter; leave out --no-base")
    kept = Path(arguments.keep_right) if arguments.keep_right else None
    if kept:
        check_target(kept)
    names = ("form", "samples", "temperature", "max_rows", "max_new_tokens", "thinking")
    given: TaskSettings = {}
    for name in names:
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)  # type: ignore[literal-required]
    named = [re.fullmatch(r"(?:([\w.-]+)=)?(.+)", task, re.DOTALL) for task in arguments.task]
    tasks = [TaskConfig(found[2], name=found[1]) for found in named if found]
    if arguments.diagnose:
        report = diagnose_run(arguments.run, tasks, given, run_code=arguments.run_code, seed=arguments.seed)
    else:
        report = evaluate_run(
            arguments.run, tasks, given, base=not arguments.no_base, run_code=arguments.run_code, seed=arguments.seed
        )
    if kept:
        rows, asked = keep_right(report, kept)
        tell(f"{rows:,} right answers to {asked:,} questions: {kept} (train on them, and evaluate on other questions)")
    return report


def _harness(arguments: argparse.Namespace) -> CommandResult:
    ours = (
        "task", "form", "samples", "temperature", "max_new_tokens", "thinking", "run_code", "diagnose", "keep_right",
    )  # fmt: skip
    given = [f"--{name.replace('_', '-')}" for name in ours if getattr(arguments, name)]
    if given:
        raise ConfigError(f"{', '.join(given)} have no effect on tasks of the harness; leave them out, or --harness")
    from qlora_sft.evaluation.harness import run_harness

    return run_harness(
        arguments.run, arguments.harness.split(","), base=not arguments.no_base, limit=arguments.max_rows,
        chat=arguments.harness_chat, seed=arguments.seed,
    )  # fmt: skip


def _compare(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.evaluation.compare_runs import compare_runs, runs_table

    result = compare_runs(arguments.runs[0], arguments.runs[1], arguments.seed)
    if not arguments.json:
        print(runs_table(result))
    return result


def _report(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.page.write import report_runs, said_of

    result = report_runs(arguments.run, arguments.out)
    if not arguments.json:
        print(said_of(result))
    return result


def _chat(arguments: argparse.Namespace) -> CommandResult:
    if arguments.serve:
        from qlora_sft.chat.serve import serve

        return serve(Path(arguments.model).expanduser(), arguments.port)
    from qlora_sft.chat.terminal import chat

    show = _on_stderr if arguments.json else None
    return chat(arguments.model, arguments.message, arguments.system, arguments.max_new_tokens, show=show)


def _on_stderr(piece: str) -> None:
    sys.stderr.write(piece)
    sys.stderr.flush()


def _doctor(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.doctor import examine, proved, table

    tell("trying an NF4 product, a Triton kernel and a step of LoRA (half a minute)")
    facts = examine()
    facts["checks"] += proved()
    if not arguments.json:
        print(table(facts))
    return facts
