"""Question: how long may one row be on a card of 8 to 80 GB? Llama-3.1-8B's shape, NF4, rank 32, batch 1, real steps.

Random weights, so nothing is downloaded. The card is capped with `torch.cuda.set_per_process_memory_fraction`; for each
size the plan's prediction is tried first, then longer or shorter rows until the longest that trains for two optimizer
steps is known to 2%. A row per size goes to results/max_context.jsonl, beside the plan's prediction and what Unsloth
publishes for the same model and settings. ``--smoke`` does a tiny shape on any machine, without a cap.

``--parts TOKENS ...`` takes one step of each length without a cap, with ``--layers`` layers whose inputs are all
offloaded, and prints what the plan says of each part beside what torch's allocator counted, and what was alive at the
peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from cell import Cell
from measuring import measured_on
from peak_parts import recorded
from peft import PeftModel
from qlora_kernels.offload import drop_failed_graphs
from qlora_kernels.offload.tiers import Tier, TierChoice, choose_tiers, describe, peak_bytes
from transformers import LlamaConfig

from qlora_sft.config import Config, load_config
from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.model.allocator import describe_allocator, use_expandable_segments
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.base import base_of
from qlora_sft.model.embeddings import use_host_embedding
from qlora_sft.model.loss import batch_loss, to_device
from qlora_sft.model.memory import install
from qlora_sft.model.memory_budget import HOST_SHARE, available_ram
from qlora_sft.model.mlp import use_tiled_mlp
from qlora_sft.model.norms import use_lean_norms
from qlora_sft.model.qkv import use_lean_attention
from qlora_sft.plan.activations import SequenceBytes, sequence_bytes
from qlora_sft.plan.blueprint import Blueprint, blueprint_of
from qlora_sft.plan.random_model import random_model
from qlora_sft.plan.split import CONTEXT_BYTES, activation_budget, fit_card
from qlora_sft.plan.weights import Residents, residents

RESULTS = Path(__file__).parent / "results" / "max_context.jsonl"
# Unsloth's own figures for Llama-3.1-8B QLoRA, rank 32, batch 1.
PUBLISHED = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 48: 191_728, 80: 342_733}
PRECISION = 0.02
STEPS = 2
LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500_000.0, "max_position_embeddings": 131_072,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def train_steps(model: PeftModel, optimizer: torch.optim.Optimizer, tokens: int, steps: int = STEPS) -> float:
    """Takes a few optimizer steps on one document, supervised throughout, and returns the seconds of the last."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = to_device(flatten([Rendered(ids, [1.0] * tokens, "random")]), model.device)
    seconds = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss = batch_loss(model, batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not bool(torch.isfinite(loss)):  # waits for the device
            raise RuntimeError(f"the loss of {tokens:,} tokens is {float(loss)}")
        seconds = time.perf_counter() - start
    return seconds


def attempt(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    tokens: int,
    split: Callable[[int], TierChoice],
    row: SequenceBytes,
    steps: int,
) -> Cell | None:
    """Trains on one row and returns what was measured, or None if the row does not fit."""
    on_gpu = model.device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        choice = split(tokens)
    except ValueError as error:
        print(f"  {tokens:,} tokens: {error}", flush=True)
        return None
    slab = None
    try:
        slab = install(model, choice.tiers, tokens, row(tokens)[0].input, print)
        seconds = train_steps(model, optimizer, tokens, steps)
    except torch.OutOfMemoryError as error:
        print(f"  {tokens:,} tokens: {str(error).splitlines()[0]}", flush=True)
        print(torch.cuda.memory_summary(abbreviated=True), flush=True)
        optimizer.zero_grad()
        drop_failed_graphs()
        return None
    finally:
        if slab is not None:
            slab.close()
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    reserved = torch.cuda.max_memory_reserved() if on_gpu else None
    print(f"  {tokens:,} tokens: {seconds:.1f} s, {describe(choice.tiers)}", flush=True)
    return {
        "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1),
        "peak_bytes": peak, "reserved_bytes": reserved, "planned_bytes": choice.gpu_bytes,
        "host_bytes": choice.host_bytes, "split": describe(choice.tiers),
    }  # fmt: skip


def search(first: int, attempt_at: Callable[[int], Cell | None], until: float) -> Cell | None:
    """Searches for the longest row that can be trained, from ``first`` in steps of 2% up or down."""
    tokens, best = first, attempt_at(first)
    going_up = best is not None
    while time.monotonic() < until and tokens > 1:
        tokens = max(1, int(tokens * (1 + PRECISION if going_up else 1 - PRECISION)))
        found = attempt_at(tokens)
        if going_up and found is None:
            break
        best = found or best
        if not going_up and found is not None:
            break
    return best


def verify(first: int, attempt_at: Callable[[int], Cell | None]) -> Cell:
    """Tries the plan's figure once, and once a length 5% above it, which need not fit."""
    found = attempt_at(first)
    above = attempt_at(int(first * 1.05))
    return {**(found or {"tokens": None}), "five_percent_more": above is not None}


def measure_card(
    gib: int,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    whole: Blueprint,
    config: Config,
    options: argparse.Namespace,
) -> Cell:
    """Finds the longest sequence with torch capped to a card of ``gib``, less what the plan leaves to the driver.

    ``whole`` is the model that the plan is for. If ``model`` has fewer layers, unused memory takes the place of the
    others.
    """
    row = sequence_bytes(whole, config.lora, torch.bfloat16, on_gpu=True)
    held = residents(whole, config, torch.bfloat16, "adamw_8bit", on_gpu=True)
    n_layers, host = len(model.get_base_model().get_decoder().layers), int(HOST_SHARE * available_ram())
    share = n_layers / whole.n_layers
    predicted = fit_card(gib, whole.n_layers, row, held.total, host).tokens
    torch.cuda.set_per_process_memory_fraction(1.0)
    others = int((held.nf4 + held.adapters + held.gradients + held.optimizer) * (1 - share)) + 1
    ballast = torch.empty(others, dtype=torch.uint8, device="cuda")
    cap = gib * 2**30 - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.mem_get_info()[1]))
    budget = activation_budget(gib * 2**30, held.total)

    def split(tokens: int) -> TierChoice:
        layer, loss = row(tokens)
        # Beyond the prediction everything that host memory holds is offloaded. A row that does not fit fails then.
        least = _least(n_layers, row, tokens, int(host * share))
        return choose_tiers(n_layers, layer, max(budget, least), int(host * share), loss=loss)

    print(f"{gib} GB: the plan says {predicted:,} tokens", flush=True)

    def attempt_at(tokens: int) -> Cell | None:
        return attempt(model, optimizer, tokens, split, row, options.steps)

    if options.verify:
        best: Cell | None = verify(max(1, predicted), attempt_at)
    else:
        best = search(max(1, predicted), attempt_at, time.monotonic() + options.seconds)
    del ballast
    return {
        "card_gib": gib,
        "layers": n_layers,
        "attention": options.attention,
        "predicted": predicted,
        "published": PUBLISHED.get(gib),
        "host_budget": host,
        **(best or {}),
    }


