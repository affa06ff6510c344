"""A run as an object: what it knows of itself, what an old one lacks, and that its reports keep their JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig

from qlora_sft.config import ModelConfig, RopeScaling, dump_config
from qlora_sft.errors import ConfigError
from qlora_sft.run.folder import Run, is_run
from qlora_sft.run.report import Choice, Course, MemoryReport, OrderReport, Pair, RunReport

REPORT = RunReport(
    output="run", backend=Choice("transformers", "as configured"), base="some/base", base_sha256="b", data_sha256="d",
    dtype="bfloat16", quantized_modules=["model.layers.0.mlp.up_proj"], loss={"chat": Pair(2.0, 1.0)},
    exact_match={}, steps=3, steps_left_out=1, resumed_at=None, train_loss=Course(2.5, 0.5), tokens=300,
    supervised_tokens=100, tokens_per_second=12.5, optimizer="adamw_torch",
    memory=MemoryReport(["keep", "checkpoint"], "1 keep, 1 checkpoint", "fits", 128, 1000, 0, {"input": 10}),
    order=OrderReport("o", 4, 0), seconds={"train": 1.5},
)  # fmt: skip


def written(folder: Path, **manifest: Any) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_report_is_its_json_and_comes_back_from_it() -> None:
    content = REPORT.to_json()
    assert (
        list(content)
        == (
            "output backend base base_sha256 base_commit base_files base_dequantized data_sha256 dtype attention "
            "quantized_modules loss exact_match steps steps_left_out resumed_at kept stopped_early warnings train_loss "
            "tokens supervised_tokens tokens_per_second optimizer processes memory order seconds"
        ).split()
    )
    assert content["backend"] == {"name": "transformers", "reason": "as configured"}
    assert content["loss"] == {"chat": {"before": 2.0, "after": 1.0}}
    assert content["memory"]["tiers"] == ["keep", "checkpoint"]
    assert (REPORT.train_loss.first, REPORT.train_loss.last) == (2.5, 0.5)
    assert RunReport.from_json(json.loads(json.dumps(content))) == REPORT


def test_a_run_knows_itself(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config("model.rope_scaling={rope_type: yarn, factor: 2}", "model.stop_tokens=[x]")
    path = written(tmp_path / "a", config=asdict(config), report=REPORT.to_json(), data={}, versions={"torch": "2"})
    (path / "config.yaml").write_text(dump_config(config))
    run = Run.open(str(path))
    assert is_run(path)
    assert not is_run(tmp_path)
    assert run.config == config
    assert run.model == config.model
    assert (run.base, run.dtype, run.base_sha256) == ("some/base", "bfloat16", "b")
    assert run.report == REPORT
    assert run.quantized_modules == REPORT.quantized_modules
    assert (run.adapter, run.merged, run.ggufs) == (path / "adapter", path / "merged", path / "gguf")
    assert run.exports == {}


def test_an_old_run_opens_and_says_what_it_lacks(tmp_path: Path) -> None:
    settings = {"path": "demo", "dtype": "float16", "rope_scaling": {"rope_type": "linear", "factor": 4}, "gone": 1}
    run = Run.open(written(tmp_path / "old", config={"model": settings}, report={"base": "x", "loss": {}}))
    assert run.model == ModelConfig("demo", dtype="float16", rope_scaling=RopeScaling("linear", 4))
    assert run.dtype == "float16"
    assert run.base_sha256 is None
    for ask, what in (
        (lambda: run.quantized_modules, "'quantized_modules'"),
        (lambda: run.report, "'backend'|'output'"),
        (lambda: run.data, "'data'"),
        (lambda: run.config, "no such file"),
    ):
        with pytest.raises(ConfigError, match=what):
            ask()
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        Run.open(tmp_path)
    (tmp_path / "old" / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        Run.open(tmp_path / "old")


def test_the_report_of_an_older_version_is_read_with_what_it_has() -> None:
    content = {key: value for key, value in REPORT.to_json().items() if key not in ("memory", "order", "base_sha256")}
    old = RunReport.from_json({**content, "something_else": 1})
    assert old.memory is None
    assert old.train_loss == REPORT.train_loss
