"""A question becomes the tokens that training would have put before its answer, and an answer its text."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import TaskConfig
from qlora_sft.data.render import render_conversation
from qlora_sft.data.shipped import FOLDER
from qlora_sft.data.template import ChatFormat, choose_chat_format
from qlora_sft.evaluation.answers import prompts_of
from qlora_sft.evaluation.ask import decoded, encode_task
from qlora_sft.evaluation.prompt import prompt_of
from qlora_sft.evaluation.tasks import Item, Task


@pytest.mark.parametrize("template", ["qwen3", "chatml-think", "llama3"])
def test_a_question_is_put_as_training_would_put_it(template: str, own_tokenizer: Any) -> None:
    """Templates write more before an answer than their generation prompt: qwen3's an empty thought."""
    tokenizer = copy.deepcopy(own_tokenizer)
    tokenizer.chat_template = (FOLDER / f"{template}.jinja").read_text()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<think>", "</think>"]})
    chat_format = choose_chat_format(tokenizer, {tokenizer.convert_tokens_to_ids("<|eot_id|>")})
    asked = {"messages": [{"role": "user", "content": "How much is 1 and 1?"}]}
    answer = {"role": "assistant", "content": "Two."}
    whole = render_conversation({"messages": [*asked["messages"], answer]}, tokenizer, chat_format=chat_format)
    prompt = prompt_of(Item("t:1", asked, answer), "auto", tokenizer, chat_format)
    assert prompt == prompts_of(whole)[0].input_ids
    if template == "qwen3":
        task = Task("t", "exact", [Item("t:1", asked, answer)], TaskConfig("t"))
        assert encode_task(task, tokenizer, chat_format, tokenizer, 2048).thoughtless == 1
        asked["chat_template_kwargs"] = {"enable_thinking": False}
        assert encode_task(task, tokenizer, chat_format, tokenizer, 2048).thoughtless == 0
        del asked["chat_template_kwargs"]
        assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
        thinking = prompt_of(Item("t:1", asked, answer), "on", tokenizer, chat_format)
        assert tokenizer.decode(thinking).endswith("<|im_start|>assistant\n")


def test_earlier_turns_of_a_question_are_those_that_a_runtime_shows(own_tokenizer: Any) -> None:
    """The exported template leaves the reasoning of earlier turns out; the training version, with marks, keeps it."""
    header, end = "<|im_start|>{{ m.role }}\n", "<|im_end|>"
    said = "{% if THINKS %}<think>{{ m.reasoning }}</think>{% endif %}{{ m.content }}" + end
    keeps, forgets = said.replace("THINKS", "m.reasoning"), said.replace("THINKS", "m.reasoning and loop.last")
    generated = "{% generation %}" + keeps + "{% endgeneration %}"
    marked = "{% if m.role == 'assistant' %}" + generated + "{% else %}" + keeps + "{% endif %}"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    training, exported = (
        "{% for m in messages %}" + header + turn + "\n{% endfor %}" + prompt for turn in (marked, forgets)
    )
    stops = frozenset({own_tokenizer.convert_tokens_to_ids(end)})
    chat_format = ChatFormat(training, "", stops, original=exported)
    earlier = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", "reasoning": "r1"},
        {"role": "user", "content": "q2"},
    ]
    item = Item("t:1", {"messages": earlier}, {"role": "assistant", "content": "a2", "reasoning": "r2"})
    shown = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
    for thinking in ("auto", "on"):
        ids = prompt_of(item, thinking, own_tokenizer, chat_format)
        assert own_tokenizer.decode(ids) == shown + "<|im_start|>assistant\n"
    kept = prompt_of(item, "auto", own_tokenizer, replace(chat_format, original=None))
    assert "<think>r1</think>a1" in own_tokenizer.decode(kept)


def test_the_space_an_answer_begins_with_is_kept(tmp_path: Path) -> None:
    """A SentencePiece decoder takes away the space that its encoder puts before every text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "\n": 1, "\u2581\u2581\u2581\u2581return": 2, "\u25812": 3}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert tokenizer.decode([2, 3]) == "   return 2"
    assert decoded(tokenizer, [0, 1], [2, 3]) == "    return 2"
