"""How each method does beside random selection, and the plain sentence that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradsift.evaluation.costs import Cost
from gradsift.evaluation.statistics import Comparison, Interval

REFERENCES = ("base", "random", "full")
"""What the methods are held against: no fine-tuning, random picks, the whole pool."""


@dataclass(frozen=True)
class Row:
    """How one method does for one target at one budget.

    `selections`: how many different picks, of which `num_picks` each; `seeds`: fine-tunings on
    them in all. `loss` (nats per token) and `accuracy` (share of tokens) are means over the
    fine-tunings, with their standard deviations; `compared` is the loss less that of random
    selection: below 0 is better. `cost`: of measuring the method. `tasks`: metrics of
    lm-evaluation-harness tasks, means over the fine-tunings.
    """

    target: str
    budget: str
    method: str
    num_picks: int
    steps: int
    selections: int
    seeds: int
    loss: float
    loss_std: float
    accuracy: float
    accuracy_std: float
    compared: Comparison | None
    cost: Cost | None
    tasks: Mapping[str, float]

    @property
    def difference(self) -> Interval | None:
        """The loss less that of random selection, with an interval that nothing is corrected in."""
        return self.compared and self.compared.difference

    @property
    def verdict(self) -> str:
        """Whether it beats random selection beyond the noise, among so many methods compared."""
        if self.compared is None:
            return ""
        if not self.compared.certain:
            return "no difference"
        return "better" if self.compared.difference.value < 0 else "worse"

    @property
    def is_method(self) -> bool:
        """Whether it is one of the methods that are compared."""
        return self.method not in REFERENCES


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return a plain sentence per target and budget: which methods beat random."""
    places = dict.fromkeys((row.target, row.budget) for row in rows)
    return [
        f"{target}, {budget}: "
        + _verdict([row for row in rows if (row.target, row.budget) == (target, budget)])
        for target, budget in places
    ]


def _verdict(rows: Sequence[Row]) -> str:
    methods = [row for row in rows if row.is_method]
    named = {v: [row.method for row in methods if row.verdict == v] for v in ("better", "worse")}
    base = next((row for row in rows if row.method == "base"), None)
    if not methods:
        sentence = "no method was compared with random picks"
    elif named["better"]:
        sentence = f"{_listed(named['better'])} beat{'s' * (len(named['better']) == 1)} random"
    else:
        sentence = "nothing beats random beyond the noise"
    if len(methods) > 1:
        sentence += f" (corrected for {len(methods)} comparisons)"
    if worse := named["worse"]:
        sentence += f"; {_listed(worse)} {'is' if len(worse) == 1 else 'are'} worse"
    if base and base.verdict == "better":
        sentence += "; not fine-tuning at all is better than random"
    elif base and base.difference and base.verdict == "no difference" and not any(named.values()):
        moved, half = -base.difference.value, (base.difference.high - base.difference.low) / 2
        sentence += (
            f"; fine-tuning on random picks moved the loss by {moved:+.3f} ± {half:.3f}: train "
            "longer (fine_tuning.steps, fine_tuning.learning_rate) before believing any of this"
        )
    return f"{sentence}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), *names[-1:]]) if len(names) > 1 else "".join(names)
