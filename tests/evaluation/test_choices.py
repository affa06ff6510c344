"""The letters' probabilities, in padded batches and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_sft.data.template import choose_chat_format
from qlora_sft.errors import DataError, RunError
from qlora_sft.evaluation.choices import choose, letter_prompts, next_logits
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.generate import generate, left_padded
from qlora_sft.evaluation.tasks import LETTERS, Item


def item(number: int, options: int = 4) -> Item:
    text = f"Question {number}: " + "why " * (number * 3) + "\n\nAnswer with the letter only."
    return Item(f"t:{number}", {"messages": [{"role": "user", "content": text}]}, reference="A", options=options)


@pytest.fixture
def model(convertible_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(convertible_model).eval()


def test_a_letter_is_what_the_answer_begins_with(tokenizer: Any) -> None:
    prompts, letters = letter_prompts([item(1), item(2)], tokenizer, choose_chat_format(tokenizer))
    assert tokenizer.decode(letters) == "ABCD"
    assert tokenizer.decode(prompts[0]).endswith("<|im_start|>assistant\n")


def test_padded_batches_give_the_logits_of_each_alone(model: Any, tokenizer: Any) -> None:
    prompts, _ = letter_prompts([item(i) for i in range(6)], tokenizer, choose_chat_format(tokenizer))
    with torch.no_grad():
        together = next_logits(model, *left_padded(prompts, 0, model.device))
        alone = [model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_the_chosen_letter_is_the_likeliest_of_those_that_stand_there(model: Any, tokenizer: Any) -> None:
    items = [item(i, options=2 + i % 3) for i in range(9)]
    prompts, letters = letter_prompts(items, tokenizer, choose_chat_format(tokenizer))
    chosen = choose(model, tokenizer, items, prompts, letters, torch.float32, {2})
    for each, prompt, (letter, first) in zip(items, prompts, chosen, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        best = max(range(each.options), key=lambda i: float(logits[letters[i]]))
        assert letter == LETTERS[best]
        assert first == (int(logits.argmax()) == letters[best])


def test_a_model_that_would_begin_with_the_letter_has_said_it(model: Any, tokenizer: Any) -> None:
    prompts, letters = letter_prompts([item(1)], tokenizer, choose_chat_format(tokenizer))
    # The head is the embedding: a row in the direction of the last hidden state has the largest logit.
    with torch.no_grad():
        state = model.model(input_ids=torch.tensor([prompts[0]])).last_hidden_state[0, -1]
        model.lm_head.weight[letters[2]] = 100 * state
    assert choose(model, tokenizer, [item(1)], prompts, letters, torch.float32, {2}) == [("C", True)]


def test_a_tokenizer_that_cannot_tell_letters_apart_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_sft.evaluation import choices

    monkeypatch.setattr(choices, "answered", lambda *_: ([1], [7]))
    with pytest.raises(DataError, match="t:1: answers with different letters begin with the same token"):
        letter_prompts([item(1)], tokenizer, choose_chat_format(tokenizer))


def test_a_model_that_overflows_is_not_graded(model: Any, tokenizer: Any) -> None:
    """Its first option, or the first token of the vocabulary, would be taken for the likeliest."""
    chat_format = choose_chat_format(tokenizer)
    prompts, letters = letter_prompts([item(1)], tokenizer, chat_format)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(RunError, match=r"not numbers \(NaN\)"):
        choose(model, tokenizer, [item(1)], prompts, letters, torch.float32, {2})
    with pytest.raises(RunError, match=r"not numbers \(NaN\)"):
        generate(EvaluatedModel(model, tokenizer, chat_format, torch.float32), prompts, 3)
