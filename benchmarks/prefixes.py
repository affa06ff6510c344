"""How much faster is a step where what rows share at their beginning is computed once?

The embedded 135M model with NF4 and LoRA, forward and backward over the same rows with and without sharing, in turn, on
one thread: tokens of the rows per second, and how far the gradients differ. Run as::

    OMP_NUM_THREADS=1 python benchmarks/prefixes.py --data FOLDER

FOLDER holds gsm8k_train.jsonl and glaive_toolcall_en_demo.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import clock, measured_on

from qlora_sft.config import Config, load_config
from qlora_sft.data.batch import Batch
from qlora_sft.data.collate import PackedCollator
from qlora_sft.data.packing import pack
from qlora_sft.model.load import compute_dtype
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.memory import use_memory
from qlora_sft.model.setup import prepare_model
from qlora_sft.prepare import prepare

RESULTS = Path(__file__).parent / "results" / "prefixes.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the rows that are measured")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    cases = {
        "demo tools": ["path: demo:train/tools.jsonl"],
        "tool calls, every turn": [f"path: {args.data / 'glaive_toolcall_en_demo.json'}", "supervise: turns"],
        "GSM8K": [f"path: {args.data / 'gsm8k_train.jsonl'}", "columns: {prompt: question, completion: answer}"],
    }
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("a") as results:
        for name, source in cases.items():
            for row in measure(name, configured(Path(folder), source), args.tokens, args.repeats):
                results.write(json.dumps({**measured_on("prefixes"), **row}) + "\n")
                results.flush()


def configured(folder: Path, source: list[str]) -> Config:
    recipe = folder / "recipe.yaml"
    lines = ["model: {path: demo, chat_template: chatml-think}", "data:", "  max_length: 2048", "  train:"]
    lines += ["    - " + source[0], *("      " + line for line in source[1:]), f"output: {folder / 'run'}"]
    recipe.write_text("\n".join(lines))
    return load_config(str(recipe))


def measure(name: str, config: Config, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Returns a row for sharing and one for none, with the ratio of both."""
    data = prepare(config, print)
    lengths = [len(document.input_ids) for document in data.documents]
    chosen: list[list[int]] = []
    for each in data.sequences:
        chosen.append(each)
        if sum(lengths[i] for some in chosen for i in some) >= tokens:
            break
    rows = [index for each in chosen for index in each]
    alone = [[rows[i] for i in each] for each in pack([lengths[i] for i in rows], config.data.max_length)]
    dtype, _ = compute_dtype(config.model.dtype)
    model = prepare_model(config, data.base, dtype, "transformers", config.data.max_length, print)
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # zero at the start, which would leave A without a gradient to compare
            torch.nn.init.normal_(parameter, std=0.01)
    use_memory(model, config, config.data.max_length, dtype, print)
    share = PackedCollator(data.documents, data.packed.shares_prefixes)
    batches = {
        "shared": [share([{"documents": each}]) for each in chosen],
        "alone": [PackedCollator(data.documents)([{"documents": each}]) for each in alone],
    }
    seconds: dict[str, list[float]] = {how: [] for how in batches}
    gradients = {how: step(model, some, dtype)[1] for how, some in batches.items()}
    for _ in range(repeats):
        for how, some in batches.items():
            seconds[how].append(step(model, some, dtype)[0])
    error = float((gradients["shared"] - gradients["alone"]).norm() / gradients["alone"].norm())
    found = []
    for how, some in batches.items():
        row = {
            "case": name, "provider": how, "dtype": str(dtype).removeprefix("torch."), "rows": len(rows),
            "tokens_in_rows": sum(lengths[i] for i in rows),
            "tokens_computed": sum(batch["input_ids"].numel() for batch in some),
            "seconds": round(min(seconds[how]), 2), "gradient_difference": error,
        }  # fmt: skip
        row["row_tokens_per_second"] = round(row["tokens_in_rows"] / row["seconds"], 1)
        row["ratio"] = round(min(seconds["alone"]) / min(seconds[how]), 3)
        print(row)
        found.append(row)
    return found


def step(model: Any, batches: list[Batch], dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Returns the seconds of forward and backward over all batches, and the gradients."""
    model.zero_grad()
    weight = sum(batch["weight_sum"] for batch in batches)
    begin = clock()
    for batch in batches:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = batch_loss(model, batch, n_items=weight).loss
        loss.backward()
    seconds = clock() - begin
    return seconds, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
