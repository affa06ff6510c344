"""Adds up what a run will need of memory, disk and time, and finds the longest sequence on cards of common sizes.

Import this module only when the backend is chosen, as `make_plan` does.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from qlora_kernels.offload.tiers import LayerBytes, TierChoice
from qlora_kernels.offload.tiers import describe as describe_tiers

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError
from qlora_sft.model.attention import Way
from qlora_sft.model.attention_choice import plan_attention
from qlora_sft.model.backend import Backend
from qlora_sft.model.base_folder import missing_bytes
from qlora_sft.model.ewc import Shape, ewc_bytes, file_bytes
from qlora_sft.model.leash import leash_bytes
from qlora_sft.model.load import compute_dtype
from qlora_sft.model.loss import choose_loss
from qlora_sft.model.memory import choose
from qlora_sft.model.memory_budget import available_ram, budget_on, host_budget
from qlora_sft.plan.activations import SequenceBytes, sequence_bytes
from qlora_sft.plan.blueprint import Blueprint, check_headers, read_blueprint
from qlora_sft.plan.report import (
    CardPlan,
    CardsPlan,
    DevicePlan,
    DiskPlan,
    HostPlan,
    MeasuredPlan,
    ModelPlan,
    PlanReport,
    ResidentPlan,
    TimePlan,
)
from qlora_sft.plan.split import CARDS, CONTEXT_BYTES, WORKSPACE_BYTES, fit_card
from qlora_sft.plan.timing import SECONDS, measure
from qlora_sft.plan.weights import Residents, residents
from qlora_sft.plan.workload import Workload, describe
from qlora_sft.run.report import Choice
from qlora_sft.say import Say
from qlora_sft.training.steps import choose_optimizer, most_checkpoints

# Host memory of the process itself: 0.6 GiB for Python with torch, transformers, peft and trl (measured), and room
# for tokenizer, allocator and what loading passes through.
PROCESS_BYTES = 2**30
# The cache of prepared data: an int32 and a float64.
CACHED_TOKEN_BYTES = 12


def needs_of(
    config: Config, base: str, backend: Backend, workload: Workload | None, timing: bool, say: Say
) -> PlanReport:
    """Adds up what a run of ``config`` on ``base`` will take; errors and ``timing`` as in `make_plan`."""
    blueprint = read_blueprint(config, base)
    files = check_headers(blueprint, base)
    on_gpu = torch.cuda.is_available()
    dtype, dtype_reason = compute_dtype(config.model.dtype)
    optimizer, optimizer_reason = choose_optimizer(config, on_gpu)
    held = residents(blueprint, config, dtype, optimizer, on_gpu)
    tokens = workload.longest_sequence if workload else config.data.max_length * config.training.batch_size
    lengths = workload.lengths if workload else [config.data.max_length]
    attention = plan_attention(blueprint.config, config.model.attention, device_here(), dtype, lengths)
    memory, choice = _this_run(blueprint, config, dtype, attention.one_by_one, tokens, held, say)
    return PlanReport(
        model=_model(blueprint, config, files.note),
        choices={
            "backend": Choice(*backend),
            "dtype": Choice(str(dtype).removeprefix("torch."), dtype_reason),
            "attention": Choice(attention.path, attention.reason),
            "optimizer": Choice(optimizer, optimizer_reason),
            "q, k, v and o": Choice(
                "PEFT" if blueprint.why_not_lean else "nf4_lora",
                blueprint.why_not_lean or "a small module of their class gives the same results",
            ),
            "documents": Choice(
                "one at a time" if blueprint.why_one_at_a_time else "packed",
                blueprint.why_one_at_a_time or "no layer lets one see another; checked before training",
            ),
            "tiled_mlp": Choice(
                "off" if blueprint.why_not_tiled else "on", blueprint.why_not_tiled or "its formula is known"
            ),
        },
        resident=ResidentPlan(**asdict(held), total=held.total),
        this_run=memory,
        cards=_cards(blueprint, config),
        host=_host(choice, memory, on_gpu, _whole_base(blueprint, config, dtype), _embedding(blueprint, config, dtype)),
        disk=_disk(blueprint, config, held, workload, base),
        data=describe(workload) if workload else None,
        time=_time(blueprint, config, dtype, attention.way, workload, choice, say) if timing and choice else None,
    )


def device_here() -> torch.device:
    """Returns what a run would be trained on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _model(blueprint: Blueprint, config: Config, note: str) -> ModelPlan:
    """Describes the model for the report."""
    if blueprint.beside:
        names = ", ".join(blueprint.beside)
        beside = f"{names}: {sum(blueprint.beside.values()):,} parameters, frozen, not quantised and counted"
        note = f"{note}; {beside}" if note else beside
    return ModelPlan(
        path=config.model.path,
        kind=blueprint.kind,
        parameters=blueprint.n_parameters,
        layers=blueprint.n_layers,
        quantized_layers=sum(linear.quantized for linear in blueprint.linears),
        quantized_stacks=sum(stack.quantized for stack in blueprint.stacks),
        note=note,
    )


