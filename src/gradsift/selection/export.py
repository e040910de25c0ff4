"""Entries by which other trainers find the picks: LLaMA-Factory's and axolotl's.

TRL and `datasets` need none: they read `selected/NAME.jsonl` as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gradsift.methods.job import Job
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.selection.picks import read_selection

logger = logging.getLogger(__name__)

_PLAIN = "{instruction}"


def export_picks(job: Job) -> None:
    """Write beside the picks of a run the entries by which other trainers find them."""
    schemas = {}
    for name in job.targets:
        rows = read_selection(job.folder.path, name).picks["row"].to_numpy()
        schemas[name] = set(job.pool.take(rows, ["schema"])["schema"].to_pylist())
    export_entries(job.folder.path, schemas, job.config.data.columns)


def export_entries(
    run: Path, schemas: Mapping[str, Collection[str]], columns: Mapping[str, str]
) -> None:
    """Write `dataset_info.json` (LLaMA-Factory) and `axolotl.yaml` beside the picks.

    `schemas`: those of each target's picks. `columns` maps fields to the pool's own columns. Picks
    of several schemas or names of roles, and prompts that are lists of turns, have no entry, and
    the log says so.
    """
    factory: dict[str, Any] = {}
    axolotl = []
    for name, found in schemas.items():
        path = run / layout.picks(name)
        entries = _entries(path, found, columns)
        if entries is None:
            logger.warning("%s: no trainer reads these rows in one go; no entry is written", path)
            continue
        factory[f"gradsift_{name}"] = {"file_name": path.name, **entries[0]}
        axolotl.append({"path": str(path), "ds_type": "json", **entries[1]})
    content = json.dumps(factory, indent=2).encode() + b"\n"
    write_atomically(run / layout.LLAMA_FACTORY_ENTRIES, content)
    content = yaml.safe_dump({"datasets": axolotl}, sort_keys=False).encode()
    write_atomically(run / layout.AXOLOTL_ENTRIES, content)


def _entries(
    path: Path, schemas: Collection[str], columns: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return what LLaMA-Factory and axolotl have to know of the file."""
    if len(schemas) != 1:
        return None
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    schema, system = next(iter(schemas)), columns.get("system", "system")
    entries = _FORMATS[schema](rows, columns)
    if entries is None or schema == "messages" or not any(row.get(system) for row in rows):
        return entries
    factory, axolotl = entries
    if "messages" in factory["columns"]:  # a column beside the turns, which axolotl does not read
        return None
    kind = axolotl["type"] if isinstance(axolotl["type"], dict) else dict(_ALPACA)
    factory = {**factory, "columns": {**factory["columns"], "system": system}}
    return factory, {"type": {**kind, "field_system": system}}


def _messages(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    tags = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    return _turns(columns.get("messages", "messages"), "role", "content", tags)


def _sharegpt(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the entries if every role goes by a single name."""
    found = {turn["from"] for row in rows for turn in row["conversations"]}
    tags = {"system_tag": "system"}
    for tag, names in {"user_tag": ("human", "user"), "assistant_tag": _ASSISTANTS}.items():
        own = [name for name in names if name in found]
        if len(own) > 1:
            return None
        tags[tag] = own[0] if own else names[0]
    return _turns("conversations", "from", "value", tags)


def _turns(
    field: str, role: str, content: str, tags: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    factory = {
        "formatting": "sharegpt",
        "columns": {"messages": field},
        "tags": {"role_tag": role, "content_tag": content, **tags},
    }
    mappings = {"role": role, "content": content}
    axolotl = {
        "type": "chat_template",
        "field_messages": field,
        "message_property_mappings": mappings,
    }
    return factory, axolotl


def _alpaca(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    named = {"prompt": "instruction", "response": "output"}
    if any("input" in row for row in rows):
        named["query"] = "input"
    return {"formatting": "alpaca", "columns": named}, {"type": "alpaca"}


def _pair(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the entries if prompts and completions are texts."""
    prompt, completion = (columns.get(field, field) for field in ("prompt", "completion"))
    if not all(isinstance(row[name], str) for row in rows for name in (prompt, completion)):
        return None
    factory = {"formatting": "alpaca", "columns": {"prompt": prompt, "response": completion}}
    custom = {
        "field_instruction": prompt,
        "field_output": completion,
        "format": _PLAIN,
        "no_input_format": _PLAIN,
    }
    return factory, {"type": custom}


_ASSISTANTS = ("gpt", "assistant", "chatgpt", "bing", "bard", "model")
_ALPACA = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction}\n\n{input}",
    "no_input_format": _PLAIN,
}
_FORMATS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _pair,
}
