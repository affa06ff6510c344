"""Loss and distance of texts, with the adapter and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_sft.data.render import Rendered
from qlora_sft.errors import RunError
from qlora_sft.evaluation import drift
from qlora_sft.evaluation.drift import divergence, read, readable


@pytest.fixture
def adapted(tiny_model: Path) -> Any:
    """The tiny model with an adapter that does nothing yet."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    return get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")).eval()


def disturb(model: Any, size: float) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)


DOCUMENT = Rendered(list(range(10, 50)), [0.0] * 5 + [1.0] * 20 + [0.5] * 15, "t")


def test_an_adapter_that_does_nothing_has_not_moved(adapted: Any) -> None:
    reading = read(adapted, DOCUMENT, torch.float32, with_base=True)
    assert reading.loss == reading.base_loss
    assert reading.kl == 0.0
    assert reading.weight == 27.5


def test_loss_and_distance_are_those_of_the_textbook(adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(adapted, 0.3)
    monkeypatch.setattr(drift, "POSITIONS", 7)
    reading = read(adapted, DOCUMENT, torch.float32, with_base=True)
    ids = torch.tensor([DOCUMENT.input_ids])
    weights = torch.tensor(DOCUMENT.weights[1:], dtype=torch.float64)
    with torch.no_grad():
        tuned = adapted(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        with adapted.disable_adapter():
            base = adapted(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    nll = -tuned[torch.arange(39), ids[0, 1:]]
    kl = (base.exp() * (base - tuned)).sum(-1)
    assert reading.loss == pytest.approx(float((nll * weights).sum() / weights.sum()), rel=1e-5)
    assert reading.kl == pytest.approx(float((kl * weights).sum() / weights.sum()), rel=1e-4)
    assert reading.kl > 1e-4
    assert read(adapted, DOCUMENT, torch.float32, with_base=False).loss == reading.loss


def test_divergence_is_zero_only_between_equals_and_never_negative() -> None:
    p, q = torch.randn(600, 50), torch.randn(600, 50)
    assert float(divergence(p, p).abs().max()) == 0.0
    assert float(divergence(p, q).min()) > 0


def test_long_texts_are_cut_and_those_without_labels_left_out() -> None:
    long = Rendered([1] * 3000, [0.0] * 2500 + [1.0] * 500, "t")
    assert readable(long) is None
    kept = readable(Rendered([1] * 3000, [1.0] * 3000, "t"))
    assert kept
    assert len(kept.input_ids) == drift.TOKENS
    assert readable(Rendered([1], [1.0], "t")) is None


def test_a_model_that_overflows_is_not_graded(adapted: Any) -> None:
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(torch.nan)
    for with_base in (False, True):
        with pytest.raises(RunError, match=r"not numbers \(NaN\)"):
            read(adapted, DOCUMENT, torch.float32, with_base=with_base)
