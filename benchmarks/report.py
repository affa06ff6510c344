"""Writes RESULTS.md from the lines of results/*.jsonl, the newest for every cell: ``python benchmarks/report.py``."""

from __future__ import annotations

import json
from pathlib import Path

from cell import Cell

HERE = Path(__file__).resolve().parent
MASTERS = ("float32", "bfloat16")
# Unsloth's published longest rows for the same settings, by GB of the card.
UNSLOTH_CONTEXT = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 48: 191_728, 80: 342_733}


def read_rows(name: str) -> list[Cell]:
    path = HERE / "results" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


Cells = dict[str, Cell]
"""By provider, the newest measurement."""


def newest_cells(rows: list[Cell], keys: str, reference: str, run: str = "commit load") -> dict[tuple, Cells]:
    """Groups cells by the values of ``keys``.

    Each cell gets its ``ratio`` to ``reference`` if both were measured in one run, in which the fields ``run`` are
    equal.
    """
    newest: dict[tuple, Cells] = {}
    times: dict[tuple, float] = {}
    for row in rows:
        key = tuple(row[k] for k in keys.split())
        newest.setdefault(key, {})[row["provider"]] = row
        if row["provider"] == reference and "milliseconds" in row:
            times[(key, *(row[k] for k in run.split()))] = row["milliseconds"]
    for key, cells in newest.items():
        for c in cells.values():
            beside = times.get((key, *(c[k] for k in run.split())))
            c["ratio"] = f"{c['milliseconds'] / beside:.2f}x" if beside and "milliseconds" in c else ""
    return newest


def runs_of(cells: Cells) -> str:
    """Names the runs in which the cells were measured."""
    torch = dict.fromkeys(f"torch {c['torch']}" for c in cells.values())
    return "; ".join(
        [
            *torch,
            *dict.fromkeys(
                f"commit {c['commit']}, load {c['load'] if c['load'] is not None else 'unknown'}"
                for c in cells.values()
            ),
        ]
    )


def packed_ce(rows: list[Cell]) -> list[str]:
    """Makes one table per machine, shape, type, number of rows and share supervised."""
    lines = ["## packed_ce: loss and gradient of the hidden states, frozen head", ""]
    newest = newest_cells(rows, "device shape dtype rows share", "ours")
    for (device, shape, dtype, count, share), cells in newest.items():
        lines += [f"### {shape} {dtype}, {count} rows, share {share}", f"{device}; {runs_of(cells)}", ""]
        lines += ["| | ms | vs ours | share of two products | peak MB | gradient error |", "|---|---|---|---|---|---|"]
        for provider, c in cells.items():
            if "milliseconds" not in c:
                lines.append(f"| {provider} | not measured: {c['not_measured']} | | | | |")
                continue
            peak = "not measured" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 1e6:.0f}"
            lines.append(
                f"| {provider} | {c['milliseconds']:.1f} | {c['ratio']} | {c['share_of_floor']:.0%} | {peak} "
                f"| {c['gradient_error']:.1e} |"
            )
        lines.append("")
    return lines


