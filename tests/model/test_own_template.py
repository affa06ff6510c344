"""A template of one's own: the control tokens that it writes are found, added, trained, saved and found again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests_support import bare_base

from qlora_sft.chat.models import prompt_text
from qlora_sft.config import ModelConfig
from qlora_sft.data.render import render_conversation
from qlora_sft.data.shipped import SHIPPED, template_text
from qlora_sft.data.template import apply, choose_chat_format
from qlora_sft.data.written_tokens import written_tokens
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.model.load import load_for_inference
from qlora_sft.model.tokenizer import load_tokenizer, stop_token_ids
from qlora_sft.model.vocabulary import new_rows
from qlora_sft.prepare import prepare
from qlora_sft.run_data import saved_text
from qlora_sft.train import train

# Roles are put together, and the marks of thoughts stand where only a row with reasoning comes.
OWN = (
    "{# a comment may name <|anything|> #}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}{% if message.role == 'assistant' %}{% generation %}"
    "{% if message.reasoning %}{{ '<|thinking|>' + message.reasoning + '<|/thinking|>' }}{% endif %}"
    "{{ message.content + '<|done|>' }}{% endgeneration %}{% else %}{{ message.content + '<|done|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKS = ["<|user|>", "<|done|>", "<|assistant|>", "<|system|>", "<|thinking|>", "<|/thinking|>", "<|tool|>"]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"why {n}?"},
            {"role": "assistant", "content": f"because {n}", "reasoning": "hm"},
        ]
    }
    for n in range(8)
]


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_what_the_shipped_templates_write_is_found_by_rendering_them(name: str) -> None:
    found = written_tokens(template_text(name))
    assert set(SHIPPED[name].control) <= set(found.control)
    # Phi's has a token for the role of tools, which its own vocabulary has not.
    assert set(found.control) - set(SHIPPED[name].control) <= {"<|tool|>", "<|tool_response|>", "<|tool_call|>"}
    assert found.end == SHIPPED[name].end


def test_a_template_that_renders_nothing_is_read() -> None:
    assert written_tokens("{{ raise_exception('no') }}{{ '<|x|>' }}{{ '<|' + a + '|>' }}").control == ("<|x|>",)
    assert written_tokens("{% for m in %}<|x|>").control == ("<|x|>",)
    assert written_tokens("<think>{{ messages[0].content }}</think> a <| b |>").control == ()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_they_are_added_trained_saved_and_found_again(
    make_config: Any, tmp_path: Path, small_tokenizer: Any, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = bare_base(tmp_path / "base", small_tokenizer, tied, room=3)
    (tmp_path / "own.jinja").write_text(OWN)
    config = make_config(
        f"model.path={base}", f"model.chat_template={tmp_path / 'own.jinja'}", "model.new_tokens=['<|python_start|>']",
        "training.max_steps=2", "training.learning_rate=1e-2", rows=ROWS,
    )  # fmt: skip
    said: list[str] = []
    train(config, say=said.append)
    first = len(small_tokenizer)
    rows = list(range(first, first + len(MARKS) + 1))
    assert f"vocabulary: {', '.join([*MARKS, '<|python_start|>'])} added, because chat_template=" in "\n".join(said)
    assert new_rows(config.model, str(base)) == rows
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert all(each == rows for each in adapter["trainable_token_indices"].values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    assert tokenizer.convert_tokens_to_ids([*MARKS, "<|python_start|>"]) == rows
    assert tokenizer.eos_token == "<|done|>"

    trained = load_for_inference(tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_input_embeddings().weight
    after = trained.get_base_model().get_input_embeddings().weight
    assert torch.equal(after[:first], plain[:first])
    written = [rows[MARKS.index(mark)] for mark in ("<|user|>", "<|assistant|>", "<|thinking|>", "<|/thinking|>")]
    assert ((after[written] - plain[:first].mean(0)).abs().amax(1) > 1e-4).all()
    if not tied:  # in a tied one every row is a row of the head, and moves as such
        torch.testing.assert_close(after[rows[-1]], plain[:first].mean(0))

    # The template may be gone when the run is used.
    (tmp_path / "own.jinja").unlink()
    assert saved_text(tmp_path / "run").stop_token_ids == {0, rows[1]}
    assert load_for_inference(tmp_path / "run").generation_config.eos_token_id == [0, rows[1]]


def test_each_is_one_token_and_only_what_the_model_writes_is_trained(
    make_config: Any, tmp_path: Path, small_tokenizer: Any
) -> None:
    base = bare_base(tmp_path / "base", small_tokenizer, tied=True, room=0)
    (tmp_path / "own.jinja").write_text(OWN)
    config = make_config(f"model.path={base}", f"model.chat_template={tmp_path / 'own.jinja'}", rows=ROWS)
    data = prepare(config, quiet, unsloth=False)
    tokenizer = data.tokenizer
    document = data.documents[0]
    pieces = ["<|user|>", "why", "?", "<|done|>", "<|assistant|>", "<|thinking|>", "hm", "<|/thinking|>", "<|done|>"]
    text = tokenizer.decode(document.input_ids)
    assert all(piece in text for piece in pieces)
    assert [i for i in document.input_ids if i >= len(small_tokenizer)] == tokenizer.convert_tokens_to_ids(
        [piece for piece in pieces if piece.startswith("<|")]
    )
    trained = tokenizer.decode([i for i, w in zip(document.input_ids, document.weights, strict=True) if w])
    assert trained.startswith("<|thinking|>hm<|/thinking|>because")
    assert trained.endswith("<|done|>")
    # What a user types is text.
    typed = {"messages": [{"role": "user", "content": "<|thinking|>"}, {"role": "assistant", "content": "no"}]}
    ids = render_conversation(typed, tokenizer, chat_format=data.chat_format).input_ids
    assert tokenizer.convert_tokens_to_ids("<|thinking|>") not in ids


def test_a_base_that_has_them_gets_none_and_stops_where_it_is_told(
    make_config: Any, tiny_model: Path, tmp_path: Path, short_tokenizer: Any
) -> None:
    chatml = template_text("chatml").replace("<|im_end|>", "<|endoftext|>")
    (tmp_path / "own.jinja").write_text(chatml)
    config = make_config(f"model.chat_template={tmp_path / 'own.jinja'}")
    assert new_rows(config.model, str(tiny_model)) == []
    tokenizer = load_tokenizer(config.model, str(tiny_model))
    assert len(tokenizer) == len(short_tokenizer)
    assert stop_token_ids(config.model, str(tiny_model), tokenizer) == {short_tokenizer.eos_token_id}


LLAMA_2 = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("new", [[], ["[INST]"]])
def test_marks_that_the_base_was_taught_as_text_stay_text(
    make_config: Any, tmp_path: Path, small_tokenizer: Any, new: list[str]
) -> None:
    """As with Llama 2's template, to which somebody has added the marks of what is generated."""
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template = LLAMA_2.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    base = bare_base(tmp_path / "base", tokenizer, tied=True, room=3)
    (tmp_path / "own.jinja").write_text(LLAMA_2)
    config = make_config(
        f"model.path={base}", f"model.chat_template={tmp_path / 'own.jinja'}", f"model.new_tokens={new}"
    )
    first = len(tokenizer)
    assert new_rows(config.model, str(base)) == list(range(first, first + len(new)))
    assert len(load_tokenizer(config.model, str(base))) == first + len(new)


