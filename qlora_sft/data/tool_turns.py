"""Put tool results behind their calls, in the order of the calls.

Most templates write no ids, so a model reads the results of several calls in the order of the calls. Results get that
order here by id, else by name, else as they stand. What cannot be told apart is a `DataError`.
"""

from __future__ import annotations

import json

from qlora_sft.data.conversation import Message, ToolCall, function_of
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject

REORDERED = "rows whose tool results were put into the order of their calls"
JOINED = "rows whose neighbouring turns with tool calls were joined into one"
TOGETHER = "rows with one result for several tool calls, taken for that of all of them"
WITHOUT_RESULT = "rows with tool calls that have no result, although more turns follow"
WITHOUT_CALL = "rows with tool results behind a text without tool_calls"
OTHER_NAME = "rows with a tool result whose name is not that of its call"
UNDECLARED = "rows that call a tool which is not among their tools"
UNANSWERED = "rows whose last turn is not the assistant's, so that nothing answers it"


def paired(messages: list[Message], notes: set[str], together: bool = False) -> list[Message]:
    """Returns the messages with every tool call followed by its results in order, each with the id of its call.

    Remarkable facts that are not faults are added to ``notes``. Several calls may have one result if it is a list of as
    many, or if ``together`` says so, as ShareGPT has it. Raises `DataError` for a result that belongs to no call, and
    for a call that lacks one where others of its turn have theirs.
    """
    if not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return messages
    messages = _joined(messages, notes)
    result: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        end = position + 1
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        group, last = messages[position + 1 : end], end == len(messages)
        if message["role"] == "tool":
            raise DataError(f"message {position}: a tool result that follows no call; put it behind its call")
        result.append(message)
        try:
            if message.get("tool_calls"):
                result += _in_order(message["tool_calls"], group, last, together, notes)
            else:
                result += _without_call(message, group, notes)
        except DataError as error:
            raise DataError(f"message {position + bool(group)}: {error}") from None
        position = end
    return result


def undeclared(messages: list[Message], tools: list[JsonObject]) -> bool:
    """Says whether a tool is called that is not among ``tools``."""
    names = {function_of(tool).get("name") for tool in tools}
    return any(_name(call) not in names for message in messages for call in message.get("tool_calls") or [])


def _joined(messages: list[Message], notes: set[str]) -> list[Message]:
    """Joins neighbouring turns of the assistant that call tools before any result into one turn with parallel calls.

    In a chat nothing stands between them either. Raises `DataError` for turns that cannot be one, since nobody could
    tell whose results would follow.
    """
    calling = [message["role"] == "assistant" and bool(message.get("tool_calls")) for message in messages]
    result: list[Message] = []
    for number, message in enumerate(messages):
        before: Message = result[-1] if result else {"role": "", "content": ""}
        next_other = next((n for n in range(number, len(messages)) if not calling[n]), len(messages))
        answered = next_other < len(messages) and messages[next_other]["role"] == "tool"
        if not (calling[number] and before.get("tool_calls") and answered):
            result.append(message)
            continue
        alike = all(message.get(key) == before.get(key) for key in ("train", "weight", "name"))
        if not alike or message.get("content") or message.get("reasoning"):
            raise DataError(
                f"message {number}: calls tools before the calls of the turn before it have their results; put each "
                "result behind its call, or all calls into one turn"
            )
        result[-1] = {**before, "tool_calls": [*before["tool_calls"], *message["tool_calls"]]}
        notes.add(JOINED)
    return result


def _without_call(message: Message, results: list[Message], notes: set[str]) -> list[Message]:
    """Returns results behind a text that calls no tool, because some data sets spell calls out in the text.

    Raises `DataError` for any other result without a call.
    """
    if results:
        named = next((each["tool_call_id"] for each in results if each.get("tool_call_id")), None)
        if named is not None:
            raise DataError(f"a tool result for the call {named!r}, but the message before it calls no tool")
        if message["role"] != "assistant" or not message.get("content"):
            raise DataError("a tool result that follows no call; put it behind its call")
        notes.add(WITHOUT_CALL)
    return results


def _in_order(
    calls: list[ToolCall], results: list[Message], last: bool, together: bool, notes: set[str]
) -> list[Message]:
    """Returns the results in the order of the calls. ``last``: no message follows them."""
    if not results:
        if not last:
            notes.add(WITHOUT_RESULT)
        return []
    if (
        len(calls) > 1
        and len(results) == 1
        and not _says_whose(results[0])
        and (together or _count(results[0]["content"]) == len(calls))
    ):
        notes.add(TOGETHER)
        return results
    places: dict[int, int] = {}  # number of a call -> number of its result
    for number in sorted(range(len(results)), key=lambda n: _says_whose(results[n]), reverse=True):
        place = _place(results[number], calls, places)
        places[place] = number
        if results[number].get("name") not in (None, _name(calls[place])):
            notes.add(OTHER_NAME)
    missing = next((number for number in range(len(calls)) if number not in places), len(calls))
    if missing < len(calls) and not (last and missing == len(places)):
        raise DataError(f"the call of {_name(calls[missing])!r} has no result, but another of its turn has; add it")
    order = [places[number] for number in sorted(places)]
    if order != sorted(order):
        notes.add(REORDERED)
    return [_with_id(results[places[n]], calls[n]) for n in sorted(places)]


def _place(result: Message, calls: list[ToolCall], places: dict[int, int]) -> int:
    """Returns the number of the call that the result belongs to."""
    identity, name = result.get("tool_call_id"), result.get("name")
    fits = [n for n, call in enumerate(calls) if not identity or call.get("id") == identity]
    if not fits:
        has = ", ".join(repr(call.get("id")) for call in calls)
        raise DataError(f"a tool result for the call {identity!r}, but the calls before it have the ids {has}; mend it")
    if identity and len(fits) > 1:
        raise DataError(f"{len(fits)} calls of one turn have the id {identity!r}; give each its own")
    fits = [n for n in fits if n not in places and (identity or not name or _name(calls[n]) == name)]
    if not fits:
        whose = f" for the call {identity!r}" if identity else f" of {name!r}" if name else ""
        raise DataError(f"a tool result{whose} too many: there is no such call before it, or it has one; remove it")
    return fits[0]


def _count(content: str) -> int:
    """Returns how many results a text is the JSON list of; 0 if it is none."""
    try:
        found = json.loads(content) if content.lstrip().startswith("[") else None
    except json.JSONDecodeError:
        return 0
    return len(found) if isinstance(found, list) else 0


def _says_whose(result: Message) -> int:
    return 2 if result.get("tool_call_id") else 1 if result.get("name") else 0


def _with_id(result: Message, call: ToolCall) -> Message:
    return {**result, "tool_call_id": call["id"]} if call.get("id") else result


def _name(call: ToolCall) -> str:
    return str(function_of(call).get("name", ""))
