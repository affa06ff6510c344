"""Write code that an assistant runs inside its answer, and what came out of it (nanochat's form).

An answer may be made of parts: ``text``, ``python`` and ``python_output``. The model writes the code, with the marks
around it; the output is put in by what runs the code, so it is never supervised, and neither are its marks. The marks
are nanochat's. They are control tokens where the vocabulary has them, and text elsewhere.

While the template runs, a private-use character stands for each mark. So the bounds of an output are known whatever the
template writes around it, and no mark that somebody typed is taken for one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from qlora_sft.data.conversation import CodePart, Conversation, Message
from qlora_sft.errors import DataError

MARKS = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}
_PLACED = {mark: chr(0xFFFF1 + number) for number, mark in enumerate(mark for pair in MARKS.values() for mark in pair)}
_OUTPUT_START, _OUTPUT_END = (_PLACED[mark] for mark in MARKS["python_output"])


def spelled(parts: list[CodePart]) -> str:
    """Returns the content that the parts are, with their marks as text."""
    return "".join(_marked(part, MARKS) for part in parts)


def without_beginning(parts: list[CodePart], content: str) -> list[CodePart]:
    """Returns the parts without what stands before ``content``, which is the end of what they spell.

    Raises `DataError` if that is more than text.
    """
    if not spelled(parts).endswith(content):
        raise DataError("the reasoning cannot be told apart from the parts; give it as a part of type 'reasoning'")
    gone = len(spelled(parts)) - len(content)
    first, *others = parts
    if gone and (first["type"] != "text" or gone > len(first["text"])):
        raise DataError("reasoning goes over several parts; give it as a part of type 'reasoning'")
    rest: CodePart = {**first, "text": first["text"][gone:]}
    return [rest, *others] if rest["text"] or first["type"] != "text" else others


def placed(conversation: Conversation) -> Conversation:
    """Returns the conversation with a private-use character for every mark; itself if no answer is made of parts.

    Raises `DataError` if a text has such a character.
    """
    messages = conversation["messages"]
    if not any("parts" in message for message in messages):
        return conversation
    if _marks_in(json.dumps(conversation, ensure_ascii=False)):
        raise DataError("a row with code parts has private-use characters (U+FFFF1 to U+FFFF4); remove them")
    return {**conversation, "messages": [_placed(message) for message in messages]}


def check_placed(conversation: Conversation, text: str, bounds: dict[int, tuple[int, int]]) -> None:
    """Raises `DataError` unless every mark of ``conversation`` is in ``text`` once, in order, and in its own turn.

    bounds: the first and the last character but one of each supervised turn, by its message.
    """
    if _marks_in(text) != "".join(_marks_in(message["content"]) for message in conversation["messages"]):
        raise DataError("the chat template rewrites an answer with code parts; use another model.chat_template")
    for index, (start, end) in bounds.items():
        if _marks_in(text[start:end]) != _marks_in(conversation["messages"][index]["content"]):
            raise DataError(f"message {index}: the chat template writes its code outside of the turn; use another one")


def outputs_apart(text: str) -> Iterator[tuple[str, bool]]:
    """Yields ``text`` in pieces with the marks spelled, and whether each is an output. No piece is empty."""
    before, *outputs = text.split(_OUTPUT_START)
    if before:
        yield _with_marks(before), False
    for each in outputs:
        output, _, behind = each.partition(_OUTPUT_END)
        yield _with_marks(_OUTPUT_START + output + _OUTPUT_END), True
        if behind:
            yield _with_marks(behind), False


def _placed(message: Message) -> Message:
    if "parts" not in message:
        return message
    characters = {kind: (_PLACED[start], _PLACED[end]) for kind, (start, end) in MARKS.items()}
    changed: Message = {**message, "content": "".join(_marked(part, characters) for part in message["parts"])}
    changed.pop("parts", None)  # which a template might read
    return changed


def _marked(part: CodePart, marks: dict[str, tuple[str, str]]) -> str:
    start, end = marks.get(part["type"], ("", ""))
    return start + part["text"] + end


def _marks_in(text: str) -> str:
    return "".join(character for character in text if character in _PLACED.values())


def _with_marks(text: str) -> str:
    for mark, character in _PLACED.items():
        text = text.replace(character, mark)
    return text
