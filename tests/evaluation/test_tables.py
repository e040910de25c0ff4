"""Verdicts in plain sentences, tables and figures of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradsift.evaluation.costs import Cost
from gradsift.evaluation.figures import exhibits
from gradsift.evaluation.lds import DatamodelingPair, LinearDatamodelingScore
from gradsift.evaluation.quantiles import DoseResponse
from gradsift.evaluation.results import Evaluation
from gradsift.evaluation.statistics import Comparison, Interval
from gradsift.evaluation.tables import amount, datamodeling_sentence, describe_cost, interval
from gradsift.evaluation.verdicts import Row, verdicts


def row(method: str, value: int | float, p_value: float = 0.01, cost: Cost | None = None) -> Row:
    compared = Comparison(Interval(float(value), value - 0.5, value + 0.5), p_value)
    return Row(
        "t", "5%", method, 9, 4, 2, 6, 1.0, 0.1, 0.5, 0.1,
        None if method == "random" else compared, cost, {},
    )  # fmt: skip


HINT = "fine-tuning on random picks moved the loss by +0.100 ± 0.500: train longer"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("gist", -2), row("less", -3), row("rds", -1, 0.2)],
         "gist and less beat random (corrected for 3 comparisons)."),
        ([row("gist", -2, 0.2)], "nothing beats random beyond the noise."),
        ([row("a", -2), row("b", 1)],
         "a beats random (corrected for 2 comparisons); b is worse."),
        ([row("base", 1), row("a", 1), row("b", 1)],
         "nothing beats random beyond the noise (corrected for 2 comparisons); a and b are worse."),
        ([row("base", -2), row("full", -3), row("b", -1, 0.3)],
         "nothing beats random beyond the noise; not fine-tuning at all is better than random."),
        ([row("base", 2), row("random", 0)], "no method was compared with random picks."),
        ([row("base", -0.1, 0.6), row("b", -1, 0.3)],
         f"nothing beats random beyond the noise; {HINT} (fine_tuning.steps, "
         "fine_tuning.learning_rate) before believing any of this."),
        ([row("base", -0.1, 0.6), row("b", -1)], "b beats random."),
    ],
)  # fmt: skip
def test_verdicts_are_plain_sentences(rows: list[Row], expected: str) -> None:
    assert verdicts(rows) == [f"t, 5%: {expected}"]


def test_a_verdict_counts_the_comparisons_and_an_interval_does_not() -> None:
    missed = Row("t", "5%", "m", 9, 4, 1, 3, 1.0, 0.1, 0.5, 0.1,
                 Comparison(Interval(-0.2, -0.3, -0.1), 0.09), None, {})  # fmt: skip
    assert missed.verdict == "no difference"
    assert missed.difference
    assert missed.difference.high < 0
    assert [row("m", 1).verdict, row("m", -1).verdict, row("random", 0).verdict] == [
        "worse", "better", ""
    ]  # fmt: skip


def test_numbers_for_people() -> None:
    assert interval(Interval(0.5, -0.25, 1.0), 2) == "+0.50 [-0.25, +1.00]"
    assert describe_cost(Cost(5400.0, 0, 0.0)) == ["1.5 h", "none", "none"]
    assert describe_cost(Cost(0.25, 999, 1234.0)) == ["0.2 s", "999 tok", "1.23 kFLOP"]
    assert amount(2.5e18, "FLOP") == "2.5 EFLOP"
    assert amount(3e23, "FLOP") == "3e+05 EFLOP"


def pair(method: str, other: str, value: float, p_value: float) -> DatamodelingPair:
    return DatamodelingPair("t", method, other, Comparison(Interval(value, value, value), p_value))


def test_who_foretells_better_than_whom() -> None:
    pairs = [pair("a", "b", 0.1, 0.01), pair("a", "c", 0.2, 0.01), pair("b", "c", -0.1, 0.04)]
    assert datamodeling_sentence(pairs) == "a above b, c; c above b (corrected for 3 comparisons)."
    assert datamodeling_sentence([pair("a", "b", 0.1, 0.5)]).startswith("no two methods differ")


def evaluation() -> Evaluation:
    rows = [
        row("base", 2.0), row("random", 0), row("bm25", -0.2, 0.3, Cost(2.0, 0, 0.0)),
        row("gist", -1.0, 0.001, Cost(3700.0, 4_000_000, 5e15)),
    ]  # fmt: skip
    return Evaluation(
        Path("run/evaluation"), rows, [],
        [LinearDatamodelingScore("t", m, Interval(0.3, 0.2, 0.4)) for m in ("gist", "bm25")],
        [pair("gist", "bm25", 0.1, 0.01)],
        [DoseResponse("t", "gist", (1.0, 1.1, 1.3), 0.02, Interval(1.0, 0.5, 1.0))],
        verdicts(rows),
    )  # fmt: skip


def test_all_that_was_found_stands_in_the_text() -> None:
    text = evaluation().markdown()
    assert "- t, 5%: gist beats random (corrected for 2 comparisons)." in text
    assert "an interval that misses zero may still be no difference" in text
    assert (
        "| gist | 9 | 2 × 3 | 1.0000 ± 0.1000 | 50.0% | -1.0000 [-1.5000, -0.5000] | better |"
        in text
    )
    assert "| gist | 1.0 h | 4 Mtok | 5 PFLOP | +1.0000 [+0.5000, +1.5000] |" in text
    assert "| bm25 | 2.0 s | none | none |" in text
    assert "- t: gist above bm25 (corrected for 1 comparisons)." in text
    assert "| gist | 1.0000 | 1.1000 | 1.3000 | +1.00 [+0.50, +1.00] |" in text
    table = evaluation().table().to_pylist()
    assert [r["flops"] for r in table] == [None, None, 0.0, 5e15]
    assert [r["p_value"] for r in table] == [0.01, None, 0.3, 0.001]
    assert table[3]["selections"] == 2


def test_figures_show_what_cost_nothing_and_every_method() -> None:
    shown = {e.title: e for e in exhibits(evaluation())["t"]}
    assert list(shown) == [
        "Does it help? (5%)", "What it cost", "Dose and response", "Linear datamodeling score"
    ]  # fmt: skip
    cost = shown["What it cost"].figure
    assert cost
    axis, [points] = cost["layout"]["xaxis"], cost["data"]
    assert points["text"] == ["bm25", "gist"]
    assert points["x"][0] == axis["tickvals"][0]
    assert axis["ticktext"][0] == "none"
    assert points["x"][1] == pytest.approx(15.699, abs=1e-3)
    assert points["y"] == [0.2, 1.0]
    assert "10 PFLOP" in axis["ticktext"]
    dose = shown["Dose and response"]
    assert dose.figure
    assert [t["name"] for t in dose.figure["data"]] == ["gist"]
    assert "gist: the higher scored, the lower the loss" in dose.text
