"""A whole run through the command: Unsloth's backend, an interruption, a disk that fills up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SHORT = [
    "evaluation.loss=false", "evaluation.answers=0", "data.train.0.max_rows=40", "data.train.1.max_rows=40",
    "data.train.2.max_rows=40",
]  # fmt: skip


def command(*overrides: str, output: Path) -> list[str]:
    return [sys.executable, "-m", "qlora_sft.train", "demo", *SHORT, *overrides, f"output={output}"]


def test_unsloths_patched_trainer_trains_our_batches_and_writes_nowhere_else(base_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = command("model.backend=unsloth", "training.max_steps=2", output=output)
    result = subprocess.run([*arguments, "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["backend"]["name"] == "unsloth"
    assert report["steps"] == 2
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < 5 and row["supervised_tokens"] > 50 for row in rows)
    adapter = load_file(output / "adapter/adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_control_c_saves_the_adapter_and_ends_with_130(base_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        command("model.backend=transformers", "training.epochs=9", output=output),
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the signal, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - starts before any thread
    )
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert str(checkpoint) in errors
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == 2 * 210
    assert not (output / "adapter").exists()


def test_a_disk_that_fills_up_ends_with_1_and_nothing_half_written(base_model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        arguments = command("model.backend=transformers", "training.max_steps=1", output=disk / "run")
        result = subprocess.run(arguments, capture_output=True, text=True)
        assert result.returncode == 1, result.stderr
        assert "checkpoint not written, training goes on" in result.stderr
        assert f"{disk / 'run' / 'adapter'}: the disk is full" in result.stderr
        assert sorted(path.name for path in (disk / "run").iterdir()) == [
            "before.json",
            "begun.json",
            "config.yaml",
            "metrics.jsonl",
            "order.json",
            "said.jsonl",
            "trained_on.json",
        ]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
