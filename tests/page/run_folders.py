"""Run folders for tests, written as training writes them, without any training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_sft.config import load_config
from qlora_sft.run.report import Choice, Course, MemoryReport, OrderReport, Pair, RunReport
from qlora_sft.strict import as_tree


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def step_rows(steps: int, sources: Sequence[str], start: float = 2.4, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``: a loss that falls with noise, and all that goes with it."""
    drawn = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        fall = 0.45 + (start - 0.45) * math.exp(-5 * step / (steps + 1))
        loss = fall * drawn.lognormvariate(0, 0.12)
        tokens = drawn.randint(480, 512)
        seconds = drawn.uniform(3.6, 4.6)
        rows.append({
            "step": step, "loss": loss, "source_loss": {name: loss * (0.7 + 0.3 * i) for i, name in enumerate(sources)},
            "accuracy": max(0.0, 1 - loss / 4),
            "learning_rate": 2e-4 * min(step / (0.1 * steps + 1), 1 - step / (steps + 1)),
            "grad_norm": drawn.lognormvariate(-0.3, 0.4), "supervised_tokens": drawn.randint(120, 240),
            "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "resident_bytes": 3 * 2**30 + step * 1000,
        })  # fmt: skip
    return rows


def ledger(tokens: int, supervised: int, **more: Any) -> dict[str, Any]:
    """What the manifest says of one source."""
    return {
        "path": "data.jsonl", "files": ["data.jsonl"], "read": 800, "not_drawn": 0, "dropped": {}, "kept": 800,
        "shortened": 0, "lost": {}, "lost_in": {"rows": 0, "first": []}, "notes": {}, "tokens": tokens,
        "supervised": supervised, "p50": 70, "p95": 120, "p99": 180, "longest": 256, "share": supervised / tokens,
        "sha256": "ab" * 32, **more,
    }  # fmt: skip


def report_of(rows: Sequence[dict[str, Any]], loss: dict[str, Pair], **more: Any) -> RunReport:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    values: dict[str, Any] = {
        "output": "runs/x", "base": "SmolLM2-135M-Instruct",
        "backend": Choice("transformers", "unsloth is not installed"),
        "base_sha256": "cd" * 32, "data_sha256": "ef" * 32, "dtype": "bfloat16", "quantized_modules": ["q_proj"],
        "loss": loss, "exact_match": {name: Pair(0.0, 0.75) for name in loss}, "steps": len(rows),
        "train_loss": Course(losses[0], losses[-1], 1, 1, losses[0], False),
        "tokens": sum(row["tokens"] for row in rows),
        "supervised_tokens": sum(row["supervised_tokens"] for row in rows), "tokens_per_second": 118.4,
        "optimizer": "adamw_torch_fused (bitsandbytes has no 8-bit optimizer for a CPU)",
        "memory": MemoryReport(
            ["keep"] * 30, "30 keep", "everything fits 11.22 GiB: 70% of the 16.1 GiB of free RAM", 512, 250_000_000, 0,
            {"input": 1, "attention": 2, "kept": 3, "backward": 4, "recomputed": 5}, 1_000,
        ),
        "order": OrderReport("12" * 32, 596, 3),
        "seconds": {"data": 2.1, "imports": 9.4, "load model": 6.2, "evaluate before": 31.0, "train": 262.0,
                    "evaluate after": 28.5},
    }  # fmt: skip
    return RunReport(**{**values, **more})


SOURCES = ("fields", "arithmetic", "tools")


