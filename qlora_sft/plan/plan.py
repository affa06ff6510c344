"""What a run will need, before anything is loaded: memory, disk, time, and the longest row on cards of common sizes."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError
from qlora_sft.faults import every_fault
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    import torch
    from qlora_kernels.offload.tiers import Choice

    from qlora_sft.plan.blueprint import Blueprint
    from qlora_sft.plan.weights import Residents
    from qlora_sft.plan.workload import Workload

# Host memory of the process itself: 0.6 GiB for Python with torch, transformers, peft and trl (measured), and room
# for tokenizer, allocator and what loading passes through.
PROCESS_BYTES = 2**30
# The cache of prepared data: an int32 and a float64.
CACHED_TOKEN_BYTES = 12


def make_plan(config: Config, *, data: bool = True, timing: bool = True, say: Say = tell) -> dict[str, Any]:
    """The plan as one document; `plan_table` makes it text. Bytes and seconds.

    Reads config.json, the headers of the weights and, with ``data``, the training data; no weights. With ``timing``
    one layer of the model's shape is measured for some seconds. Raises `ConfigError` or `DataError` as training would.
    """
    # As in training: Unsloth patches what follows while it is imported, and a later training needs it first.
    from qlora_sft.model.backend import choose_backend

    backend = choose_backend(config.model.backend)
    import torch

    from qlora_sft.model.base_check import check_base
    from qlora_sft.model.load import compute_dtype, resolve_base
    from qlora_sft.plan.blueprint import check_headers, read_blueprint
    from qlora_sft.plan.weights import residents
    from qlora_sft.plan.workload import describe, read_workload
    from qlora_sft.training.steps import choose_optimizer

    with every_fault(config):
        base = resolve_base(config.model.path)
        check_base(config, base)
    blueprint = read_blueprint(config, base)
    files = check_headers(blueprint, base)
    on_gpu = torch.cuda.is_available()
    dtype, dtype_reason = compute_dtype(config.model.dtype)
    optimizer, optimizer_reason = choose_optimizer(config, on_gpu)
    workload = read_workload(config, base, say) if data else None
    held = residents(blueprint, config, dtype, optimizer, on_gpu)
    tokens = workload.longest_row if workload else config.data.max_length * config.training.batch_size
    memory, choice = _this_run(blueprint, config, dtype, on_gpu, tokens, held, say)
    plan = {
        "model": {
            "path": config.model.path,
            "class": blueprint.kind,
            "parameters": blueprint.n_parameters,
            "layers": blueprint.n_layers,
            "quantized_layers": sum(linear.quantized for linear in blueprint.linears),
            "note": files["note"],
        },
        "choices": {
            "backend": backend._asdict(),
            "dtype": {"name": str(dtype).removeprefix("torch."), "reason": dtype_reason},
            "optimizer": {"name": optimizer, "reason": optimizer_reason},
            "tiled_mlp": {
                "name": "off" if blueprint.why_not_tiled else "on",
                "reason": blueprint.why_not_tiled or "its formula is known",
            },
        },
        "resident": {**asdict(held), "total": held.total},
        "this_run": memory,
        "cards": _cards(blueprint, config),
        "host": _host(choice, memory, on_gpu),
        "disk": _disk(blueprint, config, held, files["bytes"], workload, base),
        "data": describe(workload) if workload else None,
    }
    plan["time"] = _time(blueprint, config, dtype, workload, choice, say) if timing and choice else None
    return plan


# ------------------------------------------------------------------ memory


def _this_run(
    blueprint: Blueprint, config: Config, dtype: torch.dtype, on_gpu: bool, tokens: int, held: Residents, say: Say
) -> tuple[dict[str, Any], Choice | None]:
    """Activations of the longest row on the device that is here."""
    import torch
    from qlora_kernels.offload.tiers import describe

    from qlora_sft.model.memory import choose
    from qlora_sft.model.room import available_ram, room_on
    from qlora_sft.plan.activations import row_bytes
    from qlora_sft.plan.split import CONTEXT_BYTES

    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name() if on_gpu else "CPU, no GPU here"
    memory = torch.cuda.mem_get_info()[1] if on_gpu else available_ram()
    facts: dict[str, Any] = {"device": name, "memory": memory, "tokens": tokens}
    room = room_on(device, config, held.gradients + held.optimizer, held.loaded)
    try:
        layer, loss = row_bytes(blueprint, config.lora, dtype, on_gpu)(tokens)
        choice = choose(config, blueprint.n_layers, layer, loss, room, on_gpu, say)
    except ConfigError as error:
        return {**facts, "split": None, "reason": str(error)}, None
    context = CONTEXT_BYTES if on_gpu else 0
    return {
        **facts,
        "split": describe(choice.tiers),
        "reason": choice.reason,
        "layer": asdict(layer),
        "loss": loss,
        "activations": choice.gpu_bytes,
        "offloaded": choice.host_bytes,
        "context": context,
        "peak": held.total + choice.gpu_bytes + context,
        "fits": choice.gpu_bytes <= room.nbytes,
    }, choice


def _cards(blueprint: Blueprint, config: Config) -> dict[str, Any]:
    """The longest row on each card: with the host memory that is here, and with as much as it takes."""
    import torch
    from qlora_kernels.offload.tiers import describe

    from qlora_sft.model.room import host_room
    from qlora_sft.plan.activations import row_bytes
    from qlora_sft.plan.split import CARDS, fit_card
    from qlora_sft.plan.weights import residents
    from qlora_sft.training.steps import choose_optimizer

    # What an NVIDIA GPU computes in; the type of a CPU would say nothing about it.
    dtype = torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    held = residents(blueprint, config, dtype, choose_optimizer(config, on_gpu=True)[0], on_gpu=True)
    row = row_bytes(blueprint, config.lora, dtype, on_gpu=True)
    host, reason = host_room(config)
    try:
        row(1)
    except ConfigError as error:
        return {"note": str(error), "rows": []}
    rows = []
    for gib in CARDS:
        here = fit_card(gib, blueprint.n_layers, row, held.total, host)
        most = fit_card(gib, blueprint.n_layers, row, held.total, 2**50)
        rows.append(
            {
                "gib": gib,
                "tokens": here.tokens,
                "split": describe(here.choice.tiers) if here.choice else None,
                "host": here.choice.host_bytes if here.choice else 0,
                "limit": here.limit,
                "tokens_with_host": most.tokens,
                "host_needed": most.choice.host_bytes if most.choice else 0,
            }
        )
    note = f"{str(dtype).removeprefix('torch.')}; host memory up to {host / 2**30:.1f} GiB ({reason})"
    return {"note": note, "resident": held.total, "rows": rows, "positions": _positions(blueprint, config)}


def _positions(blueprint: Blueprint, config: Config) -> int | None:
    """Positions that the model has, scaled as configured."""
    rope = config.model.rope_scaling
    positions: int | None = getattr(blueprint.config, "max_position_embeddings", None)
    if positions and rope and rope.rope_type == "dynamic":
        return int(rope.factor * positions)
    return positions


def _host(choice: Choice | None, memory: dict[str, Any], on_gpu: bool) -> dict[str, int]:
    from qlora_sft.model.room import available_ram

    slab = choice.host_bytes if choice else 0
    device = 0 if on_gpu else memory.get("peak", 0)
    needed = PROCESS_BYTES + slab + device
    return {
        "process": PROCESS_BYTES, "offloaded": slab, "device": device, "total": needed,
        "available": available_ram(),
    }  # fmt: skip


# ------------------------------------------------------------------ disk and time


def _disk(
    blueprint: Blueprint, config: Config, held: Residents, weights: int, workload: Workload | None, base: str
) -> dict[str, int]:
    """Bytes. Merged in 16 bits; a GGUF in q8_0 has 34 bytes for 32 weights."""
    here = Path(config.output).absolute()
    existing = next(folder for folder in (here, *here.parents) if folder.exists())
    return {
        "download": 0 if Path(base).is_dir() else weights,
        "prepared_data": CACHED_TOKEN_BYTES * workload.prepared_tokens if workload else 0,
        "adapter": held.adapters,
        "checkpoints": config.training.save_total_limit * (held.adapters + held.optimizer),
        "merged": 2 * blueprint.n_parameters,
        "gguf_q8_0": blueprint.n_parameters * 34 // 32,
        "free": shutil.disk_usage(existing).free,
    }


def _time(
    blueprint: Blueprint, config: Config, dtype: torch.dtype, workload: Workload | None, choice: Choice | None, say: Say
) -> dict[str, Any] | None:
    from qlora_sft.plan.timing import SECONDS, measure

    if choice is None:
        return None
    say(f"measuring one layer for {SECONDS:.0f} s")
    documents = workload.documents if workload else [config.data.max_length]
    share = workload.supervised / workload.tokens if workload else 1.0
    speed = measure(blueprint, config, dtype, documents, share)
    seconds = speed.row(choice.tiers)
    return {
        "measured": asdict(speed),
        "tokens_per_second": speed.tokens / seconds,
        "training": workload.tokens * seconds / speed.tokens if workload else None,
    }
