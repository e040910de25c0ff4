"""Variants of a method side by side: `gist:norm_power=1` is gist with one setting changed."""

from __future__ import annotations

import re
from typing import Any

from gradsift.config import Config
from gradsift.errors import ConfigError
from gradsift.methods.registry import METHODS
from gradsift.scores.ranking import refuse_turns
from gradsift.sections import Section, merge, parse_assignment

_BETWEEN = re.compile(r",\s*(?=[\w.]+\s*=)")  # a value may hold commas: fuse:methods=[gist, rds]
_SEEDS = 2**32
_OF_THE_RUN = ("method", "model", "data", "engine")
_OF_THE_GRID = ("policy.budget", "policy.name")


def configure_variant(config: Config, text: str) -> Config:
    """Return the settings of a run with those of a method, as `--method` gives it.

    `text`: a method, or `NAME:KEY=VALUE,…`. A key is one of the method's own section; one of
    another is `SECTION.KEY`.

    Raises:
        ConfigError: If a setting is unknown, not allowed, or must be the same for all methods.
    """
    method, colon, settings = text.partition(":")
    changes: list[dict[str, Any]] = [{"method": method}]
    for assignment in _BETWEEN.split(settings) if colon else ():
        key, equals, value = assignment.partition("=")
        section = _section(config, method)
        if not equals or ("." not in key and section is None):
            raise ConfigError(
                f"method {text!r}: expected NAME:KEY=VALUE,…; "
                + (f"{method} has no settings of its own, " if section is None else "")
                + f"those of a section are named as in {method}:policy.per=task"
            )
        full = key.strip() if "." in key else f"{section}.{key.strip()}"
        if full.partition(".")[0] in _OF_THE_RUN or full in _OF_THE_GRID:
            raise ConfigError(
                f"method {text!r}: {full} is the same for all methods of an evaluation; expected a "
                "setting of the method, the warm-up, the adapter or the policy"
            )
        changes.append(parse_assignment(f"{full}={value}"))
    try:
        variant = Config.build(merge(config.model_dump(), *changes))
        asks_for_turns = any("strategy" in change.get("policy", ()) for change in changes)
        if asks_for_turns and not METHODS[variant.method].compares:
            refuse_turns(variant.policy)
    except ConfigError as error:
        raise ConfigError(f"method {text!r}: {error}" if colon else str(error)) from None
    return variant


def with_other_seeds(config: Config, number: int) -> Config:
    """Return the settings with every seed raised by a number."""
    sections = {
        name: section.model_copy(update={"seed": (values["seed"] + number) % _SEEDS})
        for name, section in config
        if isinstance(section, Section) and "seed" in (values := section.model_dump())
    }
    return config.model_copy(update=sections)


def _section(config: Config, method: str) -> str | None:
    """Return the section of a method's own settings; `cosine` shares that of gist."""
    name = "gist" if method == "cosine" else method.replace("-", "_")
    return name if isinstance(getattr(config, name, None), Section) else None
