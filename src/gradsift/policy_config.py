"""The settings by which scores become picks."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import field_validator

from gradsift.errors import shorten
from gradsift.sections import Section, Share, parse_share, setting
from gradsift.types import Budget

WeightKind = Literal["none", "rank", "softmax"]
_LONGEST_NAME = 100  # of a target or selection: file names are made of it
NAMES_OF_FILES = ("messages", "refused")
"""What no selection may be called: `TARGET.messages.jsonl` and so on belong to the one without a
name."""


def check_file_name(name: str, whose: str) -> str:
    """Return the name of a target or selection, if files can be named by it.

    Raises:
        ValueError: If they cannot.
    """
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"\w[\w-]*", name)
        or len(name.encode()) > _LONGEST_NAME
    ):
        raise ValueError(
            f"a {whose}'s name becomes a file name: expected letters, digits, '_' and '-', "
            f"{_LONGEST_NAME} bytes at most, found {shorten(repr(name))}"
        )
    return name


class PolicyConfig(Section):
    """From scores to picks."""

    name: str | None = setting(
        None, "keeps these picks beside others (--name); the next command does not take it over"
    )
    budget: str = setting("5%", "how much is picked: 5%, 2000 (examples) or 3Mtok (tokens)", "5%")
    strategy: Literal["top", "round-robin", "balanced"] = setting(
        "top",
        "best scores first; target examples pick in turn; or the one served least so far",
        "top",
    )
    per: Literal["example", "task"] = setting(
        "example", "whose turn it is in round-robin and balanced"
    )
    source_cap: str | dict[str, str] | None = setting(
        None, "largest part of the budget from one source: '20%' or {dolly: 10%}"
    )
    duplicates: Literal["keep", "exact", "near"] = setting("exact", "repeated picks to refuse")
    decontaminate: Literal["none", "exact", "near"] = setting(
        "near", "repeats of target examples to refuse"
    )
    similarity: Share = setting(0.8, "Jaccard similarity from which texts are near")
    weights: WeightKind = setting(
        "none", "of the picks in a weighted fine-tuning (--weights): by rank, or softmax of scores"
    )
    temperature: float = setting(
        1.0, "of softmax weights, in standard deviations of the picks' scores", gt=0
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str | None) -> str | None:
        if name in NAMES_OF_FILES:
            raise ValueError(
                f"expected another name than {name!r}, which is that of a file of every selection, "
                f"found {name!r}"
            )
        return None if name is None else check_file_name(name, "selection")

    def selection_of(self, target: str) -> str:
        """Return the key of a target's selection: its files in the run folder are named by it.

        >>> PolicyConfig(name="tight").selection_of("gsm8k")
        'gsm8k.tight'
        """
        return target if self.name is None else f"{target}.{self.name}"

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, budget: Any) -> str:
        return str(Budget.parse(str(budget)))

    @field_validator("source_cap")
    @classmethod
    def _source_cap(cls, cap: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for share in cap.values() if isinstance(cap, dict) else filter(None, [cap]):
            parse_share(share)
        return cap
