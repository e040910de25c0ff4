"""Sentences of the page that are made of its numbers: what was picked, by which rules, how sure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradsift.config import PolicyConfig
from gradsift.errors import shorten
from gradsift.report.cards import Card
from gradsift.report.target_page import TargetPage
from gradsift.runs import layout
from gradsift.selection.picks import overlap
from gradsift.selection.policies import describe_policy, shorten_policy
from gradsift.types import Budget

_FEW = 0.1  # of the picks: fewer examples near the edge than these need no advice
_LONGEST_SOURCE = 60  # characters, in a sentence
_ABOUT = {
    "budget": "Budget",
    "strategy": "Order",
    "source_cap": "Sources",
    "duplicates": "Repeats",
    "decontaminate": "Decontamination",
}
_SCORES = {
    "gist": "cosine within the target's subspace",
    "less": "cosine of projected gradients",
    "cosine": "cosine of whole gradients",
    "influence": "cosine with target gradients under the inverse Fisher matrix",
    "rds": "cosine of hidden states",
    "embed": "cosine of sentence embeddings",
    "bm25": "BM25, without a unit",
    "target-path": "share of the loss that training on the target takes away",
    "perplexity": "loss of the base model, nats per token",
    "length": "supervised tokens",
    "random": "drawn at random",
    "fuse": "sum of 1 / (60 + rank) over the fused methods",
}


def percent(share: float, digits: int = 1) -> str:
    """Return a share as text, with a space that does not break.

    >>> percent(0.528, 0).split()
    ['53', '%']
    """
    return f"{100 * share:.{digits}f}\u00a0%"


def times(lift: float) -> str:
    """Return how many times as frequent, with as many digits as one reads.

    >>> times(6.87), times(23.4)
    ('6.9', '23')
    """
    return f"{lift:.1f}" if lift < 9.95 else f"{lift:,.0f}"


def headline(page: TargetPage) -> tuple[str, str]:
    """Return what was picked, and from where most of it came."""
    picked = f"{len(page.selection.picks):,} of {page.num_pool:,} examples"
    first = page.sources[0]
    source = shorten(first.source, _LONGEST_SOURCE)
    if len(page.sources) == 1:
        return picked, f"for {page.name}; all from {source}, the pool’s only source"
    part = f"{percent(first.of_picks, 0)} from {source}, {times(first.lift)} times its share"
    return picked, f"for {page.name}; {part}"


def kept_beside(page: TargetPage) -> list[tuple[str, str, str, int, int, str]]:
    """Return the other selections of the target: name, method, policy, picks, tokens, overlap."""
    return [
        (
            other.name,
            other.method,
            shorten_policy(other.policy),
            len(other.picks),
            other.num_tokens,
            f"{overlap(page.selection, other):.2f}",
        )
        for other in page.others
    ]


def score_unit(page: TargetPage) -> str:
    """Return what a score of the run's method is."""
    return _SCORES.get(page.method, f"by {page.method}")


def policy_in_words(policy: PolicyConfig) -> list[tuple[str, str, str]]:
    """Return every setting of a policy: what it is about, what it says, and how it is set.

    >>> policy_in_words(PolicyConfig(budget="2000"))[0]
    ('Budget', '2,000 examples', 'budget=2000')
    """
    settings = {key: f"{key}={getattr(policy, key)}" for key in _ABOUT}
    settings["source_cap"] = f"source_cap={_setting(policy.source_cap)}"
    if policy.strategy != "top":
        settings["strategy"] += f" per={policy.per}"
    words = describe_policy(policy)
    return [(about, words[key], settings[key]) for key, about in _ABOUT.items()]


def _setting(cap: str | Mapping[str, str] | None) -> str:
    if isinstance(cap, Mapping):
        return "{" + ", ".join(f"{name}: {share}" for name, share in cap.items()) + "}"
    return cap or "none"


def how_sure(page: TargetPage) -> list[str]:
    """Return what the noise of the scores says about the picks, a sentence each."""
    edge, picks = page.edge, len(page.selection.picks)
    if edge is None or edge.noise is None:
        unknown = "How far scores would move with other target examples is not known here: "
        if page.policy.strategy != "top" or page.policy.source_cap:
            return [f"{unknown}the picks are not the plain top of the ranking."]
        if not page.winners:
            return [f"{unknown}{page.method} does not compare with target examples."]
        return [
            f"{unknown}{page.num_target} target examples are too few to leave half of them out."
        ]
    noise = edge.noise
    return [
        f"Leave out a random half of the {page.num_target:,} target examples, and a score near "
        f"the lowest pick ({edge.cut:.4f}) moves by {noise.width:.4f} (standard deviation).",
        f"{noise.num_within:,} examples lie that near to it, against {picks:,} picks: which of "
        "them are in and which are out is largely chance.",
        f"{edge.num_sure:,} of the picks ({percent(edge.num_sure / picks, 0)}) lie further above.",
    ]


