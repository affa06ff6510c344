"""Convert tool calls and descriptions of tools, as people write them, to OpenAI's
``{type: function, function: {...}}``."""

from __future__ import annotations

from qlora_sft.data.conversation import FunctionCall, ToolCall
from qlora_sft.data.values import EMPTY, anything, from_json_text, idle_keys, joined, kind, only, short, without
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject

_ARGUMENTS = ("arguments", "parameters", "input", "args")
_CALL_KEYS = {"id", "call_id", "tool_call_id", "type", "index", "function", "name", *_ARGUMENTS}
# Anthropic's and MCP's names of the schema.
_SCHEMA = ("parameters", "input_schema", "inputSchema")
_FUNCTION_KEYS = {"name", "description", *_SCHEMA}


def read_calls(calls: object, unused: set[str]) -> list[ToolCall]:
    """Reads tool calls from a list, or the JSON text of one, of OpenAI calls or of bare ``{name, arguments}``.

    Keys that hold something and are not used are added to ``unused``. Raises `DataError`.
    """
    calls = anything(calls, "'tool_calls'")
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise DataError(f"'tool_calls' must be a list of calls, got {kind(calls)}")
    return [read_call(call, unused) for call in calls]


def read_call(call: object, unused: set[str]) -> ToolCall:
    """Reads one call. Its arguments become an object, which is empty if there are none; its id becomes a text.

    Raises `DataError`.
    """
    call = from_json_text(call, "a tool call")
    fields = _flat(call) if isinstance(call, dict) else {}
    name = fields.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"a tool call needs a function with a 'name' and 'arguments', got {short(call)}")
    idle = idle_keys(fields, _CALL_KEYS, "tool call key")
    arguments = _arguments(fields, name)
    if not arguments and idle:
        what = ", ".join(sorted(idle))
        raise DataError(f"the call of {name!r} has no 'arguments', but the {what}; rename or remove it")
    unused |= idle
    # OpenAI's newer form has two ids; results name the call_id.
    given = only(fields, "call_id", "tool_call_id")
    identity = read_id(fields.get("id") if given is None else given, "the id of a tool call")
    function: FunctionCall = {"name": name, "arguments": arguments}
    call_read: ToolCall = {"type": "function", "function": function}
    return {"id": identity, **call_read} if identity else call_read


def read_id(value: object, what: str) -> str | None:
    """Returns an id as a text, because some files have numbers; None if it is empty. Raises `DataError`."""
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise DataError(f"{what} has the wrong type: {value!r}; it must be a text or a whole number")
    return None if value in EMPTY else str(value)


def _flat(call: JsonObject) -> JsonObject:
    """Returns the call's fields and those of its ``function`` in one; the latter may be a name alone, or JSON text."""
    function = call.get("function")
    if isinstance(function, str):
        function = from_json_text(function, "a tool call") if function.lstrip().startswith("{") else {"name": function}
    if not isinstance(function, dict):
        return call
    return joined(function, without(call, {"function", "type"}))


def _arguments(fields: JsonObject, name: str) -> JsonObject:
    """Returns the arguments as an object.

    OpenAI sends an empty text for a function without parameters; others send null or an empty list.
    """
    what = f"the arguments of {name!r}"
    given = {key: anything(fields[key], f"{what}: the text") for key in _ARGUMENTS if key in fields}
    arguments = only(given, *_ARGUMENTS)
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise DataError(f"{what} must be an object or JSON text of one, got {kind(arguments)}")
    return arguments


# ------------------------------------------------------------------ descriptions


def read_tools(tools: object) -> list[JsonObject]:
    """Reads tool descriptions from a list or from JSON text.

    Bare functions get OpenAI's ``{type, function}`` around them, because that is how they arrive at inference. The
    schema stands under ``parameters``, where templates look for it. Raises `DataError`.
    """
    tools = anything(tools, "'tools'")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise DataError(f"'tools' must be a list of functions or JSON text of one, got {kind(tools)}")
    return [_tool(from_json_text(tool, "one of 'tools'")) for tool in tools]


def _tool(tool: object) -> JsonObject:
    fields: JsonObject = tool if isinstance(tool, dict) else {}
    function = fields.get("function", fields)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"each of 'tools' needs a function with a 'name', got {short(tool)}")
    if function is fields:
        # OpenAI's flat form and Anthropic's say the type beside the name.
        plain = fields.get("type") in (None, "function", "custom")
        return {"type": "function", "function": _with_schema(without(fields, {"type"} if plain else set()))}
    outside = {key: value for key, value in fields.items() if key in _FUNCTION_KEYS}
    return {**without(fields, _FUNCTION_KEYS), "function": _with_schema(joined(function, outside))}


def _with_schema(function: JsonObject) -> JsonObject:
    """Returns the function with its schema as an object under ``parameters``, whatever it was called.

    A schema that is null or an empty list is removed, and so is every other key that is null.
    """
    function = {key: value for key, value in function.items() if value is not None or key in _SCHEMA}
    what = f"the schema of the tool {function['name']!r}"
    given = {key: _schema(function[key], what) for key in _SCHEMA if key in function}
    schema = only(given, *_SCHEMA)
    if schema is None and {} in given.values():
        schema = {}  # there are no parameters
    if schema is None:
        return without(function, set(_SCHEMA))
    place = next(key for key in function if key in given and given[key] == schema)
    kept = without(function, set(_SCHEMA) - {place})
    return {("parameters" if key == place else key): schema if key == place else kept[key] for key in kept}


def _schema(value: object, what: str) -> JsonObject | None:
    value = None if value == "" else from_json_text(value, what)
    if value is None or value == []:
        return None
    if not isinstance(value, dict):
        raise DataError(f"{what} must be an object or JSON text of one, got {kind(value)}")
    return value
