"""From a row of any known schema to one conversation: a list of messages with role and content."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gradsift.errors import shorten

Message = dict[str, Any]
"""One turn as a chat template takes it: `role`, `content`, and whatever else came with it.

`content` is a text, a list of parts of type text, or nothing beside `tool_calls`.
"""


def text_of(message: Message) -> str:
    """Return all that a turn says: its text, or that of its parts, and its tool calls as JSON.

    >>> text_of({"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]})
    '[{"name": "add"}]'
    """
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    if message.get("tool_calls"):
        parts.append(json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True))
    return "\n".join(filter(None, parts))


def as_text(messages: Sequence[Message], characters: int) -> str:
    """Return a conversation as plain lines, each turn cut to `characters`.

    >>> as_text([{"role": "user", "content": "How are you?"}], 7)
    '[user] How are …'
    """
    lines = []
    for message in messages:
        text = text_of(message)
        end = " …" if len(text) > characters else ""
        lines.append(f"[{message['role']}] {text[:characters]}{end}")
    return "\n".join(lines)


class UnusableRowError(ValueError):
    """A row that cannot become an example; its text is the reason given to the user."""

    def __init__(self, reason: str) -> None:
        """Keep the reason, cut to a length that a log can hold."""
        super().__init__(shorten(reason))


_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


# what a file's columns must hold for each schema, the most telling first
_SCHEMAS = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "prompt-completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
}
EXPECTED = (
    "messages; prompt + completion; instruction (+ input) + output; conversations; or map your "
    "columns, for example --set data.columns.prompt=question --set data.columns.completion=answer"
)


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with the mapped columns under their field names, all others kept."""
    return {**row, **{field: row[name] for field, name in columns.items() if name in row}}


def detect(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the name of the schema that the row fits once renamed, mapped columns first.

    >>> detect({"instruction": "Add.", "output": "2"}, {})
    'alpaca'
    """
    mapped = {field for field, name in columns.items() if name in row}
    for present in (mapped, rename(row, columns).keys()):
        for schema, required in _SCHEMAS.items():
            if required <= present:
                return schema
    return None


def to_messages(row: Mapping[str, Any], schema: str) -> list[Message]:
    """Return the conversation of a (renamed) row.

    Raises:
        UnusableRowError: If a part is missing or of the wrong kind, a role is unknown, or no
            assistant turn has text.
    """
    required = _SCHEMAS[schema]
    if not required <= row.keys():
        raise UnusableRowError(
            f"the file's schema is {schema} ({_listed(required)}), this row has {_listed(row)}"
        )
    messages = _PARSERS[schema](row)
    if row.get("system") and schema != "messages" and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    if not any(m["role"] == "assistant" and text_of(m).strip() for m in messages):
        turns = [m["role"] for m in messages]
        raise UnusableRowError(f"no assistant turn with text (turns: {', '.join(turns) or 'none'})")
    return messages


def to_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of a (renamed) row, in any schema: a list, or one written as JSON.

    Raises:
        UnusableRowError: If they are neither.
    """
    if row.get("functions"):
        raise UnusableRowError("the row's 'functions' are not read; give them as 'tools'")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise UnusableRowError(f"tools is not valid JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRowError(f"tools is {_kind(tools)}, expected a list of objects")
    return tools


def _from_messages(row: Mapping[str, Any], field: str = "messages") -> list[Message]:
    return [
        _message(turn, "role", "content", number, {role: role for role in _ROLES})
        for number, turn in enumerate(_turns(row[field], field), start=1)
    ]


def _from_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns = list(enumerate(_turns(row["conversations"], "conversations"), start=1))
    return [_message(turn, "from", "value", number, _SHAREGPT_ROLES) for number, turn in turns]


def _from_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[field], list):
            messages += _from_messages(row, field)
        else:
            messages.append({"role": role, "content": _text(row[field], field)})
    return messages


def _from_alpaca(row: Mapping[str, Any]) -> list[Message]:
    if row.get("history"):
        raise UnusableRowError("earlier turns in 'history' are not read; use the messages schema")
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row["output"], "output")},
    ]


_PARSERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt-completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
}


def _turns(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UnusableRowError(f"{field} is {_kind(value)}, expected a list of turns")
    return value


def _message(
    turn: Any, role_key: str, content_key: str, number: int, roles: Mapping[str, str]
) -> Message:
    if not isinstance(turn, dict) or role_key not in turn:
        raise UnusableRowError(
            f"turn {number} is {_kind(turn)}, expected an object with {role_key!r}"
        )
    role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        found = shorten(repr(turn[role_key]), 60)
        raise UnusableRowError(
            f"unknown role {found} in turn {number}, expected one of {_listed(roles)}"
        )
    # tables fill what a turn does not have with nothing, some exports with no calls
    others = {key: value for key, value in turn.items() if value is not None}
    if others.get("tool_calls") == []:
        del others["tool_calls"]
    others.pop(role_key)
    content, calls = others.pop(content_key, None), others.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UnusableRowError(f"tool_calls of turn {number} is {_kind(calls)}, expected a list")
    _check_content(content, f"{content_key} of turn {number}", bool(others.get("tool_calls")))
    return others | {"role": role, "content": content}


def _check_content(content: Any, what: str, may_be_empty: bool) -> None:
    """Make sure that a turn's content is text.

    Raises:
        UnusableRowError: If it is something else, or a part of it is.
    """
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                found = _kind(part) if kind is None else f"of type {shorten(repr(kind), 60)}"
                raise UnusableRowError(f"a part of the {what} is {found}, expected text alone")
            _text(part.get("text"), f"a part of the {what}")
    elif content is not None or not may_be_empty:
        _text(content, what)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UnusableRowError(f"{what} is {_kind(value)}, expected text")
    return value


def _kind(value: Any) -> str:
    if value is None or value == []:
        return "empty"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