def write_run(
    folder: Path, steps: int = 64, sources: Sequence[str] = SOURCES, *, finished: bool = True, every: int = 8,
    overrides: Sequence[str] = (), start: float = 2.4,
) -> Path:  # fmt: skip
    """A run of the demo's configuration, with all files that a run may have."""
    folder.mkdir(parents=True, exist_ok=True)
    config = as_tree(load_config("demo", [f"output={folder}", *overrides]))
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    rows = step_rows(steps, sources, start)
    write_lines(folder / "metrics.jsonl", rows)
    held_out = [
        {"step": step, "held_out": {
            name: (0.5 + 0.2 * i) + 1.6 * math.exp(-6 * step / steps) + max(0, step / steps - 0.75) * 0.4 * i
            for i, name in enumerate(sources)
        }, "seconds": 3.2}
        for step in sorted({*range(0, steps + 1, every), steps})
    ]  # fmt: skip
    write_lines(folder / "evaluations.jsonl", held_out)
    first, last = held_out[0]["held_out"], held_out[-1]["held_out"]
    (folder / "before.json").write_text(json.dumps({"question": "q", "loss": first, "exact_match": {}, "records": []}))
    (folder / "begun.json").write_text("{}")
    pieces = [
        {"text": "<|im_start|>user\n", "weight": 0.0, "control": True},
        {"text": "Turn the sentence into JSON: Carmen is 35 and a pilot in Prague.", "weight": 0.0, "control": False},
        {"text": "<|im_end|>\n<|im_start|>assistant\n", "weight": 0.0, "control": True},
        {"text": '{"name": "Carmen", "age": 35, "city": "Prague", "job": "pilot"}', "weight": 1.0, "control": False},
        {"text": "<|im_end|>", "weight": 1.0, "control": True},
    ]
    (folder / "trained_on.json").write_text(json.dumps({
        "steps": max(steps, 64) if finished else 2 * steps,
        "mixture": {
            name: {"documents": 100, "tokens": 9000 * (1 + i), "supervised": 3000 + 500 * i}
            for i, name in enumerate(sources)
        },
        "documents": [
            {"source": name, "tokens": 70, "supervised": 25, "shortened": False, "pieces": pieces} for name in sources
        ],
    }))  # fmt: skip
    write_lines(folder / "said.jsonl", [{"text": text} for text in (
        "fields: detected messages (messages: role/content) in data.jsonl",
        "backend: transformers (unsloth is not installed)",
        "chat template: chatml-think; its {% generation %} marks say what is supervised",
        "training data\nsource     read   kept\nfields      800    800",
        "packing (bfd): 2,400 documents in 596 packed sequences of 512 tokens, 98.2% filled",
        "compute in bfloat16 (this CPU computes in bfloat16)",
        "attention: sdpa (document by document, on a cpu)",
        "memory: of 30 layers 30 keep (everything fits 11.22 GiB)",
        "optimizer: adamw_torch_fused (bitsandbytes has no 8-bit optimizer for a CPU); 64 steps of 1 x 1 rows",
    )])  # fmt: skip
    if not finished:
        return folder
    write_lines(folder / "samples.jsonl", [
        {"source": name, "prompt": f"<|im_start|>user\nQuestion {i} of {name}<|im_end|>\n<|im_start|>assistant\n",
         "prompt_ids": [1], "reference": '{"name": "Carmen", "age": 35}',
         "answer": '{"name": "Carmen", "age": 35}' if i % 2 else '{"name": "Carmen"}', "exact": bool(i % 2),
         "before": "Here is an example of a JSON document with a name:\n```json\n{\n}\n```"}
        for name in sources for i in range(3)
    ])  # fmt: skip
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "arithmetic.json").write_text(json.dumps(task_json()))
    report = report_of(rows, {name: Pair(first[name], last[name]) for name in sources})
    data = {name: ledger(9000 * (1 + i), 3000 + 500 * i) for i, name in enumerate(sources)}
    manifest = {"config": config, "versions": {"python": "3.11.7", "torch": "2.13.0"}, "machine": "Linux", "data": data,
                "report": report.to_json()}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def task_json(name: str = "arithmetic", **more: Any) -> dict[str, Any]:
    """What ``evaluation/NAME.json`` holds."""
    change = {"pass@1": (0.225, 0.144, 0.312), "pass@2": (0.35, 0.225, 0.471), "pass@4": (0.45, 0.325, 0.575)}
    return {
        "name": name, "form": "number", "path": "demo:held_out/arithmetic.jsonl", "questions": "12ab", "items": 40,
        "seed": 0,
        "tuned": {"pass@1": 0.25, "pass@2": 0.396, "pass@4": 0.525, "ended": 1.0, "distinct": 0.8}, "samples": 4,
        "base": {"pass@1": 0.025, "pass@2": 0.046, "pass@4": 0.075, "ended": 0.36, "distinct": 0.9},
        "change": {key: {"difference": d, "interval": [low, high]} for key, (d, low, high) in change.items()},
        "verdict": "better", "reason": "pass@4 has risen", **more,
    }  # fmt: skip
