"""Answers do not depend on what they are generated beside, nor on how much room there is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.errors import RunError
from qlora_sft.evaluation import generate as module
from qlora_sft.evaluation.generate import Generated, batches, generate
from qlora_sft.say import progress


@pytest.fixture
def model(convertible_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(convertible_model).eval()


PROMPTS = [list(range(5, 5 + length)) for length in (3, 40, 7, 7, 21, 12, 30)]


def greedy(model: Any, tokenizer: Any, stops: Collection[int] = (2,)) -> list[Generated]:
    return generate(model, tokenizer, PROMPTS, 5, torch.float32, stops)


@given(st.lists(st.integers(1, 9000), max_size=200), st.integers(0, 4000))
def test_batches_hold_every_prompt_once_and_keep_their_bounds(lengths: list[int], new: int) -> None:
    prompts = [[0] * length for length in lengths]
    parts = batches(prompts, new)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        longest, shortest = (end(lengths[i] for i in part) + new for end in (max, min))
        assert len(part) == 1 or (len(part) <= module.PROMPTS and len(part) * longest <= module.TOKENS)
        assert longest <= module.PADDING * shortest


def test_padding_changes_no_answer(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = greedy(model, tokenizer)
    monkeypatch.setattr(module, "PROMPTS", 1)
    assert greedy(model, tokenizer) == together
    assert all(len(answer.ids) == 5 for answer in together)


def test_a_bar_counts_the_tokens_and_appears_only_if_it_takes_long(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy(model, tokenizer)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "progress", lambda *what: progress(*what, delay=0))
    greedy(model, tokenizer)
    assert "7 answers" in capsys.readouterr().err
    counted = []
    monkeypatch.setattr(module, "progress", lambda total, *_: counted.append(progress(total, "", "")) or counted[0])
    greedy(model, tokenizer)
    assert (counted[0].n, counted[0].total) == (35, 35)


def test_an_answer_ends_before_its_stop(model: Any, tokenizer: Any) -> None:
    full = greedy(model, tokenizer)
    stop = full[1].ids[3]
    ended = greedy(model, tokenizer, {stop})
    assert ended[1] == Generated(full[1].ids[: full[1].ids.index(stop)], True)
    assert not full[1].ended


def test_a_batch_that_finds_no_room_is_halved(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = greedy(model, tokenizer)
    sizes = []

    def crowded(**options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return own(**options)

    own = model.generate
    monkeypatch.setattr(model, "generate", crowded)
    assert greedy(model, tokenizer) == wanted
    assert max(sizes) > 2
    assert sum(size for size in sizes if size <= 2) == 7


def test_no_room_for_one_answer_names_the_cure(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(RunError, match="no room for 45 tokens of one question and its answer; lower max_new_tokens"):
        greedy(model, tokenizer)


@pytest.mark.parametrize("adapted", [False, True])
def test_what_the_model_was_published_with_has_no_say(model: Any, tokenizer: Any, adapted: bool) -> None:
    wanted = greedy(model, tokenizer)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 2
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert greedy(model, tokenizer) == wanted
    assert model.generation_config.repetition_penalty == 5.0


def test_sampling_draws_from_the_whole_distribution(model: Any, tokenizer: Any) -> None:
    """First tokens of 2,000 samples against the softmax at that temperature: no top-k, no top-p."""
    prompt, temperature = PROMPTS[1], 0.1
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    torch.manual_seed(0)
    drawn = generate(model, tokenizer, [prompt] * 2000, 1, torch.float32, {2}, temperature)
    counts = torch.bincount(torch.tensor([answer.ids[0] for answer in drawn if answer.ids]), minlength=len(p))
    likely = p.topk(20).indices
    expected = p[likely] * 2000
    assert float(((counts[likely] - expected) / expected.sqrt()).abs().max()) < 4
    different = float((1 - (1 - p) ** 2000).sum())
    assert different > 60
    assert int((counts > 0).sum()) == pytest.approx(different, rel=0.1)
