"""Entries by which other trainers find the picks: LLaMA-Factory's and axolotl's.

TRL and `datasets` need none: they read `selected/NAME.jsonl` as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from gradsift.store import write_atomically

logger = logging.getLogger(__name__)

_PLAIN = "{instruction}"


def export_entries(
    directory: Path, schemas: Mapping[str, Collection[str]], columns: Mapping[str, str]
) -> None:
    """Write `dataset_info.json` (LLaMA-Factory) and `axolotl.yaml` beside the picks.

    `schemas`: those of each target's picks. `columns` maps fields to the pool's own columns. Picks
    of several schemas, and prompts that are lists of turns, have no entry, and the log says so.
    """
    factory: dict[str, Any] = {}
    axolotl = []
    for name, found in schemas.items():
        path = directory / f"{name}.jsonl"
        entries = _entries(path, found, columns)
        if entries is None:
            logger.warning("%s: no trainer reads these rows in one go; no entry is written", path)
            continue
        factory[f"gradsift_{name}"] = {"file_name": path.name, **entries[0]}
        axolotl.append({"path": str(path), "ds_type": "json", **entries[1]})
    content = json.dumps(factory, indent=2).encode() + b"\n"
    write_atomically(directory / "dataset_info.json", content)
    content = yaml.safe_dump({"datasets": axolotl}, sort_keys=False).encode()
    write_atomically(directory / "axolotl.yaml", content)


def _entries(
    path: Path, schemas: Collection[str], columns: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return what LLaMA-Factory and axolotl have to know of the file."""
    schema = next(iter(schemas)) if len(schemas) == 1 else None
    if schema in ("messages", "sharegpt"):
        field, role, content = "conversations", "from", "value"
        if schema == "messages":
            field, role, content = columns.get("messages", "messages"), "role", "content"
        return _turns(field, role, content)
    if schema == "alpaca":
        named = {"prompt": "instruction", "query": "input", "response": "output"}
        return {"formatting": "alpaca", "columns": named}, {"type": "alpaca"}
    if schema == "prompt-completion":
        prompt, completion = (columns.get(field, field) for field in ("prompt", "completion"))
        with path.open("rb") as file:
            first = json.loads(file.readline())
        if isinstance(first[prompt], str) and isinstance(first[completion], str):
            return _pair(prompt, completion)
    return None


def _turns(field: str, role: str, content: str) -> tuple[dict[str, Any], dict[str, Any]]:
    names = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    if role == "from":
        names = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
    factory = {
        "formatting": "sharegpt",
        "columns": {"messages": field},
        "tags": {"role_tag": role, "content_tag": content, **names},
    }
    mappings = {"role": role, "content": content}
    axolotl = {
        "type": "chat_template",
        "field_messages": field,
        "message_property_mappings": mappings,
    }
    return factory, axolotl


def _pair(prompt: str, completion: str) -> tuple[dict[str, Any], dict[str, Any]]:
    factory = {"formatting": "alpaca", "columns": {"prompt": prompt, "response": completion}}
    custom = {
        "field_instruction": prompt,
        "field_output": completion,
        "format": _PLAIN,
        "no_input_format": _PLAIN,
    }
    return factory, {"type": custom}
