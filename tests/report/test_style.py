"""Sentences, ticks, cuts and colours of the report, without a run."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from gradsift.config import PolicyConfig
from gradsift.report import cards
from gradsift.report.figures import log_ticks
from gradsift.report.wording import policy_in_words, times

TEMPLATES = Path(cards.__file__).parent / "templates"
STYLE = (TEMPLATES / "page.css").read_text(encoding="utf-8")
COLOURS = dict(re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\);", STYLE))


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb` (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_measured_as_the_standard_says() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_every_ground(scheme: int) -> None:
    colours = {name: pair.split(", ")[scheme] for name, pair in COLOURS.items()}
    grounds = ("page", "surface", "soft")
    texts = ("text", "muted", "accent", "caution")
    pairs = [*itertools.product(texts, grounds), ("text", "mark"), ("text", "band")]
    for text, ground in pairs:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for bar, ground in itertools.product(("picks", "pool"), grounds):
        assert contrast(colours[bar], colours[ground]) >= 3, (bar, ground)


def test_every_colour_stands_in_one_place() -> None:
    root, rest = STYLE.split("}", 1)
    assert "#" in root
    assert not re.search(r"#[0-9a-f]{6}", rest)
    scripts = [path.read_text(encoding="utf-8") for path in TEMPLATES.glob("*.js")]
    package = TEMPLATES.parents[1]
    figures = [path.read_text(encoding="utf-8") for path in package.glob("*/figures.py")]
    assert len(scripts) == len(figures) == 3
    for source in (*scripts, *figures):
        assert not re.search(r"[\"']#[0-9a-fA-F]{3,8}[\"']", source)
        assert {*re.findall(r"var\(--(\w+)\)", source)} <= {*COLOURS}


@pytest.mark.parametrize(
    ("low", "high"),
    [(1.0, 2.0), (20.0, 600.0), (52.0, 58.0), (54.0, 107.0), (1.0, 1e5), (900.0, 1100.0)],
)
def test_a_logarithmic_axis_has_enough_ticks_and_not_too_many(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert all(low <= tick <= high for tick in ticks)
    assert min(4, int(high) - int(low) + 1) <= len(ticks) <= 16


def test_policies_are_said_in_words() -> None:
    def said(**settings: object) -> dict[str, tuple[str, str]]:
        policy = PolicyConfig.model_validate(settings)
        return {about: (words, how) for about, words, how in policy_in_words(policy)}

    plain = said()
    assert plain["Budget"] == ("5% of the pool", "budget=5%")
    assert plain["Order"] == ("the top of the ranking", "strategy=top")
    assert plain["Sources"] == ("no cap on sources", "source_cap=none")
    assert "(Jaccard similarity of 0.8 or more)" in plain["Decontamination"][0]
    other = said(
        budget="3Mtok", strategy="round-robin", per="task", source_cap={"dolly": "10%"},
        duplicates="keep", decontaminate="none",
    )  # fmt: skip
    assert other["Budget"][0] == "3,000,000 tokens"
    assert other["Order"][1] == "strategy=round-robin per=task"
    assert other["Sources"] == ("at most 10% from dolly", "source_cap={dolly: 10%}")


def test_lifts_have_the_digits_that_one_reads() -> None:
    assert [times(lift) for lift in (0.0, 0.04, 9.94, 9.96, 1234.5)] == [
        "0.0", "0.0", "9.9", "10", "1,234",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a" * 2000, "<" * 2000, "漢" * 2000, "\x01" * 2000])
def test_an_example_takes_no_more_of_the_page_than_its_share(text: str) -> None:
    for count in (1, 3, 500):
        shown = cards._cut([("user", text)] * count)
        written = json.dumps(shown, ensure_ascii=False).encode()
        assert len(written) + 5 * written.count(b"<") < 1300
        assert shown[0][1].endswith(" …")
        assert sum(role == "user" for role, _ in shown) == count or shown[-1] == (
            "", f"{count - len(shown) + 1} more turns",
        )  # fmt: skip
    assert cards._cut([("user", "short"), ("assistant", "too")]) == [
        ("user", "short"), ("assistant", "too"),
    ]  # fmt: skip
