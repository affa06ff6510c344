"""Hold a conversation on the terminal (``qlora-sft chat``). What answers is opened in `models`."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from qlora_sft.chat.speaker import Messages, Speaker
from qlora_sft.errors import ContextFull
from qlora_sft.json_types import JsonObject
from qlora_sft.say import Say, tell

HELP = """/system TEXT   answer under this system text (without TEXT: under none)
/think on|off  set the template's thinking mode (/think auto: leave it to the template)
/reset         forget the conversation, keep the system text
/help          this
/exit          end (so does the end of input); Ctrl-C stops an answer"""


@dataclass
class ChatSession:
    """Holds what the next answer depends on."""

    system: str | None = None
    think: bool | None = None
    turns: Messages = field(default_factory=list)

    @property
    def messages(self) -> Messages:
        """Returns the system message, if there is one, and all turns."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)


def chat(
    model: str,
    message: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    *,
    show: Callable[[str], None] | None = None,
) -> JsonObject:
    """Answers ``message``, or holds a conversation until the end of input or ``/exit``. Answers are greedy.

    ``show`` gets the answers piece by piece (default: stdout). Returns the whole conversation.
    """
    from qlora_sft.chat.models import opened

    talk = ChatSession(system)
    with opened(Path(model).expanduser(), max_new_tokens) as speaker:
        if message is not None:
            answer(speaker, talk, message, show or _on_stdout, raising=True)
        else:
            converse(speaker, talk, lines(), show or _on_stdout)
    return {"messages": talk.messages}


def converse(
    speaker: Speaker, talk: ChatSession, typed: Iterator[str], show: Callable[[str], None], say: Say = tell
) -> None:
    """Answers every line that was typed, and obeys commands, until ``/exit`` or the end of input."""
    for line in typed:
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text.startswith("/"):
            command(talk, text, say)
        elif text:
            answer(speaker, talk, text, show, say)


def command(talk: ChatSession, text: str, say: Say) -> None:
    """Obeys a command; ``/exit`` is handled by `converse`."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    modes = {"on": True, "off": False, "auto": None}
    if name == "/system":
        talk.system = rest or None
        say("system text set" if rest else "no system text")
    elif name == "/reset":
        talk.turns.clear()
        say("forgotten; the system text is kept" if talk.system else "forgotten")
    elif name == "/think" and rest in modes:
        talk.think = modes[rest]
        say(f"thinking: {rest}")
    elif name == "/help":
        say(HELP)
    else:
        say(f"{text}: no such command\n{HELP}")


def answer(
    speaker: Speaker,
    talk: ChatSession,
    text: str,
    show: Callable[[str], None],
    say: Say = tell,
    raising: bool = False,
) -> None:
    """Adds the question and its answer to the session; neither, if the question no longer fits the context."""
    question: JsonObject = {"role": "user", "content": text}
    try:
        with interruptible() as stopped:
            said = speaker([*talk.messages, question], talk.think, show, stopped)
    except ContextFull as error:
        if raising:
            raise
        say(f"{error}; /reset forgets the conversation")
        return
    show("\n")
    talk.turns += [question, {"role": "assistant", "content": said.text}]
    for call in tool_calls(said.text):
        say(f"[tool call, not carried out] {call}")
    if said.ended == "length":
        say("(cut off: --max-new-tokens allows more, as long as the context does)")
    elif said.ended == "interrupt":
        say("(stopped)")


def tool_calls(text: str) -> list[str]:
    """Returns ``name(arguments)`` of every call in an answer, in the forms of the shipped templates."""
    blocks = re.findall(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", text, flags=re.S)
    blocks += re.findall(r"^\s*(\{.*\})\s*$", text, flags=re.S)
    mistral = re.search(r"\[TOOL_CALLS\]\s*(\[.*\])", text, flags=re.S)
    found = []
    for block in [*blocks, *([mistral[1]] if mistral else [])]:
        try:
            content = json.loads(block)
        except ValueError:
            continue
        for call in content if isinstance(content, list) else [content]:
            arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
            if arguments is not None and "name" in call:
                found.append(f"{call['name']}({json.dumps(arguments, ensure_ascii=False)})")
    return found


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; a second Ctrl-C ends the program."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return

    def stop(*_: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """Yields what is typed. On a terminal there is a prompt and a history."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then has a history)
    tell("/help for help")
    while True:
        try:
            yield input("> ")
        except EOFError:
            tell("")
            return
        except KeyboardInterrupt:
            tell("\n(/exit to end)")


def _on_stdout(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
