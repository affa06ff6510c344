"""A whole run through the command: Unsloth's backend, an interruption, a disk that fills up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests_support import with_unsloth

from qlora_sft.cli import main

SHORT = [
    "evaluation.loss=false", "evaluation.answers=0", "data.train.0.max_rows=40", "data.train.1.max_rows=40",
    "data.train.2.max_rows=40", "training.max_steps=2",
]  # fmt: skip


@with_unsloth
@pytest.mark.slow
def test_unsloths_patched_trainer_trains_our_batches_and_writes_nowhere_else(base_model: Path, tmp_path: Path) -> None:
    """On the 135M model; a tiny one is trained by tests/test_notebooks.py."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "qlora_sft.train", "demo", *SHORT, "model.backend=unsloth", f"output={output}"]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["backend"]["name"] == "unsloth"
    assert report["steps"] == 2
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < 5 and row["supervised_tokens"] > 50 for row in rows)
    adapter = load_file(output / "adapter/adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_control_c_saves_the_adapter_and_ends_with_130(make_config: Any, tmp_path: Path) -> None:
    output = Path(make_config().output)
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_sft.train", str(tmp_path / "config.yaml"), "training.epochs=400"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the signal, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - starts before any thread
    )
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert str(checkpoint) in errors
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == 2 * 14
    assert not (output / "adapter").exists()


def test_a_disk_that_fills_up_ends_with_1_and_nothing_half_written(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config()
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        # The adapter has a megabyte, and what is written before it some kilobytes.
        settings = ["training.max_steps=1", "lora.r=128", f"output={disk / 'run'}"]
        assert main(["train", str(tmp_path / "config.yaml"), *settings]) == 1
        errors = capsys.readouterr().err
        assert "checkpoint not written, training goes on" in errors
        assert f"{disk / 'run' / 'adapter'}: the disk is full" in errors
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
