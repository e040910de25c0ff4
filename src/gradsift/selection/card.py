"""What a selection was made from and by, for whoever gets its picks; no text of the target."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from gradsift.config import Config
from gradsift.methods.job import Job
from gradsift.runs.provenance import package_versions
from gradsift.sections import Section
from gradsift.selection.policies import shorten_policy


def card(job: Job, target: str) -> dict[str, str]:
    """Return what the picks for a target are made from and by, by what it is."""
    config, versions = job.config, package_versions()
    return {
        "target": f"{target}, {len(job.targets[target]):,} examples",
        "pool": f"{', '.join(config.data.pool)}: {len(job.pool):,} examples",
        "model": config.model.name,
        "method": config.method,
        "policy": shorten_policy(config.policy),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": command(config, target),
    }


def describe_card(card: Mapping[str, str]) -> str:
    """Return a card as Markdown."""
    lines = [
        f"- {name}: {f'`{text}`' if name == 'command' else text}" for name, text in card.items()
    ]
    return "\n".join(["Picked from a pool by gradsift", "", *lines])


def command(config: Config, target: str) -> str:
    """Return the command that makes the picks for a target, with every setting not as by default.

    >>> command(Config.build({"model": {"name": "m"}, "lora": {"rank": 8},
    ...                       "data": {"pool": "p.jsonl", "targets": {"t": "t.jsonl"}}}), "t")
    'gradsift select --model m --pool p.jsonl --target t=t.jsonl --set lora.rank=8'
    """
    words = ["gradsift", "select", "--model", config.model.name]
    words += [word for pool in config.data.pool for word in ("--pool", pool)]
    for file in config.data.targets[target]:
        words += ["--target", f"{target}={file}"]
    for key, value in _changed(config):
        if key not in ("model.name", "data.pool", "data.targets"):
            words += ["--set", f"{key}={value}"]
    return shlex.join(words)


def _changed(section: Section, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the settings that are not as by default, their values as YAML on one line."""
    found = []
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, Section):
            found += _changed(value, f"{key}.")
        elif value != field.default:
            plain = (
                value
                if isinstance(value, str | int | float | bool)
                else section.model_dump(mode="json")[name]
            )
            text = yaml.safe_dump(plain, default_flow_style=True, width=10**6)
            found.append((key, text.removesuffix("\n").removesuffix("\n...").strip()))
    return found
