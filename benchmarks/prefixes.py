"""How much faster is a step where what rows share at their beginning is computed once?

Forward and backward over the same rows with and without sharing, in turn: tokens of the rows per second, and how far
the gradients differ. On a CPU with the embedded 135M model and real data, on a GPU with layers of an 8B and
conversations of random tokens, every turn of which is a row::

    OMP_NUM_THREADS=1 python benchmarks/prefixes.py --data FOLDER
    python benchmarks/prefixes.py --shape 8B --layers 8 --tokens 32768

FOLDER holds gsm8k_train.jsonl and glaive_toolcall_en_demo.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import memory
import torch
from measuring import clock, measured_on

from qlora_sft.config import Config, load_config
from qlora_sft.data.batch import Batch
from qlora_sft.data.collate import PackedCollator
from qlora_sft.data.packing import pack
from qlora_sft.data.render import Rendered
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.load import compute_dtype
from qlora_sft.model.loss import batch_loss, to_device
from qlora_sft.model.memory import use_memory
from qlora_sft.model.setup import prepare_model
from qlora_sft.prepare import prepare

RESULTS = Path(__file__).parent / "results" / "prefixes.jsonl"
CASES = ("demo tools", "tool calls, every turn", "GSM8K")
TURNS, TURN = 8, 256
"""A random conversation has so many turns of so many tokens, of which an answer takes the second half."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--shape", choices=memory.SHAPES, help="random model and rows in place of real ones")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the rows that are measured")
    parser.add_argument("--capacity", type=int, default=2048, help="tokens of a packed sequence of real rows")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, args.output.open("a") as results:
        for row in random_rows(args, folder) if args.shape else real_rows(args, Path(folder)):
            results.write(json.dumps({**measured_on("prefixes"), **row}) + "\n")
            results.flush()


# ------------------------------------------------------------------ real data, the embedded model


def real_rows(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the measurements of demo tools, tool calls turn by turn, and GSM8K, where nothing is shared."""
    cases = {
        "demo tools": ["path: demo:train/tools.jsonl"],
        "tool calls, every turn": [f"path: {args.data / 'glaive_toolcall_en_demo.json'}", "supervise: turns"],
        "GSM8K": [f"path: {args.data / 'gsm8k_train.jsonl'}", "columns: {prompt: question, completion: answer}"],
    }
    for name in args.only:
        config = configured(folder, cases[name], args.capacity)
        data = prepare(config, print)
        dtype, _ = compute_dtype(config.model.dtype)
        model = prepare_model(config, data.base, dtype, "transformers", config.data.max_length, print)
        torch.manual_seed(1)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zero at the start, which would leave A without a gradient to compare
                torch.nn.init.normal_(parameter, std=0.01)
        use_memory(model, config, config.data.max_length, dtype, print)
        chosen = up_to(args.tokens, data.documents, data.sequences)
        share = PackedCollator(data.documents, data.packed.shares_prefixes)
        for row in measure(model, dtype, data.documents, chosen, share, config.data.max_length, args.repeats):
            yield {"case": name, "capacity": config.data.max_length, **row}


def configured(folder: Path, source: list[str], capacity: int) -> Config:
    recipe = folder / "recipe.yaml"
    lines = ["model: {path: demo, chat_template: chatml-think}", "data:", f"  max_length: {capacity}", "  train:"]
    lines += ["    - " + source[0], *("      " + line for line in source[1:]), f"output: {folder / 'run'}"]
    recipe.write_text("\n".join(lines))
    return load_config(str(recipe))


def up_to(tokens: int, documents: Sequence[Rendered], sequences: list[list[int]]) -> list[list[int]]:
    """Returns the first packed sequences, until their rows have so many tokens."""
    chosen: list[list[int]] = []
    while sum(len(documents[i].input_ids) for each in chosen for i in each) < tokens and len(chosen) < len(sequences):
        chosen.append(sequences[len(chosen)])
    return chosen


# ------------------------------------------------------------------ random data, layers of a large model


def random_rows(args: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    """Yields the measurements of conversations of random tokens, every turn of which is a row."""
    memory.make_model(argparse.Namespace(shape=args.shape, layers=args.layers, folder=folder))
    loaded = memory.load(folder, "transformers", "auto")
    model = loaded.model
    use_document_attention(model)
    capacity = TURNS * TURN
    memory.set_up(loaded, "auto", capacity * (TURNS + 1) // 2)
    model.train()
    generator, documents, sequences = torch.Generator().manual_seed(0), [], []
    while sum(len(document.input_ids) for document in documents) < args.tokens:
        ids = torch.randint(3, model.get_input_embeddings().num_embeddings, (capacity,), generator=generator).tolist()
        sequences.append(list(range(len(documents), len(documents) + TURNS)))
        for end in range(TURN, capacity + 1, TURN):
            weights = [0.0] * (end - TURN // 2) + [1.0] * (TURN // 2)
            documents.append(Rendered(ids[:end], weights, "random"))
    share = PackedCollator(documents, shares_prefixes=True)
    for row in measure(model, loaded.dtype, documents, sequences, share, capacity, args.repeats):
        yield {"case": f"{TURNS} turns", "shape": args.shape, "layers": args.layers, **row}


# ------------------------------------------------------------------ both


def measure(
    model: Any,
    dtype: torch.dtype,
    documents: Sequence[Rendered],
    sequences: list[list[int]],
    share: PackedCollator,
    capacity: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Returns a row for sharing and one for none, with the ratio of both."""
    rows = [index for each in sequences for index in each]
    lengths = [len(documents[i].input_ids) for i in rows]
    alone = [[rows[i] for i in each] for each in pack(lengths, capacity)]
    plain = PackedCollator(documents)
    batches = {
        "shared": [to_device(share([{"documents": each}]), model.device) for each in sequences],
        "alone": [to_device(plain([{"documents": each}]), model.device) for each in alone],
    }
    seconds: dict[str, list[float]] = {how: [] for how in batches}
    gradients = {how: step(model, some, dtype)[1] for how, some in batches.items()}
    for _ in range(repeats):
        for how, some in batches.items():
            seconds[how].append(step(model, some, dtype)[0])
    error = float((gradients["shared"] - gradients["alone"]).norm() / gradients["alone"].norm())
    found = []
    for how, some in batches.items():
        best = min(seconds[how])
        row = {
            "provider": how, "dtype": str(dtype).removeprefix("torch."), "rows": len(rows),
            "tokens_in_rows": sum(lengths), "tokens_computed": sum(batch["input_ids"].numel() for batch in some),
            "seconds": round(best, 2), "gradient_difference": error,
            "row_tokens_per_second": round(sum(lengths) / best, 1),
            "ratio": round(min(seconds["alone"]) / best, 3),
        }  # fmt: skip
        print(row, flush=True)
        found.append(row)
    return found


def step(model: Any, batches: list[Batch], dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Returns the seconds of forward and backward over all batches, and the gradients."""
    model.zero_grad()
    weight = sum(batch["weight_sum"] for batch in batches)
    begin = clock()
    for batch in batches:
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = batch_loss(model, batch, n_items=weight).loss
        loss.backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - begin
    return seconds, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
