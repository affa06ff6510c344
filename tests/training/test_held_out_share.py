"""A run on rows of which a share is held out: measured and never trained, the same when it goes on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from tests_support import SHORT, result

from qlora_sft.errors import ConfigError, Interrupted
from qlora_sft.export.probe import read_probe
from qlora_sft.prepare import prepare
from qlora_sft.run.folder import Run
from qlora_sft.train import train
from qlora_sft.training.trainer import PackedSFTTrainer


def quiet(_: str) -> None:
    pass


def rows(count: int) -> list[dict[str, Any]]:
    def said(number: int) -> str:
        return " ".join(random.Random(number).choices(["red", "green", "blue", "left", "right", "up", "down"], k=20))

    return [
        {"messages": [{"role": "user", "content": said(2 * n)}, {"role": "assistant", "content": said(2 * n + 1)}]}
        for n in range(count)
    ]


def test_it_is_measured_never_trained_and_found_again(make_config: Any, tmp_path: Path) -> None:
    options = [*SHORT, "data.held_out=20%", "evaluation.loss=true"]
    config = make_config(*options, rows=rows(20))
    data = prepare(config, quiet, unsloth=False)
    held_out = {tuple(document.input_ids) for document in data.held_out.all_documents}
    trained = {tuple(document.input_ids) for document in data.documents}
    assert (len(held_out), len(trained)) == (4, 16)
    assert not held_out & trained
    report = train(config, say=quiet)
    whole = result(Path(config.output))
    assert set(report.loss) == {"chat"}
    run = Path(config.output)
    # What export compares on later are the held-out rows, read anew (all but the last token of each).
    probe = {tuple(document) for document in read_probe(run, data.tokenizer).documents}
    assert {ids[:-2] for ids in held_out} <= probe
    assert not {ids[:-2] for ids in trained} & probe
    ledger = Run.open(run).data["chat"]
    assert (ledger["read"], ledger["kept"], ledger["dropped"]["held out"]["rows"]) == (20, 16, 4)

    stopped = make_config(*options, f"output={tmp_path / 'stopped'}", rows=rows(20))
    take = PackedSFTTrainer.get_batch_samples

    def interrupted(self: Any, *args: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return take(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSFTTrainer, "get_batch_samples", interrupted)
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            train(stopped, say=quiet)
    # A new row changes what is trained, so a run that goes on refuses it.
    write_rows(tmp_path / "chat.jsonl", rows(21))
    with pytest.raises(ConfigError, match="the training data"):
        train(stopped, resume=True, say=quiet)
    write_rows(tmp_path / "chat.jsonl", rows(20))
    train(stopped, resume=True, say=quiet)
    assert result(Path(stopped.output)) == whole