# ------------------------------------------------------------------ memory


def _this_run(
    blueprint: Blueprint,
    config: Config,
    dtype: torch.dtype,
    joined: bool,
    tokens: int,
    held: Residents,
    say: Say,
) -> tuple[DevicePlan, TierChoice | None]:
    """Plans the activations of the longest sequence on the device that is here.

    joined: whether its documents are attended to one by one.
    """
    on_gpu = torch.cuda.is_available()
    device = device_here()
    name = torch.cuda.get_device_name() if on_gpu else "CPU, no GPU here"
    memory = torch.cuda.mem_get_info()[1] if on_gpu else available_ram()
    budget = budget_on(device, config, held.gradients + held.optimizer, held.loaded)
    try:
        path = choose_loss(config.model.loss, device).name
        bytes_of = sequence_bytes(blueprint, config.lora, dtype, on_gpu, joined, path)
        layer, loss = _with_held(bytes_of, blueprint, config, dtype)(tokens)
        choice = choose(config, blueprint.n_layers, layer, loss, budget, on_gpu, say)
    except ConfigError as error:
        return DevicePlan(device=name, memory=memory, tokens=tokens, split=None, reason=str(error)), None
    context = CONTEXT_BYTES + WORKSPACE_BYTES if on_gpu else 0
    plan = DevicePlan(
        device=name,
        memory=memory,
        tokens=tokens,
        split=describe_tiers(choice.tiers),
        reason=choice.reason,
        layer=asdict(layer),
        loss=loss,
        activations=choice.gpu_bytes,
        offloaded=choice.host_bytes,
        context=context,
        peak=held.total + choice.gpu_bytes + context,
        fits=choice.gpu_bytes <= budget.nbytes,
    )
    return plan, choice


def _with_held(bytes_for: SequenceBytes, blueprint: Blueprint, config: Config, dtype: torch.dtype) -> SequenceBytes:
    """Returns ``bytes_for`` with what ``training.replay_kl`` and ``training.ewc`` take between forward and backward."""
    leashed = config.training.replay_kl is not None
    held = ewc_bytes(_held_shapes(blueprint)) if config.training.ewc is not None else 0

    def with_held(tokens: int) -> tuple[LayerBytes, int]:
        layer, loss = bytes_for(tokens)
        leash = leash_bytes(blueprint.vocabulary, blueprint.hidden, tokens, dtype) if leashed else 0
        return layer, loss + leash + held

    return with_held


def _held_shapes(blueprint: Blueprint) -> list[Shape]:
    """Returns the shapes of the layers that ``training.ewc`` holds."""
    return [Shape(linear.rank, linear.inputs, linear.outputs) for linear in blueprint.linears if linear.adapted]


def _cards(blueprint: Blueprint, config: Config) -> CardsPlan:
    """Finds the longest sequence on each card: with the host memory that is here, and with any amount of it."""
    # What an NVIDIA GPU computes in; the type of a CPU would say nothing about it.
    dtype = torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    held = residents(blueprint, config, dtype, choose_optimizer(config, on_gpu=True)[0], on_gpu=True)
    path = None if config.model.loss == "auto" else config.model.loss
    joined = config.model.attention == "sdpa"
    bytes_of = sequence_bytes(blueprint, config.lora, dtype, True, joined, path)
    bytes_for = _with_held(bytes_of, blueprint, config, dtype)
    host, reason = host_budget(config)
    try:
        bytes_for(1)
    except ConfigError as error:
        return CardsPlan(note=str(error), rows=[])
    rows = []
    for gib in CARDS:
        here = fit_card(gib, blueprint.n_layers, bytes_for, held.total, host)
        most = fit_card(gib, blueprint.n_layers, bytes_for, held.total, 2**50)
        rows.append(
            CardPlan(
                gib=gib,
                tokens=here.tokens,
                split=describe_tiers(here.choice.tiers) if here.choice else None,
                host=here.choice.host_bytes if here.choice else 0,
                limit=here.limit,
                tokens_with_host=most.tokens,
                host_needed=most.choice.host_bytes if most.choice else 0,
            )
        )
    note = f"{str(dtype).removeprefix('torch.')}; host memory up to {host / 2**30:.1f} GiB ({reason})"
    return CardsPlan(note=note, resident=held.total, rows=rows, positions=_positions(blueprint, config))


