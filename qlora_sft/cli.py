"""Parse the command line: verbs, their arguments, their exit codes. The verbs' work is done in other modules.

Exit codes: 0 done, 2 the configuration or the data is wrong, 1 the run failed, 130 interrupted. This module imports
nothing heavy, so that --help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_sft.atomic import disk_error, path_error
from qlora_sft.cli_recipes import add_recipe_verbs
from qlora_sft.errors import ConfigError, EndedTogether, QloraSftError, first_line
from qlora_sft.parallel import rank, refuse, world_size
from qlora_sft.ranges import whole
from qlora_sft.run.report import Report
from qlora_sft.say import tell

CommandResult = Report | Mapping[str, object] | None
"""What a command returns; ``--json`` prints it."""
Action = Callable[[argparse.Namespace], CommandResult]

if TYPE_CHECKING:
    from qlora_sft.config import Config
    from qlora_sft.export.hub import PushResult

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: that of the process) and returns its exit code."""
    # Of several processes that train together the first one says what is wrong with the arguments they all have.
    with contextlib.redirect_stderr(io.StringIO()) if rank() else contextlib.nullcontext():
        arguments = _arguments(argv)
    return guarded(lambda: _done(arguments), as_json=arguments.json, debug=arguments.debug)


def _done(arguments: argparse.Namespace) -> CommandResult:
    """Runs the verb of ``arguments``. Only training is done by several processes."""
    if world_size() > 1 and (arguments.verb is not _train or arguments.find_rate):
        refuse("several processes only train; start this without torchrun")
    action: Action = arguments.verb
    return action(arguments)


def guarded(action: Callable[[], CommandResult], as_json: bool = False, debug: bool | None = None) -> int:
    """Runs ``action``, prints its result as JSON on stdout if ``as_json``, and returns an exit code.

    An error is printed to stderr. One that is neither of this package nor a full disk or a faulty path is a fault of a
    program, of which ``debug`` shows the place by raising it; None says that the command has no --debug. Of several
    processes that train together the first one prints the result, and the one that failed its error.
    """
    quiet_libraries()
    try:
        result = action()
        if as_json and not rank():
            print(json.dumps(result.to_json() if isinstance(result, Report) else result, ensure_ascii=False))
        sys.stdout.flush()  # here, where it can still be told that nobody reads it
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except EndedTogether as error:
        return error.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (unread := [each for each in (1, 2) if _is_unread(each)]):
            return _end_unread(unread)
        fault = error if isinstance(error, QloraSftError) else disk_error(error) or path_error(error)
        if fault is None and debug:
            raise
        print(f"error: {fault or unexpected(error, debug is not None)}", file=sys.stderr)
        return fault.exit_code if fault else 1
    return 0


def _is_unread(stream: int) -> bool:
    """Says whether the file descriptor ``stream`` is a pipe whose reader has gone."""
    import select

    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_unread(streams: list[int]) -> int:
    """Ends without a word where the reader of the output has seen enough, as `head` has: what is left goes nowhere.

    The exit code is 0 where only results were unread. Messages (2) come while there is work, which is then not done.
    """
    import os

    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)
    return 1 if 2 in streams else 0


