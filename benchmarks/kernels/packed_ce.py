"""Question: what do the loss and its gradient for the hidden states cost, with a frozen head, in time and memory?

    python benchmarks/kernels/packed_ce.py [--quick] [--share 0.25] [--rows 4096] [--only NAME ...]

All providers take turns in one process, so that whatever else the machine does hits all of them; times are medians.
Logits are realistic: targets are sampled from the model's own softmax, which is made as confident as a trained one, so
kernels that skip small gradients gain no more than in training. A provider whose loss or gradient is not the others'
is marked. Peak memory is measured above the inputs: on a GPU by torch's allocator; on a CPU as the growth of the
resident set of a forked child that runs the loss once (so it includes what the libraries allocate).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from ce_providers import PROVIDERS, Labels, Loss, NotAvailable, build
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it sees its own folder only

from measuring import clock, measured_on, peak_growth

if TYPE_CHECKING:
    from cell import Cell

RESULTS = Path(__file__).resolve().parents[1] / "results" / "packed_ce.jsonl"
GPU_SHAPES = {
    "Llama-3.1-8B": (4096, 128256), "Llama-3.2-1B": (2048, 128256), "Qwen3-8B": (4096, 151936),
    "Gemma-2-2B": (2304, 256000),
}  # fmt: skip
CPU_SHAPES = {f"{d} x {v}": (d, v) for d in (576, 2048) for v in (49152, 128256)}


def make_inputs(
    rows: int, width: int, vocabulary: int, share: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Labels]:
    """Makes hidden states that point towards one token each, and labels from their softmax (mean loss about 2)."""
    from qlora_kernels.packed_ce import Targets

    generator = torch.Generator(device.type).manual_seed(0)
    head = torch.empty(vocabulary, width, dtype=dtype, device=device).normal_(generator=generator).div_(width**0.5)
    tokens = torch.randint(0, vocabulary, (rows,), device=device, generator=generator)
    strength = torch.empty(rows, 1, device=device).uniform_(10, 26, generator=generator)
    hidden = torch.empty(rows, width, device=device).normal_(generator=generator)
    hidden = (2 * hidden + strength * head[tokens].float()).to(dtype)
    shifted = torch.full((rows,), -100, dtype=torch.int64, device=device)
    keep = (torch.rand(rows, device=device, generator=generator) < share).nonzero().squeeze(1)
    keep = keep[keep < rows - 1]  # the last token has no next one
    for part in keep.split(256):
        p = (hidden[part] @ head.t()).float().softmax(-1)
        shifted[part] = torch.multinomial(p, 1, generator=generator).squeeze(1)
    unshifted = torch.cat([shifted.new_full((1,), -100), shifted[:-1]])
    zeros = torch.zeros(len(keep), dtype=torch.int32, device=device)
    targets = Targets.from_host(keep.int(), shifted[keep].int(), zeros, 1)
    return hidden.requires_grad_(), head, Labels(shifted, unshifted, targets, len(keep))


def run_once(loss: Loss, hidden: Tensor, head: Tensor, labels: Labels) -> tuple[float, float]:
    """Returns the seconds of a forward and backward, and the loss."""
    hidden.grad = None
    if hidden.is_cuda:
        torch.cuda.synchronize()
    started = clock()
    value = loss(hidden, head, labels)
    value.backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return clock() - started, float(value.detach())


def peak_bytes(loss: Loss, hidden: Tensor, head: Tensor, labels: Labels) -> int | None:
    hidden.grad = None
    if hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_once(loss, hidden, head, labels)
        return torch.cuda.max_memory_allocated() - before
    return peak_growth(lambda: run_once(loss, hidden, head, labels))


def exact_gradient(hidden: Tensor, head: Tensor, labels: Labels, count: int = 48) -> tuple[Tensor, Tensor, float]:
    """Computes in float64, for the first supervised rows, the rows, their gradients and the mean of their nll."""
    rows = labels.targets.positions[:count].long()
    x = hidden.detach()[rows].double().requires_grad_()
    logits = torch.cat([x @ part.double().t() for part in head.split(8192)], dim=1)
    nll = torch.nn.functional.cross_entropy(logits, labels.shifted[rows], reduction="sum")
    (gradient,) = torch.autograd.grad(nll / labels.count, x)
    return rows, gradient, float(nll) / len(rows)


def measure(shape: tuple[str, int, int], rows: int, share: float, dtype: torch.dtype, device: torch.device,
            repeats: int, only: list[str]) -> list[Cell]:  # fmt: skip
    name, width, vocabulary = shape
    hidden, head, labels = make_inputs(rows, width, vocabulary, share, dtype, device)
    sample, exact, nll = exact_gradient(hidden, head, labels)
    cells: dict[str, Cell] = {}
    seconds: dict[str, list[float]] = {}
    losses: dict[str, Loss] = {}
    for provider in only or PROVIDERS:
        cells[provider] = {"provider": provider}
        try:
            losses[provider] = build(provider, device)
            _, value = run_once(losses[provider], hidden, head, labels)  # also compiles
        except (NotAvailable, RuntimeError, TypeError, ImportError) as error:
            losses.pop(provider, None)
            cells[provider]["not_measured"] = str(error).splitlines()[0][:160]
            continue
        assert hidden.grad is not None
        error = (hidden.grad[sample].double() - exact).norm() / exact.norm()
        cells[provider] |= {"loss": value, "gradient_error": float(error)}
    for _ in range(repeats):
        for provider, loss in losses.items():
            seconds.setdefault(provider, []).append(run_once(loss, hidden, head, labels)[0])
    for provider, loss in losses.items():
        cells[provider]["peak_bytes"] = peak_bytes(loss, hidden, head, labels)
    agree = statistics.median([c["loss"] for c in cells.values() if "loss" in c])
    floor = two_products(labels.count, hidden, head, repeats)
    for provider, cell in cells.items():
        cell |= {"shape": name, "width": width, "vocabulary": vocabulary, "rows": rows, "share": share}
        cell |= {"dtype": str(dtype).removeprefix("torch."), "supervised": labels.count, "sample_nll": nll}
        if provider in seconds:
            cell["milliseconds"] = 1000 * statistics.median(seconds[provider])
            cell["fastest_milliseconds"] = 1000 * min(seconds[provider])
            cell["share_of_floor"] = 1000 * floor / cell["milliseconds"]
            cell["same"] = abs(cell["loss"] - agree) < 2e-2 * abs(agree) and cell["gradient_error"] < 0.1
    return list(cells.values())


def two_products(count: int, hidden: Tensor, head: Tensor, repeats: int) -> float:
    """Measures the two matrix products that no method can avoid, in pieces of 512 MB of logits at most."""
    x = hidden.detach()[:1].repeat(count, 1)
    size = max(1, min(count, 2**29 // (head.shape[0] * hidden.element_size())))
    times = []
    for _ in range(repeats):
        if x.is_cuda:
            torch.cuda.synchronize()
        started = clock()
        for part in x.split(size):
            (part @ head.t()) @ head
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(clock() - started)
    return statistics.median(times)


def table(cells: list[Cell]) -> str:
    own = next((c for c in cells if c["provider"] == "ours"), {})
    first = cells[0]
    lines = [
        f"\n{first['shape']} {first['dtype']}, {first['rows']} rows, {first['supervised']} supervised",
        f"{'':<24}{'ms':>9}{'vs ours':>9}{'floor':>8}{'peak MB':>9}{'grad error':>12}",
    ]
    for c in cells:
        if "milliseconds" not in c:
            lines.append(f"{c['provider']:<24}  not measured: {c['not_measured']}")
            continue
        ratio = c["milliseconds"] / own.get("milliseconds", float("nan"))
        peak = "-" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 1e6:.0f}"
        wrong = "" if c["same"] else f"  DIFFERS: loss {c['loss']:.4f}"
        lines.append(
            f"{c['provider']:<24}{c['milliseconds']:>9.1f}{ratio:>8.2f}x{c['share_of_floor']:>8.0%}{peak:>9}"
            f"{c['gradient_error']:>12.1e}{wrong}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, three repeats")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--share", type=float, nargs="+")
    parser.add_argument("--shape", nargs="+", help="names of shapes; default: all for this device")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--only", nargs="+", default=[], choices=list(PROVIDERS))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, help="1 on a busy CPU: then the process's own time is taken")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    names = options.shape or (list(shapes)[:1] if options.quick else list(shapes))
    rows = options.rows or ([8192] if options.quick else [2048, 8192, 32768]) if on_gpu else options.rows or [4096]
    shares = options.share or ([0.25] if options.quick or not on_gpu else [0.1, 0.25, 0.5, 1.0])
    repeats = options.repeats or (3 if options.quick else 10 if on_gpu else 5)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for count in rows:
            for share in shares:
                for dtype in options.dtype:
                    shape = (name, *shapes[name])
                    cells = measure(shape, count, share, getattr(torch, dtype), device, repeats, options.only)
                    print(table(cells), flush=True)
                    machine = measured_on("packed_ce")
                    with options.output.open("a") as file:
                        file.writelines(json.dumps({**machine, **cell}) + "\n" for cell in cells)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