def _positions(blueprint: Blueprint, config: Config) -> int | None:
    """Returns the positions that the model has, scaled as configured."""
    rope = config.model.rope_scaling
    positions: int | None = getattr(blueprint.config, "max_position_embeddings", None)
    if positions and rope and rope.rope_type == "dynamic":
        return int(rope.factor * positions)
    return positions


def _host(choice: TierChoice | None, memory: DevicePlan, on_gpu: bool, base: int, embedding: int) -> HostPlan:
    """Plans the host memory of the run.

    base: the bytes of a base that passes through it as a whole. embedding: those of an input embedding that a GPU
    leaves there.
    """
    slab = choice.host_bytes if choice else 0
    device = 0 if on_gpu else memory.peak or 0
    embedding = embedding if on_gpu else 0  # else it is counted with the model
    # Layers have no inputs there before the base is gone.
    total = PROCESS_BYTES + max(base, slab + device + embedding)
    return HostPlan(PROCESS_BYTES, slab, device, total, available_ram(), base, embedding)


def _embedding(blueprint: Blueprint, config: Config, dtype: torch.dtype) -> int:
    """Returns the bytes of the input embedding if ``memory.offload_embeddings`` keeps it in host memory, else 0."""
    return blueprint.input_embedding * dtype.itemsize if config.memory.offload_embeddings else 0


def _whole_base(blueprint: Blueprint, config: Config, dtype: torch.dtype) -> int:
    """Returns the bytes of the base if it is loaded into host memory to be cut there, else 0."""
    if config.memory.base_shards == 1:
        return 0
    whole = replace(config, memory=replace(config.memory, base_shards=1))
    held = residents(blueprint, whole, dtype, "adamw_torch_fused")
    return held.nf4 + held.full


# ------------------------------------------------------------------ disk and time


def _disk(blueprint: Blueprint, config: Config, held: Residents, workload: Workload | None, base: str) -> DiskPlan:
    """Plans the disk space of the run.

    A merged model has 2 bytes per weight, and a GGUF in q8_0 has 34 bytes for 32 weights. The tokenizer, which may be
    larger than a small adapter, is beside it and in every checkpoint.
    """
    here = Path(config.output).absolute()
    existing = next(folder for folder in (here, *here.parents) if folder.exists())
    download, copy = missing_bytes(base)
    vocabulary = Path(base) / "tokenizer.json"
    beside = vocabulary.stat().st_size if vocabulary.is_file() else 0
    return DiskPlan(
        download=download,
        copy_in_16_bits=copy,
        prepared_data=CACHED_TOKEN_BYTES * workload.prepared_tokens if workload else 0,
        adapter=held.adapters + beside,
        checkpoints=most_checkpoints(config) * (held.adapters + held.optimizer + beside),
        merged=2 * blueprint.n_parameters,
        gguf_q8_0=blueprint.n_parameters * 34 // 32,
        free=shutil.disk_usage(existing).free,
        anchors=file_bytes(_held_shapes(blueprint)) if config.training.ewc is not None else 0,
    )


def _time(
    blueprint: Blueprint,
    config: Config,
    dtype: torch.dtype,
    way: Way,
    workload: Workload | None,
    choice: TierChoice,
    say: Say,
) -> TimePlan:
    """Measures one layer, which attends the ``way`` that the run will, and extrapolates the time of the run from it."""
    say(f"measuring one layer for {SECONDS:.0f} s")
    documents = workload.documents if workload else [config.data.max_length]
    share = workload.supervised / workload.tokens if workload else 1.0
    speed = measure(blueprint, config, dtype, documents, share, way)
    seconds = speed.seconds_for(choice.tiers)
    if workload and config.training.replay_kl is not None:  # the base reads what is replayed, and its logits are formed
        again = workload.replayed / workload.tokens
        seconds += again * (blueprint.n_layers * speed.forward + speed.loss)
    return TimePlan(
        measured=MeasuredPlan(**asdict(speed)),
        tokens_per_second=speed.tokens / seconds,
        training=workload.tokens * seconds / speed.tokens if workload else None,
    )