def unexpected(error: Exception, has_debug: bool) -> str:
    """Says of an error that nobody has foreseen what it is. Its traceback is kept in a file: hours may have gone by
    until it came. has_debug: whether the command has the option --debug."""
    import tempfile
    import traceback

    where = "--debug shows where" if has_debug else "there was no room for a file that says where"
    with (
        suppress(OSError),
        tempfile.NamedTemporaryFile(
            "w", prefix="qlora-sft-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file,
    ):
        file.write("".join(traceback.format_exception(error)))
        where = f"{file.name} says where{', and so does --debug' if has_debug else ''}"
    return (
        f"{type(error).__name__}: {first_line(error)} (this is a fault of qlora_sft or of a library that it uses; "
        f"{where}, which is what a report of it needs)"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses ``argv`` and also takes a ``key.sub=value`` that stands behind an option.

    argparse itself takes positional arguments in one stretch only.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments:
        arguments.overrides = [*arguments.overrides, *filter(_is_override, rest)]
        rest = [argument for argument in rest if not _is_override(argument)]
    if rest:
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora-sft", description="QLoRA fine-tuning: from chat data to a GGUF that answers.", allow_abbrev=False
    )
    verbs: Verbs = parser.add_subparsers(required=True, metavar="VERB")
    add_recipe_verbs(partial(_verb, verbs))
    _add_configured_verbs(verbs)
    _add_export_verbs(verbs)
    _add_asking_verbs(verbs)
    _verb(verbs, "doctor", _doctor, "try every part in small: what works here, what does not, and how to get it")
    return parser


def _verb(verbs: Verbs, name: str, action: Action, help: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    sub.set_defaults(verb=action, parser=sub)
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error that nobody has foreseen")
    return sub


def _configured_verb(verbs: Verbs, name: str, action: Action, help: str) -> argparse.ArgumentParser:
    sub = _verb(verbs, name, action, help)
    sub.add_argument("config", help="a YAML file or the name of a shipped recipe (demo)")
    sub.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="values that replace the file's")
    return sub


def _add_configured_verbs(verbs: Verbs) -> None:
    train = _configured_verb(verbs, "train", _train, "fine-tune as a configuration says")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint there, if there is one")
    train.add_argument(
        "--find-rate",
        action="store_true",
        help="train nothing, but try learning rates and suggest one; draws the curve",
    )

    preview = _configured_verb(verbs, "preview", _preview, "show what a configuration will train on, token by token")
    preview.add_argument("--count", type=whole(0), default=3, help="how many conversations are shown (default: 3)")
    preview.add_argument("--html", metavar="FILE", help="also write a web page of them")

    plan = _configured_verb(
        verbs, "plan", _plan, "what a run will need: memory, disk and time, before anything is loaded"
    )
    plan.add_argument("--no-data", action="store_true", help="do not read the data: no steps and no tokens")
    plan.add_argument("--no-time", action="store_true", help="do not measure a layer: no time")


def _add_export_verbs(verbs: Verbs) -> None:
    merge = _verb(verbs, "merge", _merge, "write the adapter of a run into its base model, and compare the two")
    merge.add_argument("run", help="run folder")
    merge.add_argument("--out", help="folder to write (default: RUN/merged)")
    merge.add_argument(
        "--onto", choices=["nf4-dequantized", "bf16"], help="the weights to add to (default: what is measured closer)"
    )
    merge.add_argument("--dtype", default="auto", choices=["auto", "bf16", "f16", "f32"], help="type of the weights")
    merge.add_argument("--no-parity", action="store_true", help="do not compare its logits with the adapter's")
    merge.add_argument("--push", metavar="USER/NAME", help="afterwards upload it to the Hub, as a private repository")

    export = _verb(verbs, "export", _export, "write a run's model as a GGUF file for llama.cpp and Ollama, and compare")
    export.add_argument("run", help="run folder")
    export.add_argument("--quant", default="q8_0", help="f32, f16, bf16, q8_0 (default), or any type of llama.cpp's")
    export.add_argument("--adapter", action="store_true", help="the LoRA alone, for llama.cpp's --lora")
    export.add_argument(
        "--imatrix", default="auto", help="importance matrix: auto (from the training data), none, FILE"
    )
    export.add_argument("--out", help="file to write (default: RUN/gguf/NAME-QUANT.gguf)")
    export.add_argument("--no-parity", action="store_true", help="do not compare its logits with the merged model's")
    export.add_argument("--system", help="SYSTEM text of the Modelfile (default: the training data's, if it has one)")
    export.add_argument("--create", metavar="NAME", help="also register the model with Ollama under this name")
    export.add_argument("--push", metavar="USER/NAME", help="afterwards upload it to the Hub, as a private repository")

    push = _verb(
        verbs, "push", _push, "upload a run's adapter, merged model or GGUF files to the Hub, with a model card"
    )
    push.add_argument("run", help="run folder")
    push.add_argument("repo", metavar="USER/NAME", help="repository on the Hub; made if there is none")
    push.add_argument("--what", default="adapter", choices=["adapter", "merged", "gguf"], help="default: adapter")
    push.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    push.add_argument("--dry-run", action="store_true", help="print what would go up, and the card; upload nothing")


def _add_asking_verbs(verbs: Verbs) -> None:
    evaluate = _verb(verbs, "evaluate", _evaluate, "ask a run and its base questions with known answers, and compare")
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
    evaluate.add_argument("--max-rows", type=int, metavar="N", help="ask only so many of each task, drawn at random")
    evaluate.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 512)")
    evaluate.add_argument("--thinking", choices=["on", "off"], help="default: as in training, by the reference")
    evaluate.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="of drawn questions and sampled answers (default: 0)"
    )
    evaluate.add_argument("--no-base", action="store_true", help="do not ask the base under the adapter")
    evaluate.add_argument(
        "--run-code", action="store_true", help="run what is written for code tasks, in a sandbox if possible"
    )

    evaluate.add_argument(
        "--diagnose", action="store_true",
        help="ask once more with examples and in other words, and harmless questions: forgetting or alignment tax?",
    )  # fmt: skip
    evaluate.add_argument(
        "--keep-right", metavar="FILE", help="write the right answers as training rows (rejection sampling)"
    )

    evaluate.add_argument(
        "--harness", metavar="TASK[=FILE],...",
        help="tasks of lm-evaluation-harness instead, by its names or as YAML files; FILE: local questions of one",
    )  # fmt: skip
    evaluate.add_argument("--harness-chat", action="store_true", help="put the harness' prompts as turns of a user")

    compare = _verb(verbs, "compare", _compare, "compare two evaluated runs, question by question")
    compare.add_argument("runs", nargs=2, metavar="RUN", help="run folder with results of evaluate")
    compare.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of the bootstrap (default: 0)")

    report = _verb(verbs, "report", _report, "draw the report of a run, or compare several, as a web page")
    report.add_argument("run", nargs="+", metavar="RUN", help="run folders, also of interrupted runs")
    report.add_argument("--out", metavar="FILE", help="file to write (default: RUN/report.html; of several runs "
                        "also FIRST/comparison.html)")  # fmt: skip

    chat = _verb(verbs, "chat", _chat, "talk to a run, a model folder or a GGUF file")
    chat.add_argument("model", help="run folder, model folder or .gguf file")
    chat.add_argument("--message", help="ask this one thing, print the answer, and end")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-new-tokens", type=whole(), default=512, help="longest answer (default: 512)")
    chat.add_argument("--serve", action="store_true", help="of a .gguf: llama.cpp's OpenAI-compatible server instead")
    chat.add_argument(
        "--port", type=whole(0, 65_535), default=8080, help="of --serve, on 127.0.0.1 (default: 8080; 0: any free)"
    )