def advice(page: TargetPage, run: str) -> list[tuple[str, str]]:
    """Return what to do about an uncertain edge: a sentence each, and its command."""
    edge = page.edge
    if edge is None or edge.noise is None:
        return []
    if edge.noise.num_within < _FEW * len(page.selection.picks):
        return []
    name, config = page.name, shlex.quote(f"{run}/{layout.CONFIG}")
    again = f"gradsift select --config {config}"
    found = [
        (
            "Judge the picks as a whole, not one by one: the same fine-tuning on them and on "
            "random ones, over several seeds, tells whether they help, whichever of the edge are "
            "in.",
            f"gradsift evaluate {shlex.quote(run)} --test {name}=FILE --method {page.method} "
            "--seeds 5",
        ),
        (
            f"Give more target examples than {page.num_target:,}: the noise is that of which "
            "examples happened to be given, and it shrinks as they become more.",
            f"{again} --output-dir {shlex.quote(f'{run}-more')} --target {name}=FILE",
        ),
    ]
    budget = Budget.parse(page.policy.budget)
    if edge.at_twice and page.selection.shortfall is None and budget.unit != "tok":
        picks = 2 * len(page.selection.picks)
        now, then = edge.noise.num_within * 2 / picks, edge.at_twice.num_within / picks
        effect = "the edge would matter less" if then < now else "the edge would matter no less"
        found.append(
            (
                f"With twice the budget {effect}: {edge.at_twice.num_within:,} examples near it "
                f"for {picks:,} picks, {then:.1f} a pick in place of {now:.1f}. Picking anew takes "
                "seconds.",
                f"{again} --output-dir {shlex.quote(run)} --budget {_twice(budget)} --name twice",
            )
        )
    return found


def _twice(budget: Budget) -> str:
    return str(replace(budget, amount=2 * budget.amount))


def captions(page: TargetPage) -> dict[str, str]:
    """Return what the figures say, in a sentence each that carries their numbers."""
    lengths, scores = page.lengths.medians, page.scores.medians
    found = {
        "lengths": f"Half of the picks have {lengths[1]:,.0f} tokens or more, half of the pool "
        f"{lengths[0]:,.0f} or more.",
        "scores": f"The median score is {scores[0]:.3f} in the pool and {scores[1]:.3f} among the "
        f"picks{_lowest(page)}.",
    }
    if page.spectra:
        found["spectrum"] = _spectrum([*page.spectra.values()][-1])
    return found


def _lowest(page: TargetPage) -> str:
    if page.edge is None:
        return ""
    band = (
        f", with ±{page.edge.noise.width:.3f} of noise around it (the band)"
        if page.edge.noise
        else ""
    )
    return f"; the lowest pick has {page.edge.cut:.3f}{band}"


def _spectrum(found: Mapping[str, Any]) -> str:
    return (
        f"The first direction holds {percent(found['cumulative_variance'][0])} of the variance of "
        f"{found['num_examples']:,} gradients, the first {found['r95']} hold 95\u00a0%, the first "
        f"{found['r99']} hold 99\u00a0%; {found['rank']} are kept."
    )


def first_middle_last(picked: Sequence[Card]) -> list[tuple[str, Card]]:
    """Return the first, the middle and the last of the picks that are shown, each with its name."""
    # of fewer than three the later names stay
    named = {len(picked) // 2: "In the middle", len(picked) - 1: "Last pick", 0: "First pick"}
    return [(title, picked[number]) for number, title in sorted(named.items())]


def evaluate(run: str, target: str) -> str:
    """Return the command that finds out whether picks help."""
    return f"gradsift evaluate {shlex.quote(run)} --test {target}=FILE"


def evaluate_again(run: str) -> str:
    """Return the command that measures the picks of now as those before were measured."""
    config = shlex.quote(f"{run}/{layout.EVALUATION_CONFIG}")
    return f"gradsift evaluate {shlex.quote(run)} --config {config}"


def geometry(run: str) -> str:
    """Return the command that measures how the loss curves."""
    return f"gradsift geometry {shlex.quote(run)}"
