"""A tokenizer that is changed between two renderings renders as if it had never been asked before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from tests_support import vocabulary_without

from qlora_sft.data.render import render_conversation, render_prompt
from qlora_sft.data.template import choose_chat_format

PROMPTED = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == "assistant" -%}
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{% else %}{{ message.content }}<|im_end|>
{% endif %}{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{{ cls_token }}{% endif %}"""
"""A template whose generation prompt ends in a token that it takes from the tokenizer."""

ROW = {
    "messages": [
        {"role": "user", "content": "Say <|tool|> and hello"},
        {"role": "assistant", "content": "hello <|tool|>"},
    ]
}


def adds(*tokens: str, **flags: bool) -> Callable[[Any], None]:
    """Returns a change that adds tokens, special ones unless ``flags`` say otherwise."""
    from tokenizers import AddedToken

    special = flags.pop("special", True)

    def change(tokenizer: Any) -> None:
        new = [AddedToken(token, special=special, normalized=False, **flags) for token in tokens]
        tokenizer.add_tokens(new, special_tokens=special)

    return change


def names_another_cls(tokenizer: Any) -> None:
    tokenizer.cls_token = "<|im_end|>"


CHANGES = {
    "a new control token": adds("<|tool|>"),
    "a word of the vocabulary becomes special": adds("hello"),
    "a token that swallows spaces": adds("hello", lstrip=True, special=False),
    "another special token in the template": names_another_cls,
}


@pytest.fixture
def changing(own_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(own_tokenizer)
    tokenizer.chat_template = PROMPTED
    tokenizer.cls_token = "<|im_start|>"
    return tokenizer


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_tokenizer_renders_as_a_new_one(changing: Any, change: Callable[[Any], None]) -> None:
    def rendered(tokenizer: Any) -> tuple[object, ...]:
        row, prompt = render_conversation(ROW, tokenizer), {"messages": ROW["messages"][:1]}
        return row, row.notes, render_prompt(prompt, tokenizer, choose_chat_format(tokenizer))

    before = rendered(changing)
    change(changing)
    new = copy.deepcopy(changing)
    new.chat_template += "{# " + uuid4().hex + " #}"  # a template that nobody can know anything of
    assert rendered(changing) == rendered(new) != before


def test_a_control_token_that_is_added_later_stays_text_in_a_message(changing: Any) -> None:
    render_conversation(ROW, changing)
    adds("<|tool|>")(changing)
    ids = render_conversation(ROW, changing).input_ids
    assert changing.convert_tokens_to_ids("<|tool|>") not in ids
    assert changing.decode(ids).count("<|tool|>") == 2


def test_a_character_is_no_longer_lost_when_it_gets_a_token() -> None:
    lacking = vocabulary_without("ä")  # which spells the byte that 中 and 一 begin with
    assert render_conversation({"text": "中一"}, lacking).lost == {"中": 1, "一": 1}
    adds("中", special=False)(lacking)
    assert render_conversation({"text": "中一"}, lacking).lost == {"一": 1}
