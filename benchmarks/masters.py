"""Question: what do float32 masters change, against adapters (and optimizer states) in bfloat16?

    python benchmarks/masters.py [--seeds 0 1 2] [--data FOLDER] [--output FILE]

The demo and a part of GSM8K are trained with every seed, once as the toolkit does it and once with the adapters cast to
bfloat16 when the model is ready, which is what TRL's trainer does to a quantised model. Everything else is the same:
the data, its order, the adapters' first values. A row per run has the held-out loss, the exact match (of GSM8K: the
same number) and the tokens per second of `measuring.clock`. Without the folder of GSM8K's files only the demo is run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_sft.evaluation.answers import HeldOutAnswer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "masters.jsonl"
DATA = Path(os.environ.get("QLORA_SFT_DATA") or HERE.parents[1] / "shared" / "data")
MASTERS = ("float32", "bfloat16")
SHORT = ["training.save_steps=0", "model.backend=transformers"]
DEMO = [*SHORT, "training.max_steps=24", "evaluation.answers=10", *(f"data.held_out.{i}.max_rows=20" for i in range(3))]
GSM8K = [*SHORT, "training.max_steps=12", "evaluation.answers=8", "evaluation.max_new_tokens=128"]


def settings(data: Path) -> dict[str, list[str]]:
    """What is trained on -> overrides of the demo's recipe."""
    files = {name: data / f"gsm8k_{name}.jsonl" for name in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        return {"demo": DEMO}
    train = f"data.train=[{{path: {files['train']}, max_rows: 300}}]"
    return {"demo": DEMO, "gsm8k": [*GSM8K, train, f"data.held_out=[{{path: {files['test']}, max_rows: 20}}]"]}


def trained(overrides: list[str], seed: int, masters: str, folder: Path) -> dict[str, Any]:
    """Trains once and returns the figures of a row."""
    import torch
    from measuring import clock

    from qlora_sft.config import load_config
    from qlora_sft.data.batch import longest_micro_batch
    from qlora_sft.evaluation.answers import choose_prompts
    from qlora_sft.evaluation.evaluate import evaluate
    from qlora_sft.evaluation.evaluated_model import EvaluatedModel
    from qlora_sft.model.load import compute_dtype
    from qlora_sft.model.memory import use_memory
    from qlora_sft.model.setup import prepare_model
    from qlora_sft.prepare import prepare
    from qlora_sft.training.fit import Training, fit

    config = load_config("demo", [*overrides, f"seed={seed}", f"output={folder}"])
    data = prepare(config, quiet)
    dtype, _ = compute_dtype(config.model.dtype)
    tokens = longest_micro_batch(data.packed.tokens, config.training.batch_size)
    model = prepare_model(config, data.base, dtype, data.backend.name, tokens, quiet)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, masters))
    with use_memory(model, config, tokens, dtype, quiet, data.packed.shares_prefixes) as memory:
        run = Training(
            config,
            folder,
            quiet,
            model,
            data.tokenizer,
            dtype,
            data.documents,
            data.sequences,
            data.packed.shares_prefixes,
        )
        begin = clock()
        fitted = fit(run, memory.keep_less)
        seconds = clock() - begin
    types = {p.dtype for p in model.parameters() if p.requires_grad}
    assert types == {getattr(torch, masters)}, f"the adapters became {types}"
    evaluated = EvaluatedModel(model, data.tokenizer, data.chat_format, dtype)
    prompts = choose_prompts(data.held_out.documents, config.evaluation.answers, 0)
    after = evaluate(evaluated, config, data.held_out, prompts, quiet, "after")
    return {
        "steps": fitted.steps,
        "tokens": fitted.tokens,
        "computed_in": str(dtype).removeprefix("torch."),
        "train_loss": round(fitted.train_loss.last, 4),
        "held_out_loss": {name: round(loss, 4) for name, loss in after.loss.items()},
        "right": sum(right(record) for record in after.records),
        "asked": len(after.records),
        "tokens_per_second": round(fitted.tokens / seconds, 1),
    }


def right(record: HeldOutAnswer) -> bool:
    """Whether an answer is the reference; where that marks a number (GSM8K), whether it ends in this one."""
    from qlora_sft.evaluation.grade import last_number, marked_number

    number = marked_number(record["reference"])
    return bool(record["exact"]) if number is None else last_number(record["answer"]) == number


def quiet(text: str) -> None:
    """Says nothing: the rows are what is printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=["demo", "gsm8k"], choices=["demo", "gsm8k"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    from measuring import measured_on

    for seed in options.seeds:
        for name, overrides in settings(options.data).items():
            if name not in options.only:
                continue
            # In turn, so that a slower hour of the machine is no merit of one of them.
            for masters in MASTERS if seed % 2 == 0 else MASTERS[::-1]:
                with tempfile.TemporaryDirectory(prefix="masters-") as folder:
                    figures = trained(overrides, seed, masters, Path(folder))
                row = {**measured_on("masters"), "data": name, "seed": seed, "provider": masters, **figures}
                with options.output.open("a") as output:
                    output.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
