"""The conversation on the terminal: with a model that is made up, then with small real ones in both runtimes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.chat.speaker import Messages, Said
from qlora_sft.chat.terminal import ChatSession, answer, chat, converse, tool_calls
from qlora_sft.errors import ConfigError, ContextFull, RunError


class Echo:
    """Says back what it was asked; remembers everything it was given."""

    def __init__(self, ended: str = "stop", text: str | None = None):
        self.given: list[tuple[Messages, bool | None]] = []
        self.ended, self.text = ended, text

    def __call__(
        self, messages: Messages, think: bool | None, show: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Said:
        self.given.append((messages, think))
        text = self.text or f"you said {messages[-1]['content']}"
        for piece in text.split(" "):
            show(piece)
        return Said(text, self.ended)


def talk(*typed: str, speaker: Any = None, conversation: ChatSession | None = None) -> tuple[Any, str, list[str]]:
    speaker, shown, said = speaker or Echo(), [], []  # type: ignore[var-annotated]
    converse(speaker, conversation or ChatSession(), iter(typed), shown.append, said.append)
    return speaker, "|".join(shown), said


def test_every_answer_sees_the_whole_conversation() -> None:
    speaker, shown, said = talk("one\n", "\n", "two\n")
    assert shown == "you|said|one|\n|you|said|two|\n"
    assert [message["content"] for message in speaker.given[1][0]] == ["one", "you said one", "two"]
    assert said == []


def test_commands_change_what_the_next_answer_depends_on() -> None:
    speaker, _, said = talk(
        "/system Be brief.", "a", "/think on", "/reset", "b", "/system", "/think auto", "c", "/exit", "d"
    )
    first, second, third = speaker.given
    assert first == ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}], None)
    assert second == ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}], True)
    assert [message["role"] for message in third[0]] == ["user", "assistant", "user"]
    assert third[1] is None
    assert len(said) == 5


def test_a_mistyped_command_is_not_sent_to_the_model() -> None:
    speaker, _, said = talk("/sytem x", "/think maybe", "/help")
    assert speaker.given == []
    assert all("/reset" in line for line in said)
    assert "/sytem x: no such command" in said[0]


def test_a_full_context_is_said_and_costs_nothing() -> None:
    def full(*_: Any) -> Said:
        raise ContextFull("the conversation has 600 tokens, the context 512")

    conversation = ChatSession()
    _, _, said = talk("a", "/reset", speaker=full, conversation=conversation)
    assert "600 tokens" in said[0]
    assert "/reset" in said[0]
    assert conversation.messages == []
    with pytest.raises(ContextFull):
        answer(full, conversation, "a", lambda _: None, raising=True)


def test_tool_calls_are_shown_and_not_carried_out() -> None:
    text = 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": {"b": "ö"}}}\n</tool_call>'
    _, _, said = talk("a", speaker=Echo(text=text))
    assert said == ['[tool call, not carried out] f({"a": {"b": "ö"}})']
    assert tool_calls('{"name": "g", "parameters": {"x": 1}}') == ['g({"x": 1})']
    assert tool_calls('[TOOL_CALLS][{"name": "h", "arguments": {}, "id": "000000001"}]') == ["h({})"]
    assert tool_calls('{"city": "Rome"} <tool_call>broken</tool_call> [TOOL_CALLS][1, 2]') == []


def test_ctrl_c_stops_the_answer_and_not_the_conversation() -> None:
    class Endless(Echo):
        def __call__(self, messages: Messages, think: Any, show: Any, stopped: Callable[[], bool]) -> Said:
            if messages[-1]["content"] != "go on":
                return super().__call__(messages, think, show, stopped)
            show("on and")
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 10
            while not stopped() and time.monotonic() < deadline:
                time.sleep(0.01)
            return Said("on and", "interrupt" if stopped() else "length")

    before = signal.getsignal(signal.SIGINT)
    speaker, shown, said = talk("go on", "b", speaker=Endless())
    assert said == ["(stopped)"]
    assert shown.endswith("you|said|b|\n")
    assert speaker.given[0][0][1] == {"role": "assistant", "content": "on and"}
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_that_was_cut_off_says_so() -> None:
    assert "--max-new-tokens" in talk("a", speaker=Echo(ended="length"))[2][0]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run folder"):
        chat(str(tmp_path), "hi")
    with pytest.raises(ConfigError, match="no such file"):
        chat(str(tmp_path / "x.gguf"), "hi")
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(RunError, match="not a whole GGUF"):
        chat(str(tmp_path / "x.gguf"), "hi")


# ------------------------------------------------------------------ real ones, tiny


@pytest.fixture(scope="module")
def model(convertible_model: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the template for thinking, and a context of 256 tokens."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(convertible_model, folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    return folder


@pytest.fixture(scope="module")
def gguf(model: Path) -> Path:
    from qlora_sft.export.llama_cpp import convert

    convert(model, model.with_suffix(".gguf"), "f32")
    return model.with_suffix(".gguf")


def test_both_runtimes_are_asked_in_the_same_words(model: Path, gguf: Path, tokenizer: Any) -> None:
    from qlora_sft.chat.models import gguf_facts, prompt_text

    facts = gguf_facts(gguf)
    assert facts.context == 256
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for think, mode in ((None, {}), (True, {"enable_thinking": True}), (False, {"enable_thinking": False})):
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **mode)
        assert prompt_text(messages, facts.template, facts.tokens, think) == wanted
        assert prompt_text(messages, tokenizer.chat_template, tokenizer.special_tokens_map, think) == wanted


def test_both_runtimes_give_the_same_answer(model: Path, gguf: Path) -> None:
    answers = []
    for path in (model, gguf):
        shown: list[str] = []
        messages = chat(str(path), "Why is the sky blue?", "Be brief.", 12, show=shown.append)["messages"]
        assert "".join(shown) == messages[-1]["content"] + "\n"
        assert len(shown) > 3, "it did not come piece by piece"
        answers.append(messages)
    assert answers[0] == answers[1]
    assert [message["role"] for message in answers[0]] == ["system", "user", "assistant"]


def test_both_runtimes_notice_a_full_context(model: Path, gguf: Path) -> None:
    for path in (model, gguf):
        with pytest.raises(ContextFull, match="256"):
            chat(str(path), "why? " * 300, show=lambda _: None)


def test_both_runtimes_stop_when_asked(model: Path, gguf: Path) -> None:
    from qlora_sft.chat.models import opened

    for path in (model, gguf):
        shown: list[str] = []
        with opened(path, 100) as speaker:
            said = speaker([{"role": "user", "content": "a"}], None, shown.append, lambda seen=shown: len(seen) >= 3)
        assert said.ended == "interrupt"
        assert 3 <= len(shown) < 10


def test_lines_from_a_pipe_and_one_json_document(gguf: Path) -> None:
    command = [sys.executable, "-m", "qlora_sft", "chat", str(gguf), "--max-new-tokens", "3", "--json"]
    result = subprocess.run(command, input="/system s\na\nb\n", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    messages = json.loads(result.stdout)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]


def test_the_server_speaks_openais_protocol_on_this_machine_only(gguf: Path) -> None:
    from qlora_sft.chat.serve import serve

    said: list[str] = []
    ended, started = threading.Event(), threading.Event()

    def say(text: str) -> None:
        said.append(text)
        started.set()

    thread = threading.Thread(target=serve, args=(gguf, 0, say, ended))
    thread.start()
    try:
        assert started.wait(60)
        address = said[0].split(" answers at ")[1].split(" ")[0]
        assert address.startswith("http://127.0.0.1:")
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            content = json.load(response)
        assert content["choices"][0]["message"]["role"] == "assistant"
        assert content["usage"]["completion_tokens"] == 4
    finally:
        ended.set()
        thread.join(30)
    assert not thread.is_alive()


def test_a_port_that_is_taken_is_an_error(gguf: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "qlora_sft", "chat", str(gguf), "--serve", "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert f"port {port} is taken" in result.stderr