def _train(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.faults import load_checked
    from qlora_sft.train import train
    from qlora_sft.training.join import join_ranks

    with join_ranks().ending_together():
        config = load_checked(arguments.config, arguments.overrides)
        if arguments.find_rate:
            return _find_rate(config, arguments)
        return train(config, overwrite=arguments.overwrite, resume=arguments.resume)


def _find_rate(config: Config, arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.find_rate import find_rate

    if arguments.overwrite or arguments.resume:
        raise ConfigError("--find-rate keeps nothing of what it trains; leave out --overwrite and --resume")
    report = find_rate(config)
    if not arguments.json:
        from qlora_sft.training.rate_curve import said_of

        print(said_of(report))
    return report


def _preview(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.faults import load_checked
    from qlora_sft.preview import preview

    config = load_checked(arguments.config, arguments.overrides)
    return preview(config, arguments.count, arguments.html, show=not arguments.json, alone=True)


def _plan(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.faults import load_checked
    from qlora_sft.plan.plan import make_plan
    from qlora_sft.plan.table import plan_table

    config = load_checked(arguments.config, arguments.overrides)
    plan = make_plan(config, data=not arguments.no_data, timing=not arguments.no_time)
    if not arguments.json:
        print(plan_table(plan))
    return plan


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
        "task",
        "form",
        "samples",
        "temperature",
        "max_new_tokens",
        "thinking",
        "run_code",
        "diagnose",
        "keep_right",
    )
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


def _merge(arguments: argparse.Namespace) -> CommandResult:
    _check_push(arguments)
    from qlora_sft.export.merge import merge_run

    result = merge_run(arguments.run, arguments.out, arguments.onto, arguments.dtype)
    if not arguments.no_parity:
        from qlora_sft.export.parity import check_parity

        result = replace(result, parity=check_parity(Path(arguments.run), Path(result.merged)))
    return replace(result, push=_pushed(arguments, "merged"))


def _export(arguments: argparse.Namespace) -> CommandResult:
    _check_push(arguments)
    from qlora_sft.export.gguf import OllamaOptions, export_adapter, export_run

    parity, ollama = not arguments.no_parity, OllamaOptions(arguments.system, arguments.create)
    if arguments.adapter:
        result = export_adapter(arguments.run, arguments.out, parity=parity, ollama=ollama)
    else:
        result = export_run(
            arguments.run, arguments.quant, arguments.out, imatrix=arguments.imatrix, parity=parity, ollama=ollama
        )
    return replace(result, push=_pushed(arguments, "gguf", result.gguf))


def _check_push(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for a repository name that cannot be pushed to, before an hour of work and not after it."""
    if arguments.push:
        from qlora_sft.export.hub import check_name

        check_name(arguments.push)
        if arguments.out:
            raise ConfigError("--push uploads from the run folder; leave --out away")


def _pushed(
    arguments: argparse.Namespace, what: Literal["merged", "gguf"], gguf: str | None = None
) -> PushResult | None:
    if not arguments.push:
        return None
    from qlora_sft.export.hub import PushOptions, push

    return push(arguments.run, arguments.push, what, options=PushOptions(gguf))


def _push(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.export.hub import PushOptions, push

    options = PushOptions(public=arguments.public, dry_run=arguments.dry_run)
    return push(arguments.run, arguments.repo, arguments.what, options=options)


def _doctor(arguments: argparse.Namespace) -> CommandResult:
    from qlora_sft.doctor import examine, proved, table
    from qlora_sft.say import tell

    tell("trying an NF4 product, a Triton kernel and a step of LoRA (half a minute)")
    facts = examine()
    facts["checks"] += proved()
    if not arguments.json:
        print(table(facts))
    return facts


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


def quiet_libraries() -> None:
    """Silences notices of other libraries that no user could act on."""
    import logging
    import os

    # "Failed to load CPU gemm_4bit_forward from kernels-community": an optional download, wanted by nobody here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # The bars of transformers ("Loading weights") and datasets follow this one.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Rows are encoded in a thread beside the one that renders them, which takes longer; more threads gained nothing
    # (GSM8K: 9.1 s without, 10.6 s with, the best of four each on a busy machine of two cores).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
