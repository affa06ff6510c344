"""The loggers that people know get every figure, and none of them can cost a run."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import conversation, write_rows
from tests_support import SHORT

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.train import train
from qlora_sft.training import loggers, reporting
from qlora_sft.training.trainer import PackedSFTTrainer

front = sys.modules["qlora_sft.train"]  # the package's own name of it is the function's


def silent(_: object) -> None:
    pass


def crash() -> None:
    raise RuntimeError("crash")


@pytest.fixture
def configure(make_config: Any, tmp_path: Path) -> Any:
    """A run of six steps and three evaluations."""
    held_out = write_rows(tmp_path / "other.jsonl", [conversation(50 + i) for i in range(4)])

    def make(*names: str) -> Config:
        settings = [f"data.held_out=[{{path: {held_out}}}]", "evaluation.every_steps=2"]
        config: Config = make_config(*SHORT, *settings, f"training.report_to=[{', '.join(names)}]")
        return config

    return make


def logged(run: Path, file: str, key: str) -> list[float]:
    """What a file of the run has of every step or evaluation while it trained."""
    rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
    return [row[key] if file == "metrics.jsonl" else row["held_out"]["other"] for row in rows if row["step"]]


def run_with(config: Config) -> tuple[list[float], list[float], list[float]]:
    """Trains, and returns the losses, the supervised tokens and the held-out losses that a logger should have."""
    train(config, say=silent)
    run = Path(config.output)
    files = (("metrics.jsonl", "loss"), ("metrics.jsonl", "supervised_tokens"), ("evaluations.jsonl", ""))
    losses, tokens, held_out = (logged(run, *each) for each in files)
    assert (len(losses), len(held_out)) == (6, 3)
    return losses, tokens, held_out


def test_tensorboard_gets_every_figure_once_though_the_run_was_interrupted(configure: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure("tensorboard")
    take = PackedSFTTrainer.get_batch_samples

    def taken(self: Any, *args: Any) -> Any:
        return crash() if self.state.global_step == 5 else take(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSFTTrainer, "get_batch_samples", taken)
        with pytest.raises(RuntimeError, match="crash"):
            train(config, say=silent)
    train(config, resume=True, say=silent)
    run = Path(config.output)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()

    def read(tag: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value, rel=1e-5)) for event in events.Scalars(tag)]

    assert read("train/source_loss/chat") == list(enumerate(logged(run, "metrics.jsonl", "loss"), start=1))
    assert read("train/supervised_tokens") == list(enumerate(logged(run, "metrics.jsonl", "supervised_tokens"), 1))
    losses = logged(run, "evaluations.jsonl", "")
    assert read("eval/held_out/other") == list(zip((2, 4, 6), losses, strict=True)) == read("eval/loss")


def wandb_records(content: bytes) -> Iterator[bytes]:
    """What W&B's transaction log holds, which its Python package no longer reads: LevelDB's log behind seven bytes.

    A block of 32 KiB has parts of records, each behind its checksum (4 bytes), length (2) and kind (1: whole, 2: first,
    3: middle, 4: last); less than seven bytes at the end of a block are empty.
    """
    assert content[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline(configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    losses, _, held_out = run_with(configure("wandb"))
    assert wandb.run is None
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows: list[dict[str, Any]] = []
    for data in wandb_records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    assert [row["train/source_loss/chat"] for row in rows if "train/source_loss/chat" in row] == losses
    assert [row["eval/held_out/other"] for row in rows if "eval/held_out/other" in row] == held_out
    assert [row["train/global_step"] for row in rows if "eval/loss" in row] == [2, 4, 6]


def test_mlflow_in_a_folder(configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    losses, tokens, held_out = run_with(configure("mlflow"))
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs(["0"])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"

    def read(name: str) -> list[tuple[int, float]]:
        return sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, name))

    assert read("source_loss/chat") == list(enumerate(losses, start=1))
    assert read("supervised_tokens") == list(enumerate(tokens, start=1))
    assert read("eval_held_out/other") == list(zip((2, 4, 6), held_out, strict=True))


def test_trackio_on_this_machine(configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install trackio")
    from trackio.sqlite_storage import SQLiteStorage

    losses, _, held_out = run_with(configure("trackio"))
    rows = SQLiteStorage.get_logs("qlora_sft", "run")
    assert [row["train/source_loss/chat"] for row in rows if "train/source_loss/chat" in row] == losses
    assert [row["eval/held_out/other"] for row in rows if "eval/held_out/other" in row] == held_out


def test_a_logger_that_is_not_installed_is_named_before_anything_is_read(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("wandb", "mlflow", "tensorboard", "wandb")
    monkeypatch.setattr(loggers, "_installed", lambda name: name == "tensorboard")
    monkeypatch.setattr(front, "prepare", lambda *_, **__: pytest.fail("it began to work"))
    with pytest.raises(ConfigError) as refused:
        train(config, say=silent)
    assert refused.value.problems == [
        "training.report_to: wandb is not installed; pip install wandb",
        "training.report_to: mlflow is not installed; pip install mlflow",
    ]
    assert not Path(config.output).exists()
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        configure("wand")


def test_a_folder_without_a_module_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself makes one of its name where it runs."""
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert [loggers._installed(name) for name in ("only_a_folder", "no_such_thing", "yaml")] == [False, False, True]


def test_a_logger_that_fails_costs_no_run(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Broken(reporting.TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            calls.append("log")
            raise ConnectionError("the server is gone\nand more")

    monkeypatch.setattr(front, "check_loggers", silent)
    monkeypatch.setitem(reporting.OPEN, "mlflow", lambda *_: Broken())
    said: list[str] = []
    report = train(configure("mlflow"), say=said.append)
    assert report.steps == 6
    assert calls == ["log"]
    assert [text for text in said if text.startswith("warning: mlflow gets no more figures")] == [
        "warning: mlflow gets no more figures, because it failed (the server is gone); training goes on, and "
        "metrics.jsonl has them all"
    ]
    monkeypatch.setitem(reporting.OPEN, "mlflow", lambda *_: crash())
    with pytest.raises(
        RunError, match=r"training.report_to: mlflow cannot begin \(crash\); set it up, or leave it out"
    ):
        train(configure("mlflow"), overwrite=True, say=silent)


def test_a_run_keeps_its_id_and_no_other_has_it(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "my run!", tmp_path / "b" / "my run!"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "begun.json").write_text("{}")
    ids = [reporting.run_id(run) for run in [*runs, runs[0]]]
    assert ids[0] == ids[2] != ids[1]
    assert ids[0].startswith("my-run--")
