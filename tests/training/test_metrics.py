"""Every line of metrics.jsonl says what its step did: of which source, how fast, in how much memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import conversation, write_rows
from qlora_kernels.packed_ce import CEOutput
from tests_support import SHORT, documents_of

from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.render import Rendered
from qlora_sft.data.tree_batch import flatten_tree
from qlora_sft.model.loss import batch_loss
from qlora_sft.train import train
from qlora_sft.training import progress
from qlora_sft.training.display import SPARKS, Course, Display
from qlora_sft.training.progress import held_out_briefly
from qlora_sft.training.totals import StepTotals
from qlora_sft.training.utilisation import StepWork, peak_of_card, step_work


def silent(_: str) -> None:
    pass


def test_a_step_says_what_it_did(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that can do 10^9 operations a second, of which a share is left that rounding leaves as it is."""
    monkeypatch.setattr(progress, "peak_of", lambda *_: 1e9)
    file = write_rows(tmp_path / "other.jsonl", [conversation(50 + i) for i in range(12)])
    two = [f"data.train=[{{path: {tmp_path / 'chat.jsonl'}}}, {{path: {file}, loss_weight: 2}}]", "data.packing=bfd"]
    config = make_config(*[each for each in SHORT[2:] if "packing" not in each], *two, "training.max_steps=2")
    began = time.time()
    report = train(config, say=silent)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) == {
            "step", "loss", "source_loss", "accuracy", "learning_rate", "grad_norm", "supervised_tokens", "tokens",
            "seconds", "tokens_per_second", "resident_bytes", "mfu", "time",
        }  # fmt: skip
        assert set(row["source_loss"]) == {"chat", "other"}
        assert min(row["source_loss"].values()) < row["loss"] < max(row["source_loss"].values())
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.02)
        assert row["mfu"] * row["seconds"] * 1e9 == pytest.approx(work_of(row), rel=0.1)
        assert 2**26 < row["resident_bytes"] < 2**38
        assert began < row["time"] < time.time()
    assert sum(row["tokens"] for row in rows) == report.tokens


def work_of(row: dict[str, Any]) -> float:
    """The operations of a step of the tiny model with rank 16, but for those of attention, which are few here."""
    shapes = 2 * [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]  # q, k, v, o, gate, up, down
    per_token = sum(4 * rows * columns + 6 * 16 * (rows + columns) for rows, columns in shapes)
    return float(per_token * row["tokens"] + 4 * 5000 * 64 * row["supervised_tokens"])


def rows_of_sources(config: Any) -> list[Rendered]:
    """Documents of three sources in turn, of several weights."""
    return [
        Rendered(each.input_ids, [weight * (1 + index % 2) for weight in each.weights], f"source {index % 3}")
        for index, each in enumerate(documents_of(config))
    ]


def check_sources(
    documents: list[Rendered], make: Callable[[list[Rendered]], Batch], loss: Callable[[Batch], CEOutput]
) -> None:
    """Two micro-batches of many sources give what the documents of each source give alone."""
    totals = StepTotals()
    for part in (documents[:5], documents[5:]):
        batch = make(part)
        totals.add(loss(batch), batch)
    for name in sorted({document.source for document in documents}):
        alone = flatten([each for each in documents if each.source == name])
        expected = float((loss(alone).nll * alone["position_weights"]).sum()) / alone["weight_sum"]
        assert totals.losses.of_sources[name] == pytest.approx(expected, abs=1e-4)
        assert totals.by_source[name][1] == pytest.approx(alone["weight_sum"])
    weights = {name: weight for name, (_, weight) in totals.by_source.items()}
    whole = sum(totals.losses.of_sources[name] * weights[name] for name in weights) / sum(weights.values())
    assert totals.losses.loss == pytest.approx(whole, abs=1e-5)


