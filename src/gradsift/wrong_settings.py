"""What is wrong with a setting, in plain words: what was expected, what was found, and where.

What was expected is read off the JSON schema of the settings, so that it always says all that is
allowed, whichever of its rules a value breaks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from gradsift.errors import nearest, shorten, suggest, suggest_share

_FLAGS = {
    "method": "--method",
    "model": "--model",
    "model.name": "--model",
    "data": "--pool and --target",
    "data.pool": "--pool",
    "data.targets": "--target NAME=FILE",
    "warmup.adapter": "--adapter",
    "warmup.mode": "--warmup",
    "warmup.seed": "--seed",
    "less.seed": "--seed",
    "influence.seed": "--seed",
    "random.seed": "--seed",
    "seed": "--seed",
    "policy.budget": "--budget",
    "policy.name": "--name",
    "engine.executor": "--engine",
    "engine.memory": "--memory",
    "engine.ray_address": "--ray-address",
    "engine.workers": "--workers",
    "tests": "--test NAME=FILE",
    "methods": "--method",
    "budgets": "--budget",
    "seeds": "--seeds",
    "warmup_seeds": "--warmup-seeds",
    "quantiles": "--quantiles",
    "full": "--full",
    "lds.measure": "--lds",
    "lm_eval": "--lm-eval",
    "examples": "--examples",
    "eigenvectors": "--eigenvectors",
    "probes": "--probes",
}
_PATHS = "a path or Hub id, or a list of them"
_IN_WORDS = {  # where the schema says less than the setting takes
    "data.pool": _PATHS,
    "data.targets": f"a name for each target with {_PATHS}",
    "data.columns": "a column for each field, such as {prompt: question}",
    "tests": f"the name of each target with {_PATHS}",
    "gist.rank": "'auto', 'full', a share such as 95%, or a count of at least 1",
    "engine.memory": "'auto' or a size such as 8GiB",
    "policy.source_cap": "a share such as 20%, or one for each source such as {dolly: 10%}",
}
_REPLACED = {  # settings of earlier versions, and what to say of them
    "micro_batch_size": "micro_batch_tokens takes its place and counts padded tokens, not examples",
}
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "nothing",
    "object": "values by their names",
}
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}


def describe_errors(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]
) -> list[str]:
    """Return what is wrong with each setting that a model refuses, one line for each."""
    schema, lines = model.model_json_schema(), dict[str, str]()
    for item in error.errors():
        where, node, is_whole = _find(schema, item["loc"])
        if item["type"] in ("extra_forbidden", "invalid_key"):
            line = _unknown([*map(str, item["loc"])], node)
            lines[line] = line
        else:  # of several kinds that a setting may have, each tells why it is not it
            found = item["input"] if is_whole else _at(values, where, item["input"])
            lines.setdefault(".".join(where), _wrong(dict(item), where, found, (schema, node)))
    return [*lines.values()]


def _wrong(
    item: dict[str, Any], where: list[str], found: Any, schemas: tuple[Mapping[str, Any], Any]
) -> str:
    """Return what is wrong with one setting, given its schema within that of all settings."""
    if item["loc"] and item["loc"][-1] == "[key]":
        return f"{_named(where[:-1])}: expected a name that is text, found {found!r}; quote it"
    if item["type"] == "missing":
        flag = _FLAGS.get(".".join(where))
        return f"missing setting {'.'.join(where)!r}" + (f": give {flag}" if flag else "")
    if item["type"] == "value_error" and where != ["gist", "rank"]:  # which tells but a part
        message = item["msg"].removeprefix("Value error, ")
        told = "" if "found " in message else f" (found {_shown(found)})"
        return f"{_named(where)}: {message}{told}" if where else message
    wanted = _IN_WORDS.get(".".join(where)) or _in_words(*schemas)
    return f"{_named(where)}: expected {wanted}, found {_shown(found)}{_hint(found, wanted)}"


def _find(schema: Mapping[str, Any], loc: tuple[Any, ...]) -> tuple[list[str], Any, bool]:
    """Return the path of a setting, its schema, and whether the place is it and no part of it."""
    node, path = dict(schema), list[str]()
    for number, part in enumerate(loc):
        if part in node.get("properties", {}):
            node = node["properties"][part]
        elif isinstance(part, int) and "items" in node:
            node = node["items"]
            continue  # an element is told by its value
        elif isinstance(node.get("additionalProperties"), dict) and part != "[key]":
            node = node["additionalProperties"]
        else:
            return path, node, number == len(loc) - 1 and part == "[key]"
        path.append(str(part))
        node = _resolved(schema, node)
    return path, node, True


def _resolved(schema: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref", "").rpartition("/")[2]
    return dict(schema["$defs"][reference] if reference else node)


def _at(values: Any, path: list[str], default: Any) -> Any:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return default
        values = values[part]
    return values


def _named(path: list[str]) -> str:
    name = shorten(".".join(path))
    flag = _FLAGS.get(name)
    return f"{name} ({flag})" if flag else name


def _unknown(path: list[str], section: Mapping[str, Any]) -> str:
    *above, name = path
    known = {other: ".".join([*above, other]) for other in section.get("properties", {})}
    near = nearest(name, known)
    hint = f"; did you mean {known[near]!r}?" if near else ""
    hint = f"; {_REPLACED[name]}" if name in _REPLACED else hint
    where = shorten(".".join(path))
    return f"unknown setting {where!r}{hint} (known: {', '.join(known.values())})"


def _in_words(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Return what a schema allows."""
    node = _resolved(schema, node)
    if "anyOf" in node:
        return " or ".join(_in_words(schema, option) for option in node["anyOf"])
    if "enum" in node:
        return f"one of {', '.join(map(repr, node['enum']))}"
    if "const" in node:
        return repr(node["const"])
    if "properties" in node:
        names = [*node["properties"]]
        return f"its settings by their names ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
    if "items" in node:
        element = _in_words(schema, node["items"])
        each = {"text": "texts"}.get(element, f"which each is {element}")
        return f"a list of {each}"
    bounds = [f"{words} {node[key]:,}" for key, words in _BOUNDS.items() if key in node]
    kind = "text that is not empty" if node.get("minLength") else _KINDS[node["type"]]
    return " ".join(filter(None, (kind, " and ".join(bounds))))


def _hint(found: Any, wanted: str) -> str:
    """Return the choice, or the share, that may have been meant."""
    choices = re.findall("'([^']+)'", wanted)
    hint = suggest(found, choices) if isinstance(found, str) else ""
    return hint or (suggest_share(found) if " share " in wanted else "")


def _shown(value: Any) -> str:
    """Return a value as a settings file would have it."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return shorten(repr(value))
