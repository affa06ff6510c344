"""A run that is killed at any moment, evaluations and checkpoints included, goes on to the very same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import conversation, write_rows
from tests_support import SHORT, result

from qlora_sft.config import Config
from qlora_sft.run.folder import Run
from qlora_sft.train import train

KILLS = int(os.environ.get("QLORA_SFT_KILLS", "4"))
# Steps, evaluations and checkpoints are many, so that a random moment is often in one of them.
OFTEN = [
    "training.max_steps=18", "training.epochs=3", "training.save_steps=3", "training.save_total_limit=1",
    "training.learning_rate=0.3", "training.patience=7", "evaluation.every_steps=2", *SHORT[2:5],
]  # fmt: skip


def work(config: Config, resume: bool) -> None:
    """Trains in a process that can be killed."""
    train(config, resume=resume, say=lambda _: None)


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    """What the run has measured; the last line may be cut off where it was killed."""
    file = run / "evaluations.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def outcome(run: Path) -> tuple[Any, ...]:
    report = Run.open(run).report
    evaluations = evaluations_of(run)
    held_out = {name: (pair.before, pair.after) for name, pair in report.loss.items()}
    return *result(run), evaluations, report.kept, report.stopped_early, report.warnings, held_out


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(make_config: Any, tmp_path: Path) -> None:
    """Each is killed twice, the second time as it goes on. QLORA_SFT_KILLS says how many there are."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qlora_sft.training.recipe"])
    held_out = write_rows(tmp_path / "other.jsonl", [conversation(50 + i) for i in range(4)])
    settings = [*OFTEN, f"data.held_out=[{{path: {held_out}}}]"]

    def start(name: str, resume: bool) -> Any:
        process = context.Process(target=work, args=(make_config(*settings, f"output={tmp_path / name}"), resume))
        process.start()
        return process

    def wait_for(process: Any, file: Path) -> float:
        """Waits until the run has begun to train, if it does, and returns when that was."""
        while process.is_alive() and not (file.exists() and file.read_text()):
            time.sleep(0.02)
        return time.monotonic()

    for name in ("warm", "whole"):  # the first one starts the server
        whole = start(name, resume=False)
        began = wait_for(whole, tmp_path / name / "metrics.jsonl")
        whole.join()
        assert whole.exitcode == 0
        took = time.monotonic() - began
    expected = outcome(tmp_path / "whole")
    assert expected == outcome(tmp_path / "warm")
    draw = random.Random(0)
    left = []
    for number in range(KILLS):
        run = tmp_path / f"killed{number}"
        for resume in (False, True):
            process = start(run.name, resume)
            wait_for(process, run / "metrics.jsonl")
            process.join(draw.uniform(0.0, 1.0) * took)
            process.kill()
            process.join()
            if (run / "manifest.json").exists():
                break
            left.append(len(evaluations_of(run)))
        else:
            last = start(run.name, resume=True)
            last.join()
            assert last.exitcode == 0, run.name
        assert outcome(run) == expected, run.name
    assert sum(left) > 0, "none was killed between its first evaluation and its end"
    print(f"killed {len(left)} times, after so many evaluations: {left}")