def max_context(rows: list[Cell]) -> list[str]:
    """Makes a table of the newest result of each card beside the plan and Unsloth's published figure."""
    newest = {row["card_gib"]: row for row in rows if not row.get("smoke")}
    lines = ["## Longest row: Llama-3.1-8B's shape, NF4, rank 32, batch 1, torch capped to the card's size", ""]
    lines += [
        "| card | the plan | a step of it | 5% more | Unsloth, published | ratio | layers, attention | tokens/s |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for card, published in UNSLOTH_CONTEXT.items():
        row = newest.get(card, {})
        if "tokens" not in row:
            lines.append(f"| {card} GB | not measured | not measured | {published:,} | not measured | | | |")
            continue
        tokens = row["tokens"]
        figures = [f"{tokens:,}", f"{tokens / published:.2f}x"] if tokens else ["out of memory", ""]
        above = {True: "trained", False: "out of memory", None: "not measured"}[row.get("five_percent_more")]
        speed = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else ""
        lines.append(
            f"| {card} GB | {row['predicted']:,} | {figures[0]} | {above} | {published:,} | {figures[1]} "
            f"| {row.get('layers', 32)} of 32, {row.get('attention', 'varlen')} | {speed} |"
        )
    lines += [
        "",
        "Of a model with fewer layers, the bytes of the others lay beside it. Several tries shared the card, so the",
    ]
    lines += ["speeds are lower bounds."]
    for row in {(row["device"], row["torch"], row["commit"]): row for row in newest.values()}.values():
        lines.append(f"\n{row['device']}; torch {row['torch']}, commit {row['commit']}")
    return [*lines, ""]


def parts(rows: list[Cell]) -> list[str]:
    """Makes a table of what the plan said of a step beside what torch's allocator counted."""
    lines = ["## The plan's bytes beside the allocator's: layers of an 8B, every input offloaded", ""]
    lines += ["| attention | tokens | planned | allocated | plan / allocated |", "|---|---|---|---|---|"]
    for row in rows:
        planned, found = row["planned"], row["measured"]
        said = planned["held"] + planned["gradients"] + planned["activations"]
        lines.append(
            f"| {row['attention'].removeprefix('qlora_documents').strip('_') or 'varlen'} | {row['tokens']:,} "
            f"| {said / 1e6:,.0f} MB | {found['allocated'] / 1e6:,.0f} MB | {said / found['allocated']:.3f} |"
        )
    return [*lines, *(f"\n{text}" for text in machines(rows)), ""]


def attention(rows: list[Cell]) -> list[str]:
    """Makes a table of a layer's attention, forward and backward, with a row per way and a column per sequence."""
    lines = ["## attention: forward and backward of one layer, ms", ""]
    newest = {(row["shape"], row["tokens"], row["documents"], row["provider"]): row for row in rows}
    cases = list(dict.fromkeys(key[:3] for key in newest))
    lines += ["| |" + "".join(f" {tokens:,} x {documents} |" for _, tokens, documents in cases)]
    lines += ["|---|" + "---|" * len(cases)]
    for provider in dict.fromkeys(key[3] for key in newest):
        cells = [newest.get((*case, provider), {}) for case in cases]
        figures = [
            f"{cell['milliseconds']:.2f}" if "milliseconds" in cell else cell.get("chosen", "not measured")
            for cell in cells
        ]
        lines.append(f"| {provider} | {' | '.join(figures)} |")
    return [*lines, *(f"\n{text}" for text in machines(rows)), ""]


def packed_ce_paths(rows: list[Cell]) -> list[str]:
    """Makes a table of the share of the two products, by tile and workspace."""
    lines = ["## packed_ce: share of the two products' time, by tile of the vocabulary and workspace", ""]
    newest = {(row["shape"], row["supervised"], row["tile"], row["workspace_mib"]): row for row in rows}
    sizes = sorted({key[3] for key in newest})
    lines += ["| | tile |" + "".join(f" {size} MiB |" for size in sizes), "|---|---|" + "---|" * len(sizes)]
    for shape, supervised, tile in dict.fromkeys(key[:3] for key in newest):
        cells = [newest.get((shape, supervised, tile, size)) for size in sizes]
        figures = [f"{cell['share_of_floor']:.0%}" if cell else "not measured" for cell in cells]
        lines.append(f"| {shape}, {supervised:,} | {tile or 'whole rows'} | {' | '.join(figures)} |")
    return [*lines, *(f"\n{text}" for text in machines(rows)), ""]


def train_cpu(rows: list[Cell]) -> list[str]:
    """A table per machine, type and instruction set; speeds relative to Unsloth's trainer as it comes."""
    lines = [
        "## Training on a CPU: SmolLM2-135M in NF4, rank 16, GSM8K; the same documents and labels in every step",
        "",
    ]
    speed = "supervised_tokens_per_second"
    if not rows:
        return [*lines, "not measured", ""]
    newest = newest_cells(rows, "device capability dtype documents", "Unsloth")
    for (device, capability, dtype, documents), cells in newest.items():
        lines += [f"### {dtype}, {documents} documents a step, instructions: {capability}"]
        lines += [f"{device}; {runs_of(cells)}", ""]
        lines += ["| | supervised tokens/s | vs Unsloth | peak MB beside the model | losses |", "|---|---|---|---|---|"]
        beside = cells.get("Unsloth", {})
        for name, cell in cells.items():
            if speed not in cell:
                lines.append(f"| {name} | not measured: {cell['not_measured']} | | | |")
                continue
            same_run = speed in beside and beside["commit"] == cell["commit"] and beside["load"] == cell["load"]
            ratio = f"{cell[speed] / beside[speed]:.2f}x" if same_run else ""
            losses = " ".join(f"{loss:.3f}" for loss in cell["losses"])
            lines.append(f"| {name} | {cell[speed]:.0f} | {ratio} | {cell['peak_bytes'] / 1e6:.0f} | {losses} |")
        lines.append("")
    return lines


def masters(rows: list[Cell]) -> list[str]:
    """Adapters kept in float32 beside those in bfloat16: a row per data and type, with what every seed gave."""
    lines = ["## Masters: adapters and optimizer states in float32 and in bfloat16", ""]
    lines += [
        "| | held-out loss, mean of the seeds | of each seed | right answers | tokens/s |",
        "|---|---|---|---|---|",
    ]
    newest = {(row["data"], row["provider"], row["seed"]): row for row in rows}
    for data in dict.fromkeys(key[0] for key in newest):
        types = {kind: [row for key, row in newest.items() if key[:2] == (data, kind)] for kind in MASTERS}
        # A seed that only one of them was trained with would be no comparison.
        both = set.intersection(*({row["seed"] for row in found} for found in types.values()))
        for kind, found in types.items():
            cells = sorted((row for row in found if row["seed"] in both), key=lambda row: row["seed"])
            if not cells:
                lines.append(f"| {data}, {kind} | not measured | | | |")
                continue
            losses = [sum(row["held_out_loss"].values()) / len(row["held_out_loss"]) for row in cells]
            right, asked = (sum(row[key] for row in cells) for key in ("right", "asked"))
            speed = sum(row["tokens_per_second"] for row in cells) / len(cells)
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            mean = sum(losses) / len(losses)
            lines.append(f"| {data}, {kind} | {mean:.4f} | {each} | {right} of {asked} | {speed:.0f} |")
    return [*lines, *(f"\n{text}" for text in machines(rows)), ""]


def prefixes(rows: list[Cell]) -> list[str]:
    """A row per data: what rows share at their beginning computed once, beside every row alone."""
    lines = ["## Shared prefixes: forward and backward of the 135M model, the same rows with and without sharing", ""]
    lines += ["| | tokens in rows | computed | rows' tokens/s | alone | ratio |", "|---|---|---|---|---|---|"]
    newest = newest_cells(rows, "case", "alone")
    for (case,), cells in newest.items():
        shared, alone = cells["shared"], cells["alone"]
        speeds = f"{shared['row_tokens_per_second']:.0f} | {alone['row_tokens_per_second']:.0f}"
        tokens = f"{shared['tokens_in_rows']:,} | {shared['tokens_computed']:,}"
        lines.append(f"| {case} | {tokens} | {speeds} | {alone['seconds'] / shared['seconds']:.2f}x |")
    return [*lines, *(f"\n{text}" for text in machines(rows)), ""]


def generation(rows: list[Cell]) -> list[str]:
    """Makes a table of answers in batches beside the same answers one by one, per machine and type."""
    lines = ["## Generation on a CPU: SmolLM2-135M in NF4, GSM8K, greedy, in batches and one by one", ""]
    lines += ["| | questions | tokens/s in batches | one by one | ratio | same answers |", "|---|---|---|---|---|---|"]
    newest = newest_cells(rows, "device dtype rows", "one by one")
    for (device, dtype, questions), cells in newest.items():
        batched, alone = cells["batched"], cells["one by one"]
        lines.append(
            f"| {device}, {dtype} | {questions} | {batched['tokens_per_second']} | {alone['tokens_per_second']} "
            f"| {alone['seconds'] / batched['seconds']:.2f}x | {batched['equal']} of {questions} |"
        )
    return [*lines, *(f"\n{text}" for text in machines(rows)), ""]


def machines(rows: list[Cell]) -> list[str]:
    """Names the machines of the measurements, each once."""
    return list(dict.fromkeys(f"{row['device']}; torch {row['torch']}, commit {row['commit']}" for row in rows))


def memory(rows: list[Cell], title: str = "memory: one step, by what layers keep") -> list[str]:
    """Makes one table per machine, shape, tokens and documents, with times relative to torch's own checkpointing."""
    lines = [f"## {title}", ""]
    rows = [row for row in rows if row["tokens"] is not None]
    newest = newest_cells(rows, "device shape layers tokens documents", "torch checkpoint", run="commit")
    for (device, shape, layers, tokens, documents), cells in newest.items():
        lines += [f"### {shape} wide, {layers} layers, {tokens} tokens in {documents} documents"]
        lines += [f"{device}; {runs_of(cells)}", ""]
        lines += ["| | ms | vs torch checkpoint | peak MB | predicted MB | host MB | gradient error | split |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [_memory_line(cell) for cell in cells.values()] + [""]
    return lines


def _memory_line(cell: Cell) -> str:
    if "milliseconds" not in cell:
        return f"| {cell['provider']} | not measured: {cell['not_measured']} | | | | | | |"
    megabytes = [
        f"{cell[k] / 1e6:.1f}" if cell.get(k) is not None else ""
        for k in ("peak_bytes", "predicted_bytes", "host_bytes")
    ]
    error = "" if cell["gradient_error"] is None else f"{cell['gradient_error']:.1e}"
    figures = [
        cell["provider"],
        f"{cell['milliseconds']:.1f}",
        cell["ratio"],
        *megabytes,
        error,
        cell.get("split") or "",
    ]
    return f"| {' | '.join(figures)} |"


def nf4_lora(rows: list[Cell]) -> list[str]:
    """Makes one table per machine, shape, type, tokens and checkpointing."""
    lines = ["## nf4_lora: forward and backward of a gated MLP with LoRA, NF4 weights", ""]
    newest = newest_cells(rows, "device shape dtype tokens checkpointed", "ours")
    for (device, shape, dtype, tokens, checkpointed), cells in newest.items():
        c = next(iter(cells.values()))
        kind = "inside a checkpoint" if checkpointed else "by itself"
        lines += [f"### {shape} ({c['width']} x {c['inner']}) {dtype}, {tokens} tokens, {kind}"]
        lines += [f"{device}; {runs_of(cells)}", ""]
        lines += ["| | ms | vs ours | peak MB | gradient error |", "|---|---|---|---|---|"]
        for provider, c in cells.items():
            if "milliseconds" not in c:
                lines.append(f"| {provider} | not measured: {c['not_measured']} | | | |")
                continue
            peak = "not measured" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 1e6:.0f}"
            lines.append(
                f"| {provider} | {c['milliseconds']:.1f} | {c['ratio']} | {peak} | {c['gradient_error']:.1e} |"
            )
        lines.append("")
    if not any("threads" not in row["device"] for row in rows):
        lines += ["nf4_lora on a GPU: not measured", ""]
    return lines


def main() -> None:
    lines = ["# Results", "", "Generated by report.py from results/*.jsonl. A cell nobody measured says so.", ""]
    rows = read_rows("packed_ce.jsonl")
    lines += packed_ce(rows)
    if not any("threads" not in row["device"] for row in rows):
        lines += ["packed_ce on a GPU: not measured", ""]
    lines += nf4_lora(read_rows("nf4_lora.jsonl"))
    rows = read_rows("memory.jsonl")
    lines += memory(rows)
    if not any("threads" not in row["device"] for row in rows):
        lines += ["memory on a GPU (time of an offloaded step, overlap of the copies, peak): not measured", ""]
    lines += memory(read_rows("layers.jsonl"), "layers: one step through the layers of an 8B, ours and its peers")
    lines += max_context(read_rows("max_context.jsonl"))
    lines += parts(read_rows("parts.jsonl"))
    lines += attention(read_rows("attention.jsonl"))
    lines += packed_ce_paths(read_rows("packed_ce_paths.jsonl"))
    lines += train_cpu(read_rows("train_cpu.jsonl"))
    lines += masters(read_rows("masters.jsonl"))
    lines += prefixes(read_rows("prefixes.jsonl"))
    lines += generation(read_rows("generation.jsonl"))
    (HERE / "RESULTS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
