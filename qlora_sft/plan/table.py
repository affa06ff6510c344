"""Writes a plan as plain text: what, how much, and why."""

from __future__ import annotations

from qlora_sft.plan.report import CardsPlan, DiskPlan, HostPlan, PlanReport, ResidentPlan
from qlora_sft.units import duration, size


def plan_table(plan: PlanReport) -> str:
    """Writes a plan, as `make_plan` returns it, for a terminal."""
    parts = [_model(plan), _memory(plan), _cards(plan.cards), _host(plan.host), _disk(plan.disk), _run(plan)]
    return "\n\n".join(parts)


def _model(plan: PlanReport) -> str:
    m = plan.model
    lines = [f"{m.path}: {m.kind}, {m.parameters:,} parameters in {m.layers} layers"]
    lines += [f"  {name}: {each.name} ({each.reason})" for name, each in plan.choices.items()]
    if m.note:
        lines.append(f"  note: {m.note}")
    return "\n".join(lines)


def _memory(plan: PlanReport) -> str:
    held, run = plan.resident, plan.this_run
    stacks = f", {plan.model.quantized_stacks} stacks of experts" if plan.model.quantized_stacks else ""
    lines = [f"memory of this run ({run.device}, {size(run.memory)})"]
    packed = "what is not cut" if held.shards else f"{plan.model.quantized_layers} linear layers{stacks}"
    lines += [
        _line("weights in NF4", held.nf4, f"{packed}, exact"),
        _line("weights in full", held.full + held.buffers, "embeddings, head, norms, exact"),
        *_shards(held),
        _line("adapters and gradients", held.adapters + held.gradients, "float32, exact"),
        _line("optimizer", held.optimizer, "exact"),
    ]
    if run.split is None or run.layer is None:
        return "\n".join([*lines, f"  activations: {run.reason}"])
    layer = run.layer
    lines += [
        _line("activations", run.activations or 0, f"{run.tokens:,} tokens; {run.split}: {run.reason}"),
        f"      a layer keeps {size(layer['kept'])} of them (computed again: {size(layer['recomputed'])}), its input "
        f"{size(layer['input'])}, attention {size(layer['attention'])}; its backward takes {size(layer['backward'])} "
        f"more; the loss {size(run.loss or 0)}",
    ]
    if run.context:
        lines.append(_line("CUDA context", run.context, "assumed"))
    verdict = "fits" if run.fits else "does NOT fit: shorten data.max_length or lower training.batch_size"
    return "\n".join([*lines, _line("peak", run.peak or 0, verdict)])


def _shards(held: ResidentPlan) -> list[str]:
    """Writes what one card has of a base that is cut over several."""
    if not held.shards:
        return []
    return [
        _line("shards of the layers", held.shards, f"one of {held.base_shards}, exact; so many cards train together"),
        _line("layers that are whole", held.fetched, "two at a time, exact"),
    ]


def _cards(cards: CardsPlan) -> str:
    if not cards.rows:
        return f"longest row per card: {cards.note}"
    lines = [
        f"longest row per card ({cards.note}; assumed: 5% fragmentation, 0.6 GiB of CUDA context)",
        f"  {'card':>6}{'tokens':>12}{'host':>11}   {'any host memory':>15}{'host':>11}   split",
    ]
    for row in cards.rows:
        lines.append(
            f"  {row.gib:>3} GB{row.tokens:>12,}{size(row.host):>11}   {row.tokens_with_host:>15,}"
            f"{size(row.host_needed):>11}   {row.split or row.limit}"
        )
    if cards.positions and any(row.tokens_with_host > cards.positions for row in cards.rows):
        lines.append(f"  one document may have {cards.positions:,} tokens; longer ones need model.rope_scaling")
    return "\n".join(lines)


def _host(host: HostPlan) -> str:
    lines = [
        "host memory",
        _line("process", host.process, "assumed; prepared data is mapped from disk"),
    ]
    if host.offloaded:
        lines.append(_line("offloaded inputs", host.offloaded, "exact"))
    if host.embedding:
        lines.append(_line("the input embedding", host.embedding, "memory.offload_embeddings, exact"))
    if host.base:
        lines.append(_line("the whole base", host.base, "before training, in one process after the other"))
    if host.device:
        lines.append(_line("the model, on the CPU", host.device, "the peak above"))
    verdict = f"{size(host.available)} available" + ("" if host.total <= host.available else ": NOT enough")
    return "\n".join([*lines, _line("in all", host.total, verdict)])


def _disk(disk: DiskPlan) -> str:
    parts = {
        "download": disk.download, "base in 16 bits, cached": disk.copy_in_16_bits,
        "prepared data": disk.prepared_data, "adapter": disk.adapter, "checkpoints, at most": disk.checkpoints,
        "what training.ewc keeps": disk.anchors,
        "merged, 16 bits": disk.merged, "GGUF, q8_0": disk.gguf_q8_0,
    }  # fmt: skip
    lines = [_line(text, count, "") for text, count in parts.items() if count]
    return "\n".join([f"disk ({size(disk.free)} free)", *lines])


def _run(plan: PlanReport) -> str:
    data, timed = plan.data, plan.time
    lines = ["the run"]
    if data:
        lines.append(
            f"  {data.steps:,} steps, {data.rows:,} rows, {data.tokens:,} tokens, "
            f"{data.supervised_tokens:,} of them supervised"
        )
        if data.rows_per_step > 1:
            lines.append(
                f"  of one card; N cards (torchrun --nproc-per-node N -m qlora_sft.train) do the same steps, each with "
                f"the memory above and its share of the {data.micro_batches:,} micro-batches ({data.rows_per_step:,} "
                "rows) of a step"
            )
    else:
        lines.append("  steps and tokens: not read (--no-data)")
    if timed is None:
        return "\n".join([*lines, "  time: not measured"])
    m = timed.measured
    lines.append(f"  about {timed.tokens_per_second:,.0f} tokens per second while training")
    if timed.training is not None:
        lines.append(f"  about {duration(timed.training)} of training")
    lines.append(
        f"      from one layer measured here on a row of {m.tokens:,} tokens in {m.documents} documents: "
        f"forward {1000 * m.forward:.0f} ms, backward {1000 * m.backward:.0f} ms, loss {1000 * m.loss:.0f} ms"
        f" (median of {m.repeats}); without loading, evaluation and the optimizer's steps"
        + (", and without waiting for layers to be fetched" if plan.resident.shards else "")
    )
    return "\n".join(lines)


def _line(name: str, count: int, reason: str) -> str:
    return f"  {name:<24}{size(count):>10}  {reason}".rstrip()