def _least(n_layers: int, row: SequenceBytes, tokens: int, host: int) -> int:
    """Returns the bytes of the split that needs the least."""
    layer, loss = row(tokens)
    offloaded = min(n_layers, host // layer.input)
    tiers: tuple[Tier, ...] = ("offload",) * offloaded + ("checkpoint",) * (n_layers - offloaded)
    return peak_bytes(tiers, layer, loss)


def context_bytes() -> int:
    """Returns the bytes of the card that torch does not hold: the driver's context, kernels, and other programs."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def adamw_8bit(trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(trained, lr=1e-4)
    return optimizer


def parts(model: PeftModel, optimizer: torch.optim.Optimizer, tokens: int, row: SequenceBytes, held: Residents) -> Cell:
    """Compares the plan's bytes with the allocator's for one step in which every layer's input is offloaded."""
    layers = len(model.get_base_model().get_decoder().layers)
    train_steps(model, optimizer, 64)  # optimizer states, workspaces of cuBLAS
    torch.cuda.empty_cache()
    layer, loss = row(tokens)
    tiers: list[Tier] = ["offload"] * layers
    slab = install(model, tiers, tokens, layer.input, print)
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    peak, alive = recorded(lambda: train_steps(model, optimizer, tokens, steps=1))
    stats = torch.cuda.memory_stats()
    if slab is not None:
        slab.close()
    found = {
        "tokens": tokens,
        "attention": base_of(model).config._attn_implementation,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", ""),
        "planned": {"held": held.total - held.gradients, "gradients": held.gradients,
                    "activations": peak_bytes(tiers, layer, loss), "layer": asdict(layer), "loss": loss},
        "measured": {"held": resident, "beyond": peak, "allocated": stats["allocated_bytes.all.peak"],
                     "requested": stats["requested_bytes.all.peak"], "reserved": stats["reserved_bytes.all.peak"],
                     "context": context_bytes()},
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    for name, size in alive[:30]:
        print(f"{size / 2**20:10.1f} MiB  {size / tokens:9.0f} B/token  {name}")
    print(flush=True)
    return found


def smoke(model: PeftModel, optimizer: torch.optim.Optimizer, row: SequenceBytes, output: Path, machine: Cell) -> None:
    """Takes one short row through everything but the cap."""
    tokens, n_layers = 64, len(model.get_base_model().get_decoder().layers)
    layer, loss = row(tokens)
    choice = choose_tiers(n_layers, layer, 2**40, 0, loss=loss)
    found = search(tokens, lambda n: attempt(model, optimizer, n, lambda _: choice, row, STEPS), time.monotonic())
    if found is None:
        raise SystemExit("smoke: a row of 64 tokens could not be trained")
    write(output, {**machine, "smoke": True, "card_gib": None, "predicted": None, "published": None, **found})


def write(output: Path, row: Cell) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, nargs="+", default=list(PUBLISHED), help="sizes in GB")
    parser.add_argument("--seconds", type=float, default=600, help="for the search on each size")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, one short row, any machine")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each try")
    parser.add_argument("--verify", action="store_true", help="the plan's figure and 5%% above it, no search")
    parser.add_argument("--parts", type=int, nargs="+", metavar="TOKENS", help="bytes part by part, without a cap")
    parser.add_argument("--attention", choices=("varlen", "sdpa"), default="varlen")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    use_expandable_segments()
    print("allocator:", describe_allocator())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        print("max_context: needs an NVIDIA GPU; not measured. --smoke runs anywhere.", file=sys.stderr)
        return 1
    config = load_config("demo", ["lora.r=32", "lora.alpha=32", "memory.offload_embeddings=true"])
    settings = LlamaConfig(**(TINY if options.smoke else LLAMA_8B))
    settings.num_hidden_layers = options.layers or settings.num_hidden_layers
    blueprint = blueprint_of(settings, config)
    row = sequence_bytes(blueprint, config.lora, torch.bfloat16, device.type == "cuda")
    model = random_model(settings, config, torch.bfloat16, device)
    if device.type == "cuda":
        print("attention:", use_document_attention(model, options.attention))
    print("embeddings:", use_host_embedding(model))
    print("norms:", use_lean_norms(model))
    print("q, k, v and o:", use_lean_attention(model))
    print("tiled MLP:", use_tiled_mlp(model, "auto", max(PUBLISHED.values())), flush=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    machine = measured_on("max_context")
    if options.parts:
        optimizer = adamw_8bit(trained)
        held = residents(blueprint, config, torch.bfloat16, "adamw_8bit", on_gpu=True)
        for tokens in options.parts:
            found = parts(model, optimizer, tokens, row, held)
            write(options.output, {**machine, "benchmark": "parts", "layers": settings.num_hidden_layers, **found})
        return 0
    if options.smoke:
        smoke(model, torch.optim.AdamW(trained, lr=1e-4), row, options.output, machine)
        return 0
    optimizer = adamw_8bit(trained)
    whole = blueprint_of(LlamaConfig(**LLAMA_8B), config)
    shape = {"shape": "Llama-3.1-8B", "rank": 32, "batch": 1}
    for gib in options.cards:
        write(options.output, {**machine, **shape, **measure_card(gib, model, optimizer, whole, config, options)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