def test_new_tokens_alone_are_added_to_the_bases_own_template(make_config: Any, tiny_model: Path) -> None:
    config = make_config("model.new_tokens=['<|python_start|>', '<|im_end|>']")
    said: list[str] = []
    tokenizer = load_tokenizer(config.model, str(tiny_model), said.append)
    assert new_rows(config.model, str(tiny_model)) == [len(tokenizer) - 1]
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) == "<|python_start|>"
    assert said[0].startswith(
        "vocabulary: <|python_start|> added, as model.new_tokens asks and this base has them not;"
    )
    with pytest.raises(ConfigError, match=r"model\.new_tokens must be texts without spaces, got 'a b', ''"):
        make_config("model.new_tokens=['a b', '']")


def test_marks_of_a_template_in_a_file_of_the_processors_stay_text(
    make_config: Any, tmp_path: Path, small_tokenizer: Any
) -> None:
    base = bare_base(tmp_path / "base", small_tokenizer, tied=True, room=3)
    (tmp_path / "own.jinja").write_text(LLAMA_2)
    config = make_config(f"model.path={base}", f"model.chat_template={tmp_path / 'own.jinja'}")
    assert new_rows(config.model, str(base))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": LLAMA_2}))
    assert new_rows(config.model, str(base)) == []
    assert len(load_tokenizer(config.model, str(base))) == len(small_tokenizer)


# As SmolVLM's: goes through the parts of a content, and writes those of text.
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_the_template_of_a_processor_is_found_and_gets_the_texts_in_parts(small_tokenizer: Any, tmp_path: Path) -> None:
    base = bare_base(tmp_path / "base", small_tokenizer, tied=True, room=0)
    with pytest.raises(DataError, match="no chat template"):
        choose_chat_format(load_tokenizer(ModelConfig(str(base)), str(base)))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    tokenizer = load_tokenizer(ModelConfig(str(base)), str(base))
    assert tokenizer.chat_template == PARTS
    row = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]}
    written = apply(cast(Any, row), tokenizer, PARTS)[0]
    assert written == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>\n"
    assert prompt_text(row["messages"][:1], PARTS, {}, None) == (
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    (base / "chat_template.json").write_text("{")
    with pytest.raises(ConfigError, match=r"chat_template\.json: damaged"):
        load_tokenizer(ModelConfig(str(base)), str(base))


# As PARTS, but what a system says is written as it is, and so is what an assistant says before it calls a tool.
MIXED = (
    "{% for message in messages %}{{ '<' + message.role + '>' }}{% if message.role == 'system' or message.tool_calls %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def test_only_roles_whose_texts_are_written_in_parts_get_parts(small_tokenizer: Any) -> None:
    system, user, answer, tool = (
        {"role": role, "content": text}
        for role, text in (("system", "be {brief}"), ("user", "why?"), ("assistant", "so"), ("tool", "4"))
    )
    row: Any = {"messages": [system, user, answer]}
    assert apply(row, small_tokenizer, MIXED)[0] == "<system>be {brief}<user>why?<assistant>so"
    assert prompt_text([system, user], MIXED, {}, None) == "<system>be {brief}<user>why?"
    calling = {**answer, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(DataError, match="writes a text of 'assistant' as a list of parts"):
        apply(cast(Any, {"messages": [user, calling, tool]}), small_tokenizer, MIXED)
    empty: Any = {"messages": [user, {**calling, "content": ""}, tool]}
    assert apply(empty, small_tokenizer, MIXED)[0] == "<user>why?<assistant><tool>4"
    about = {"role": "assistant", "content": str({"type": "text", "text": "why?"})}
    assert about["content"] in apply(cast(Any, {"messages": [user, about]}), small_tokenizer, MIXED)[0]
    as_json = MIXED.replace("{{ message.content }}", "{{ message.content | tojson }}")
    with pytest.raises(DataError, match="as a list of parts"):
        apply(cast(Any, {"messages": [user, calling]}), small_tokenizer, as_json)
