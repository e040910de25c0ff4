"""Entries by which other trainers find the picks as messages: LLaMA-Factory's and axolotl's.

TRL and `datasets` need none: they read `selected/*.messages.jsonl` as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically


def export_entries(run: Path, keys: Iterable[str]) -> None:
    """Write `dataset_info.json` (LLaMA-Factory) and `axolotl.yaml` for the selections of a run.

    LLaMA-Factory knows them as `gradsift_TARGET` or `gradsift_TARGET.NAME`.
    """
    paths = {key: run / layout.messages(key) for key in keys}
    factory = {f"gradsift_{key}": _factory(path) for key, path in paths.items()}
    axolotl = {"datasets": [_axolotl(path) for path in paths.values()]}
    content = json.dumps(factory, indent=2).encode() + b"\n"
    write_atomically(run / layout.LLAMA_FACTORY_ENTRIES, content)
    write_atomically(
        run / layout.AXOLOTL_ENTRIES, yaml.safe_dump(axolotl, sort_keys=False).encode()
    )


def _factory(path: Path) -> dict[str, Any]:
    """Return the entry for LLaMA-Factory, whose format for tool calls is a format of its own.

    The first line tells it: it has all keys that some line has, as `write_messages` makes it.
    """
    with path.open("rb") as file:
        first = json.loads(file.readline())
    columns = {"messages": "messages"}
    if "tools" in first:
        columns["tools"] = "tools"
    calls = "tool_calls" in first["messages"][0]
    return {
        "file_name": path.name,
        "formatting": "openai" if calls or "tools" in columns else "sharegpt",
        "columns": columns,
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": "tool",
            "system_tag": "system",
        },
    }


def _axolotl(path: Path) -> dict[str, Any]:
    return {
        "path": str(path),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
    }
