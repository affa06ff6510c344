"""Answers do not depend on what they are generated beside, nor on how much room there is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import RunError
from qlora_sft.evaluation import generate as module
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.generate import Drawn, batches, generate
from qlora_sft.evaluation.kept import Generated, KeptAnswers
from qlora_sft.say import progress


@pytest.fixture
def model(convertible_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(convertible_model).eval()


PROMPTS = [list(range(5, 5 + length)) for length in (3, 40, 7, 7, 21, 12, 30)]


def asked(model: Any, tokenizer: Any, stops: Collection[int] = (2,)) -> EvaluatedModel:
    return EvaluatedModel(model, tokenizer, ChatFormat("", "a test", frozenset(stops)), torch.float32)


def greedy(model: Any, tokenizer: Any, stops: Collection[int] = (2,)) -> list[Generated]:
    return generate(asked(model, tokenizer, stops), PROMPTS, 5)


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
    with pytest.raises(
        RunError, match="not enough memory for the 45 tokens of one question and its answer; lower max_new_tokens"
    ):
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


def test_the_entropy_is_that_of_every_next_token(model: Any, tokenizer: Any) -> None:
    """Of the answer as a whole, read once more without padding; drawn or not, before the temperature."""
    for drawn in (None, Drawn(0.5, 0)):
        for prompt, answer in zip(PROMPTS, generate(asked(model, tokenizer), PROMPTS, 5, drawn), strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
            wanted = float(torch.distributions.Categorical(logits=logits.float()).entropy().mean())
            assert answer.entropy == pytest.approx(wanted, rel=1e-4)
    stop = generate(asked(model, tokenizer), PROMPTS, 5)[1].ids[3]
    ended = generate(asked(model, tokenizer, {stop}), PROMPTS, 5)[1]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPTS[1], *ended.ids]])).logits[0, len(PROMPTS[1]) - 1 :]
    wanted = float(torch.distributions.Categorical(logits=logits.float()).entropy().mean())
    assert ended.entropy == pytest.approx(wanted, rel=1e-4)


def test_sampling_draws_from_the_whole_distribution(model: Any, tokenizer: Any) -> None:
    """First tokens of 2,000 samples against the softmax at that temperature: no top-k, no top-p."""
    prompt, temperature = PROMPTS[1], 0.1
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    drawn = generate(asked(model, tokenizer), [prompt] * 2000, 1, Drawn(temperature, 0))
    counts = torch.bincount(torch.tensor([answer.ids[0] for answer in drawn if answer.ids]), minlength=len(p))
    likely = p.topk(20).indices
    expected = p[likely] * 2000
    assert float(((counts[likely] - expected) / expected.sqrt()).abs().max()) < 4
    different = float((1 - (1 - p) ** 2000).sum())
    assert different > 60
    assert int((counts > 0).sum()) == pytest.approx(different, rel=0.1)


@pytest.mark.parametrize("drawn", [None, Drawn(1.5, 3)])
def test_what_is_interrupted_goes_on_to_the_same_answers(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Drawn | None
) -> None:
    """The second of several batches ends the process in the middle of a line; nothing that was answered is lost."""
    monkeypatch.setattr(module, "PROMPTS", 2)
    evaluated, kept, calls, own = asked(model, tokenizer), KeptAnswers(tmp_path / "kept.jsonl"), [], model.generate
    whole = generate(evaluated, PROMPTS, 5, drawn)
    before = torch.get_rng_state()

    def interrupted(**options: Any) -> Any:
        calls.append(len(options["input_ids"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(**options)

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(evaluated, PROMPTS, 5, drawn, kept)
    assert len(kept.read()) == calls[0]
    with kept.file.open("a") as file:
        file.write('{"prompt": 1, "ids": [4')
    calls.extend([0, 0])
    assert generate(evaluated, PROMPTS, 5, drawn, kept) == whole
    assert sum(calls[4:]) == len(PROMPTS) - calls[0]
    assert generate(evaluated, PROMPTS, 5, drawn, kept) == whole
    assert sum(calls[4:]) == len(PROMPTS) - calls[0]
    assert torch.equal(torch.get_rng_state(), before)
