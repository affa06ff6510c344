"""Question: what does the gated MLP of a QLoRA layer cost, forward and backward, in time, memory and precision?

    python benchmarks/kernels/nf4_lora.py [--quick] [--shape NAME ...] [--tokens 1024 ...]

The layer is ``x + mlp(x)`` with NF4 weights and rank-16 LoRA in float32 under autocast, as a trainer runs it, once by
itself and once inside torch's checkpoint (non-reentrant; a layer of a checkpointed model). All providers hold the same
weights and take turns in one process; times are medians. Error: of the gradients of the input and of the
factors, against float32 on the dequantised weights. Peak memory is measured as in packed_ce.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it sees its own folder only

from measuring import clock, measured_on, peak_growth

if TYPE_CHECKING:
    from cell import Cell
    from transformers.models.llama.modeling_llama import LlamaMLP

RESULTS = Path(__file__).resolve().parents[1] / "results" / "nf4_lora.jsonl"
RANK = 16
GPU_SHAPES = {"Llama-3.1-8B": (4096, 14336), "Llama-3.2-1B": (2048, 8192), "Qwen3-32B": (5120, 25600)}
CPU_SHAPES = {"SmolLM2-135M": (576, 1536), "Llama-3.2-1B": (2048, 8192)}
NAMES = ("gate_proj", "up_proj", "down_proj")

Layer = Callable[[Tensor], Tensor]


def build(width: int, inner: int, dtype: torch.dtype, device: torch.device) -> LlamaMLP:
    """Builds transformers' LlamaMLP with bitsandbytes' NF4 layers and PEFT's LoRA, in which no factor is zero."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=inner))
    for name in NAMES:
        linear = getattr(mlp, name)
        four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
        four.weight = bnb.nn.Params4bit(linear.weight.data.to(dtype), requires_grad=False, quant_type="nf4")
        four.support_avx512bf16_for_cpu = False
        setattr(mlp, name, four.to(device))
    model = get_peft_model(mlp.to(device), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(NAMES)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train().base_model.model


def providers(mlp: LlamaMLP, width: int) -> dict[str, Layer | str]:
    """Returns the layers by name. For one that cannot be measured here, it returns the reason."""
    from qlora_kernels.nf4_lora import default_tile

    from qlora_sft.model.mlp import TiledMLP

    tile = default_tile(width)
    found: dict[str, Layer | str] = {"PEFT": mlp, "Unsloth": unsloth(mlp)}
    found["ours"] = TiledMLP(mlp, "silu", recompute=True, tile=tile)
    found["ours, gate and up kept"] = TiledMLP(mlp, "silu", recompute=False, tile=tile)
    return found


def unsloth(mlp: LlamaMLP) -> Layer | str:
    if not torch.cuda.is_available():
        return "its MLP function needs Triton on a GPU"
    if importlib.util.find_spec("unsloth") is None:
        return "not installed"
    from unsloth.kernels import apply_lora_mlp_swiglu

    return lambda x: apply_lora_mlp_swiglu(mlp, x, inplace=False)


def factors(mlp: LlamaMLP) -> list[Tensor]:
    return [p for p in mlp.parameters() if p.requires_grad]


def around(layer: Layer, x: Tensor) -> Tensor:
    """Applies the MLP behind a sine, which stands for what comes before the MLP in a decoder layer."""
    return x + layer(x.sin())


def run_once(
    layer: Layer, x: Tensor, noise: Tensor, wanted: list[Tensor], checkpointed: bool
) -> tuple[float, list[Tensor]]:
    """Returns the seconds of a step, and the gradients."""
    with contextlib.ExitStack() as stack:
        if x.dtype != torch.float32:
            stack.enter_context(torch.autocast(x.device.type, x.dtype))
        synchronize(x)
        started = clock()
        y = checkpoint(around, layer, x, use_reentrant=False) if checkpointed else around(layer, x)
    gradients = torch.autograd.grad(y, [x, *wanted], noise)
    synchronize(x)
    return clock() - started, list(gradients)


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def true_gradients(mlp: LlamaMLP, x: Tensor, noise: Tensor) -> list[Tensor]:
    """Computes the gradients in float32, with the weights as they are dequantised to the type of ``x``."""
    from qlora_kernels.nf4 import NF4Weight
    from qlora_kernels.nf4_lora import Projection
    from qlora_kernels.nf4_lora.reference import reference_mlp

    from qlora_sft.model.projection import frozen_weight

    layers = []
    for name in NAMES:
        layer = getattr(mlp, name)
        weight = frozen_weight(layer.base_layer)
        assert isinstance(weight, NF4Weight)
        dense = weight.dequantize(x.dtype).float()
        layers.append(
            Projection(dense, layer.lora_A.default.weight, layer.lora_B.default.weight, layer.scaling["default"])
        )
    wide = x.detach().float().requires_grad_()
    # The input of the MLP is rounded for every provider.
    inside = wide.sin() + (x.detach().sin().float() - wide.sin()).detach()
    gate, up, down = layers
    y = wide + reference_mlp(inside, gate, up, down, "silu")
    return list(torch.autograd.grad(y, [wide, *factors(mlp)], noise.float()))


def peak_bytes(layer: Layer, x: Tensor, noise: Tensor, wanted: list[Tensor], checkpointed: bool) -> int | None:
    if x.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_once(layer, x, noise, wanted, checkpointed)
        return torch.cuda.max_memory_allocated() - before
    return peak_growth(lambda: run_once(layer, x, noise, wanted, checkpointed))


def measure(name: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype, checkpointed: bool, repeats: int,
            device: torch.device) -> list[Cell]:  # fmt: skip
    width, inner = shape
    mlp = build(width, inner, dtype, device)
    x = torch.randn(1, tokens, width, device=device).to(dtype).requires_grad_()
    noise = torch.randn(1, tokens, width, device=device).to(dtype)
    wanted, truth = factors(mlp), true_gradients(mlp, x, noise)
    size = torch.stack([t.float().norm() ** 2 for t in truth]).sum()
    cells: dict[str, Cell] = {}
    layers: dict[str, Layer] = {}
    for provider, layer in providers(mlp, width).items():
        cell = cells[provider] = {"provider": provider, "shape": name, "width": width, "inner": inner, "tokens": tokens}
        cell |= {"rank": RANK, "dtype": str(dtype).removeprefix("torch."), "checkpointed": checkpointed}
        if isinstance(layer, str):
            cell["not_measured"] = layer
            continue
        layers[provider] = layer
        if x.is_cuda:
            run_once(layer, x, noise, wanted, checkpointed)  # compiles
        cell["peak_bytes"] = peak_bytes(layer, x, noise, wanted, checkpointed)
    for provider, layer in layers.items():
        _, gradients = run_once(layer, x, noise, wanted, checkpointed)
        off = torch.stack([(g.float() - t).norm() ** 2 / t.norm() ** 2 for g, t in zip(gradients, truth, strict=True)])
        cells[provider] |= {"gradient_error": float(off.mean().sqrt()), "finite": bool(torch.isfinite(size))}
    seconds: dict[str, list[float]] = {provider: [] for provider in layers}
    for _ in range(repeats):
        for provider, layer in layers.items():
            seconds[provider].append(run_once(layer, x, noise, wanted, checkpointed)[0])
    for provider, times in seconds.items():
        cells[provider] |= {"milliseconds": 1000 * statistics.median(times), "fastest_milliseconds": 1000 * min(times)}
    return list(cells.values())


def table(cells: list[Cell]) -> str:
    first = cells[0]
    kind = "checkpointed" if first["checkpointed"] else "not checkpointed"
    own = next(c for c in cells if c["provider"] == "ours")["milliseconds"]
    lines = [f"\n{first['shape']} {first['dtype']}, {first['tokens']} tokens, {kind}"]
    lines.append(f"{'':<26}{'ms':>9}{'vs ours':>9}{'peak MB':>9}{'gradient error':>16}")
    for c in cells:
        if "milliseconds" not in c:
            lines.append(f"{c['provider']:<26}  not measured: {c['not_measured']}")
            continue
        peak = "-" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 1e6:.0f}"
        ratio = c["milliseconds"] / own
        lines.append(f"{c['provider']:<26}{c['milliseconds']:>9.1f}{ratio:>8.2f}x{peak:>9}{c['gradient_error']:>16.1e}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, three repeats")
    parser.add_argument("--shape", nargs="+", help="names of shapes; default: all for this device")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, help="1 on a busy CPU: then the process's own time is taken")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = torch.cuda.is_available()
    if on_gpu and importlib.util.find_spec("unsloth") is not None:
        importlib.import_module("unsloth")  # wants to come before peft
    device = torch.device("cuda" if on_gpu else "cpu")
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    names = options.shape or list(shapes)[: 1 if options.quick else None]
    tokens = options.tokens or ([8192] if options.quick else [4096, 32768]) if on_gpu else options.tokens or [1024]
    repeats = options.repeats or (3 if options.quick else 10 if on_gpu else 5)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for count in tokens:
            for dtype in options.dtype:
                for checkpointed in (True, False):
                    cells = measure(name, shapes[name], count, getattr(torch, dtype), checkpointed, repeats, device)
                    print(table(cells), flush=True)
                    machine = measured_on("nf4_lora")
                    with options.output.open("a") as file:
                        file.writelines(json.dumps({**machine, **cell}) + "\n" for cell in cells)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
