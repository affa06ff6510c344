"""Question: what does a step through the layers of an 8B cost, ours against its peers, on both backends?

    python benchmarks/layers.py [--shape 8B] [--layers 8] [--cases 8192x1 8192x16 32768x1] [--only NAME ...]

Forward and backward of one packed sequence (TOKENSxDOCUMENTS) with every second token supervised, LoRA on all linear
layers. Every provider is a process of its own, because some patch torch or transformers for good; all load side by
side and take turns under a lock, so that only one computes at a time. Times are medians. LoRA gradients are compared
with those of plain checkpointing. The peak is what a step takes beside the loaded model.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import memory

if TYPE_CHECKING:
    import torch
    from cell import Cell
    from peft import PeftModel

    from qlora_sft.data.batch import Batch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "layers.jsonl"
# By name, the backend, what `memory.set_up` sets up, and the way in which it attends.
PROVIDERS = {
    "torch checkpoint": ("transformers", "checkpoint", "varlen"),
    "nothing recomputed": ("transformers", "none", "varlen"),
    "transformers offload": ("transformers", "hf", "varlen"),
    "TRL offload": ("transformers", "trl", "varlen"),
    "Unsloth": ("unsloth", "unsloth", "varlen"),
    "Unsloth native": ("unsloth", "unsloth", "varlen"),
    "ours, checkpoint": ("transformers", "checkpoint", "varlen"),
    "ours, offload": ("transformers", "offload", "varlen"),
    "ours, auto": ("transformers", "auto", "varlen"),
    "ours, auto, q to o by PEFT": ("transformers", "auto", "varlen"),
    "ours, auto, sdpa": ("transformers", "auto", "sdpa"),
    "ours, offload, sdpa": ("transformers", "offload", "sdpa"),
    "ours, offload, on Unsloth": ("unsloth", "offload", "varlen"),
    "ours, auto, on Unsloth": ("unsloth", "auto", "varlen"),
}
REFERENCE = "torch checkpoint"


def main() -> None:
    options = parse()
    if options.worker:
        work(options.worker, options)
        return
    import torch
    from measuring import measured_on

    machine = measured_on("layers")
    with tempfile.TemporaryDirectory(prefix="layers-") as folder:
        memory.make_model(argparse.Namespace(shape=options.shape, layers=options.layers, folder=folder))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        running = {name: start(name, folder, options) for name in options.only}
        lines = merged(running)
        until = time.monotonic() + options.timeout
        try:
            while (found := lines.get(timeout=max(0.1, until - time.monotonic()))) is not None:
                name, cell = found
                row = {**machine, "provider": name, "shape": options.shape, "layers": options.layers, **cell}
                with options.output.open("a") as output:  # written one by one, so that a timeout loses no measurement
                    output.write(json.dumps(row) + "\n")
                print(line(row), flush=True)
        except queue.Empty:
            print(f"layers: not everything was measured in {options.timeout} s", flush=True)
        finally:
            for process in running.values():
                process.kill()


def parse() -> argparse.Namespace:
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=memory.SHAPES, default="8B" if gpu else "135M")
    parser.add_argument("--layers", type=int, default=8 if gpu else 4)
    parser.add_argument("--cases", nargs="+", default=["8192x1", "8192x16", "32768x1"] if gpu else ["512x1", "512x4"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--timeout", type=int, default=400, help="seconds for all of them together")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(name: str, folder: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", name, "--folder", folder, "--shape", options.shape]
    command += ["--layers", str(options.layers), "--repeats", str(options.repeats), "--cases", *options.cases]
    errors = (Path(folder) / f"{name}.err").open("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder)
    # The reference takes the lock first, because the others are compared with it.
    time.sleep(2 if name == REFERENCE else 0.2)
    return process


def merged(running: dict[str, subprocess.Popen[str]]) -> queue.Queue[tuple[str, Cell] | None]:
    """Returns a queue of what all workers find, in the order in which they find it, with None at the end."""
    found: queue.Queue[tuple[str, Cell] | None] = queue.Queue()

    def read(name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("RESULT "):
                found.put((name, json.loads(text.removeprefix("RESULT "))))
        if process.wait():
            found.put((name, {"tokens": None, "documents": None, "not_measured": f"ended with {process.returncode}"}))

    readers = [threading.Thread(target=read, args=each, daemon=True) for each in running.items()]

    def end() -> None:
        for reader in readers:
            reader.join()
        found.put(None)

    for reader in (*readers, threading.Thread(target=end, daemon=True)):
        reader.start()
    return found


def case_of(text: str) -> tuple[int, int]:
    tokens, documents = text.split("x")
    return int(tokens), int(documents)


# ------------------------------------------------------------------ one provider, in a process of its own


def work(name: str, options: argparse.Namespace) -> None:
    backend, mode, way = PROVIDERS[name]
    from qlora_sft.model.allocator import use_expandable_segments
    from qlora_sft.model.backend import choose_backend

    use_expandable_segments()
    choose_backend("unsloth" if backend == "unsloth" else "transformers")
    import torch

    loaded = memory.load(options.folder, backend, mode)
    model = loaded.model
    with contextlib.redirect_stdout(sys.stderr):
        replace_parts(model, name, way, max(tokens for tokens, _ in map(case_of, options.cases)))
    model.train()
    with (Path(options.folder) / "lock").open("w") as lock:
        for tokens, documents in map(case_of, options.cases):
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                cell = measure(name, mode, loaded, tokens, documents, options)
            except Exception as error:  # the result says that the provider failed
                cell = {"not_measured": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                fcntl.flock(lock, fcntl.LOCK_UN)
            print("RESULT " + json.dumps({"tokens": tokens, "documents": documents, **cell}), flush=True)


def replace_parts(model: PeftModel, name: str, way: Literal["varlen", "sdpa"], tokens: int) -> None:
    """Puts our attention, norms and MLP into the model, as far as the provider has them."""
    from qlora_sft.model.attention import use_document_attention
    from qlora_sft.model.mlp import use_tiled_mlp
    from qlora_sft.model.norms import use_lean_norms
    from qlora_sft.model.qkv import use_lean_attention

    if name == "Unsloth native":
        return
    use_document_attention(model, way)
    if name.startswith("ours"):
        if "Unsloth" not in name:
            print(use_lean_norms(model))
            if "PEFT" not in name:
                print(use_lean_attention(model))
        print(use_tiled_mlp(model, "auto", tokens))


def measure(
    name: str, mode: str, loaded: memory.Loaded, tokens: int, documents: int, options: argparse.Namespace
) -> Cell:
    """Measures the steps of one provider on one packed sequence."""
    import torch

    from qlora_sft.model.layer_bytes import memory_use

    model, dtype = loaded.model, loaded.dtype
    batch = memory.row(model, tokens, documents)
    facts: Cell = {}
    if name == "Unsloth native":
        if documents > 1:
            return {"not_measured": "its own loss takes one document here"}
        step = native_step(model, batch, dtype)
    else:
        around, facts = memory.set_up(loaded, mode, tokens)

        def step() -> float:
            return memory.step(model, batch, dtype, around)

    step()
    step()
    gradients = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])
    seconds = [step() for _ in range(options.repeats)]
    with memory_use(model.device) as use:
        step()
    reference = Path(options.folder) / f"reference-{tokens}-{documents}.pt"
    if name == REFERENCE:
        torch.save(gradients, reference)
    exact = torch.load(reference) if reference.exists() else None
    return {
        "milliseconds": 1000 * statistics.median(seconds), "fastest_milliseconds": 1000 * min(seconds),
        "peak_bytes": use.peak(), "dtype": str(dtype).removeprefix("torch."),
        "gradient_error": None if exact is None else float((gradients - exact).norm() / exact.norm()), **facts,
    }  # fmt: skip


def native_step(model: PeftModel, batch: Batch, dtype: torch.dtype) -> Callable[[], float]:
    """Returns a step with Unsloth's forward and its own loss, on the labels that ours gets."""
    import torch
    from measuring import clock

    from qlora_sft.evaluation.held_out import autocast

    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, batch["positions"].long() + 1] = batch["targets"].long()

    def step() -> float:
        model.zero_grad(set_to_none=False)
        wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
        wait()
        started = clock()
        with autocast(model.device, dtype):
            loss = model(
                input_ids=batch["input_ids"], labels=labels, num_items_in_batch=batch["n_supervised"], use_cache=False
            ).loss
        loss.backward()
        wait()
        return clock() - started

    return step


def line(cell: Cell) -> str:
    head = f"{cell['provider']:<28}{cell['tokens'] or '':>7} x {cell['documents'] or '':<3}"
    if "not_measured" in cell:
        return f"{head} not measured: {cell['not_measured']}"
    error = cell["gradient_error"]
    return (
        f"{head}{cell['milliseconds']:>10.1f} ms{cell['peak_bytes'] / 1e6:>10.1f} MB"
        f"{'' if error is None else f'  gradients {error:.1e}'}  {cell.get('split', '')}"
    )


if __name__ == "__main__":
    main()
