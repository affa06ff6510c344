"""Take the whole path on a real model: fine-tune the embedded default, export it, ask the GGUF. It needs no GPU.

Run as::

    python -m qlora_sft.demo [--output runs/demo] [key.sub=value ...]

It writes ``OUTPUT/demo.json`` (losses, exact match, agreement of GGUF and adapter, seconds per stage) beside the run's
other files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from qlora_sft.cli import guarded
from qlora_sft.config import Config, load_config
from qlora_sft.demo.base_model import is_built
from qlora_sft.errors import RunError
from qlora_sft.json_types import JsonObject
from qlora_sft.run.folder import Run
from qlora_sft.say import progress, tell
from qlora_sft.stopwatch import Stopwatch
from qlora_sft.train import train

AGREEMENT_PROMPTS = 10
# A rough estimate for two cores; most of the former is answering, before and after training.
MINUTES_BESIDE_STEPS, MINUTES_PER_STEP = 4.0, 0.08
ANNOUNCED = """The demo takes about {minutes} minutes on two cores that have nothing else to do, less on a GPU:
  1. SmolLM2-135M-Instruct and the data: {base}
  2. held-out loss and answers before training
  3. {steps} steps of LoRA on the model in 4 bits, three kinds of tasks at once
  4. the same loss and answers after it
  5. merge, a q8_0 GGUF compared with the model, and {prompts} questions to it in llama.cpp
Everything goes into {output}; Ctrl-C ends it, and the same command starts again."""
Record = TypeVar("Record")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo with the command line ``argv`` and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_sft.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="runs/demo", help="run folder; an earlier demo in it is replaced")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    arguments = parser.parse_args(argv)
    return guarded(lambda: demo(arguments.output, arguments.overrides))


def demo(output: str, overrides: Sequence[str]) -> JsonObject:
    """Trains, exports to q8_0, asks the GGUF, and returns what ``demo.json`` holds."""
    watch = Stopwatch()
    config = load_config("demo", [*overrides, f"output={output}"])
    tell(announced(config))
    report = train(config, overwrite=True)
    from qlora_sft.export.gguf import export_run
    from qlora_sft.export.merge import merge_run

    run = Path(output)
    with watch("merge"):
        merged = merge_run(run)
    tell(f"merged: {merged.merged} ({merged.modules} modules, onto {merged.onto})")
    with watch("export"):
        gguf = Path(export_run(run, "q8_0").gguf)
    tell(f"GGUF: {gguf} ({gguf.stat().st_size / 2**20:.0f} MiB)")
    with watch("ask the GGUF"):
        agreement, question = ask(gguf, run)
    result = {
        "loss": {source: pair.to_json() for source, pair in report.loss.items()},
        "exact_match": {source: pair.to_json() for source, pair in report.exact_match.items()},
        "gguf_agreement": agreement,
        "tokens_per_second": report.tokens_per_second,
        "seconds": {**report.seconds, **watch.rounded()},
    }
    (run / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    tell(f"GGUF and adapter agree on {agreement:.0%} of the prompts; figures: {run / 'demo.json'}")
    tell(f"\nAsked of {gguf.name} in llama.cpp:\n{question['prompt']}\n\nIt answers:")
    print(question["gguf"])
    return result


def announced(config: Config) -> str:
    """Says what will be done, and how long it takes, before anything heavy is imported."""
    steps = config.training.max_steps or 0
    base = "in the cache already" if is_built() else "93 MB from PyPI, once"
    return ANNOUNCED.format(
        minutes=round(MINUTES_BESIDE_STEPS + steps * MINUTES_PER_STEP), base=base, steps=steps,
        prompts=AGREEMENT_PROMPTS, output=config.output,
    )  # fmt: skip


def ask(gguf: Path, run: Path) -> tuple[float, JsonObject]:
    """Returns the share of held-out prompts on which the GGUF gives the adapter's answer, and one of the records."""
    from qlora_sft.export.run_gguf import complete, running

    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = spread([json.loads(line) for line in lines], AGREEMENT_PROMPTS)
    if not records:
        raise RunError("the demo needs held-out answers to compare; leave evaluation.answers above 0")
    longest = Run.open(run).config.evaluation.max_new_tokens
    bar = progress(len(records), "questions to the GGUF", "answer")
    with running(gguf) as server:
        for record in records:
            record["gguf"] = complete(server, record["prompt_ids"], longest).strip()
            bar.update()
    bar.close()
    same = sum(record["gguf"] == record["answer"] for record in records)
    return same / len(records), records[0]


def spread(records: Sequence[Record], count: int) -> list[Record]:
    """Returns ``count`` of the records at equal distances, so that every source is among them."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]