def test_the_loss_of_a_source_is_that_of_its_documents_alone(make_config: Any, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        check_sources(rows_of_sources(make_config()), flatten, lambda batch: batch_loss(model, batch, n_items=1.0))


def by_target(batch: Batch) -> CEOutput:
    """A loss that the target alone decides, whatever stands before it."""
    targets = batch["targets"].float()
    return CEOutput(targets.sum(), torch.sin(targets), targets > 0, targets)


def test_the_same_where_prefixes_are_shared(make_config: Any) -> None:
    system = {"role": "system", "content": "You know everything, and " * 20}
    rows = [{"messages": [system, *conversation(i, 1 + i % 2)["messages"]]} for i in range(12)]
    documents = rows_of_sources(make_config(rows=rows))
    assert flatten_tree(documents[:5])["input_ids"].numel() < flatten(documents[:5])["input_ids"].numel()
    check_sources(documents, flatten_tree, by_target)


def test_a_token_of_several_sources_counts_for_the_first() -> None:
    same = list(range(100, 196))
    rows = [Rendered([*same, 4], [1.0] * 97, "a"), Rendered([*same, 5], [0.5] * 97, "b")]
    batch = flatten_tree(rows)
    assert batch["sources"] == ("a", "b")
    assert batch["source_weights"] == (95 * 1.5 + 1, 0.5)
    assert batch["weight_sum"] == 95 * 1.5 + 1.5


def test_the_work_of_a_step_is_what_torch_counts(tiny_model: Path) -> None:
    """In the linear layers and the head; of attention it counts only some of its implementations."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = 64
    hidden = torch.randn(1, tokens, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = model(inputs_embeds=hidden).logits
    forward = counter.get_flop_counts()["Global"]
    linear = sum(
        count for operation, count in forward.items() if "mm" in str(operation) and "bmm" not in str(operation)
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert output.shape == (1, tokens, model.config.vocab_size)
    work = step_work(model)
    assert work is not None
    # Frozen: the backward computes the gradient of the input alone, which is as much again.
    assert work.of(tokens, tokens, 0) == 2 * linear
    # Attention: two products of the pairs, over all channels of two layers, once forward and twice backward.
    assert work.of(0, 0, 10) == 10 * 2 * 64 * (2 * 2) * 3


def test_a_mixture_of_experts_has_no_known_work() -> None:
    config = SimpleNamespace(to_dict=lambda: {"num_local_experts": 8})
    config.get_text_config = lambda: config
    model: Any = SimpleNamespace(config=config)
    assert step_work(model) is None
    assert StepWork(2.0, 3.0, 5.0).of(10, 4, 7) == 67.0


def test_cards_are_known_by_their_whole_names() -> None:
    assert peak_of_card("NVIDIA H200") == 989.4e12
    assert peak_of_card("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_of_card("NVIDIA H100 PCIe") == 756e12
    assert peak_of_card("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of_card("NVIDIA L40S") == 362e12
    assert peak_of_card("NVIDIA L4") == 121e12
    assert peak_of_card("NVIDIA A10") == 125e12
    assert peak_of_card("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_of_card("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    for unknown in ("NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce GTX 1080", "NVIDIA H100", "AMD Instinct MI300X"):
        assert peak_of_card(unknown) is None, unknown


# ------------------------------------------------------------------ what is shown


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_sft.training import display as module

    clock = iter([0.0, 0.0, 5.0, 21.0, 22.0, 23.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    display = Display(10, 2, said.append)
    display.open()
    display.update(3, "loss 3")
    display.update(4, "loss 2")
    display.update(5, "loss 2")
    display.say("a message")
    display.update(10, "loss 1")
    display.close()
    assert said == ["step 4/10: loss 2, 01:03 left", "a message", "step 10/10: loss 1"]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_one_line_that_messages_do_not_tear(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    display = Display(10, 0, lambda text: print(text, file=sys.stderr))
    display.open()
    display.update(3, "loss 3, held-out chat 2.5")
    display.say("a message")
    display.update(10, "loss 1")
    display.close()
    drawn = capsys.readouterr().err
    assert "\ra message" in drawn.replace(" ", "").replace("amessage", "a message")
    assert "10/10" in drawn
    assert "loss 1" in drawn


@pytest.mark.parametrize(
    ("where", "encoding"),
    [("terminal", "utf-8"), ("terminal", "latin-1"), ("notebook", "utf-8"), ("log", "utf-8")],
)
def test_a_terminal_or_notebook_that_can_shows_the_course_of_the_loss(
    where: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    import sys

    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(err, "isatty", lambda: where == "terminal", raising=False)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr("qlora_sft.training.display.in_notebook", lambda: where == "notebook")
    display = Display(40, 0, lambda text: print(text, file=err))
    display.open()
    for step in range(1, 41):
        display.update(step, f"loss {41 - step}", None if step == 7 else float(41 - step))
    display.close()
    err.flush()
    drawn = err.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "loss 1" in drawn
    shows = where != "log" and encoding == "utf-8"
    assert ("▁" in drawn) == shows
    assert not shows or "█▇▆▅▄▃▂▁" in "".join(dict.fromkeys(drawn.rsplit("step/s, ", 1)[-1])) + drawn


@pytest.mark.parametrize("steps", [1, 2, 15, 16, 17, 500, 100_001])
def test_the_course_of_a_loss_keeps_few_numbers(steps: int) -> None:
    course = Course()
    for step in range(steps):
        course.add(float(-step))
    drawn = course.drawn()
    assert len(drawn) == (0 if steps < 2 else len(drawn)) <= 2 * SPARKS
    assert steps < SPARKS or len(drawn) >= SPARKS
    assert list(drawn) == sorted(drawn, reverse=True)
    assert not drawn or (drawn[0], drawn[-1]) == ("█", "▁")


def test_held_out_losses_in_few_words() -> None:
    from qlora_sft.training.evaluations import EvaluationRow

    few = EvaluationRow(1, {"a": 1.0, "b": None}, None, False, 0.0)
    many = EvaluationRow(1, dict.fromkeys("abcd", 1.5), 1.5, False, 0.0)
    assert (held_out_briefly(few), held_out_briefly(many)) == ("held-out a 1.000", "held-out mean 1.500")
