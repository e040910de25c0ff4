"""What users build upon: a name or a flag may not go, come or move without a change here."""

from __future__ import annotations

import shlex

import pytest
from typer.main import get_command

import gradsift
from gradsift.cli.app import app

PUBLIC_NAMES = [
    "Budget", "Config", "Evaluation", "EvaluationConfig", "Explanation", "Forecast",
    "GradsiftError", "Index", "RunResult", "Selection", "evaluate", "explain", "index",
    "measure_geometry", "open_index", "open_run", "plan", "run", "select", "write_report",
]  # fmt: skip

OF_EVERY_VERB = ["--json", "--quiet", "-q", "--verbose", "-v"]
COMMANDS = {
    "select": [
        "--output-dir", "--model", "--pool", "--target", "--index", "--budget", "--name",
        "--weights", "--method", "--adapter", "--warmup", "--memory", "--seed", "--engine",
        "--ray-address", "--workers", "--config", "--set", "--strict", "--no-strict",
        "--overwrite", "--no-overwrite",
    ],
    "index": [
        "run", "--model", "--pool", "--adapter", "--warmup", "--memory", "--seed",
        "--engine", "--ray-address", "--workers", "--config", "--set", "--strict", "--no-strict",
        "--overwrite", "--no-overwrite",
    ],
    "plan": [
        "--output-dir", "--model", "--pool", "--target", "--budget", "--method", "--adapter",
        "--warmup", "--memory", "--seed", "--config", "--set", "--strict", "--no-strict", "--check",
    ],
    "picks": ["run"],
    "evaluate": [
        "run", "--test", "--method", "--budget", "--seeds", "--warmup-seeds", "--full", "--no-full",
        "--quantiles", "--lds", "--lm-eval", "--engine", "--ray-address", "--config", "--set",
        "--clean",
    ],
    "explain": ["run", "example"],
    "report": ["run"],
    "geometry": [
        "run", "--target", "--examples", "--eigenvectors", "--probes", "--seed", "--engine",
        "--ray-address",
    ],
    "settings": ["section"],
    "demo": ["--output-dir"],
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert gradsift.__all__ == PUBLIC_NAMES
    for _ in range(2):  # a submodule must never come to stand in a name's place
        assert all(callable(getattr(gradsift, name)) for name in PUBLIC_NAMES)
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'"):
        gradsift.nonsense  # noqa: B018


def test_the_commands_and_their_flags_are_these() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    flags = {
        name: [
            spelling
            for parameter in command.params
            for spelling in (*parameter.opts, *parameter.secondary_opts)
        ]
        for name, command in commands.items()
    }
    assert list(flags) == list(COMMANDS)  # in the order of `gradsift --help`
    assert flags == {name: [*own, *OF_EVERY_VERB] for name, own in COMMANDS.items()}


def test_every_verb_shows_an_example_that_it_accepts() -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        head, *examples = command.epilog.split("\n\n")
        assert head == "Examples:"
        for example in examples:
            program, verb, *arguments = shlex.split(example)
            assert (program, verb) == ("gradsift", name)
            command.make_context(verb, arguments)  # does not run it


def test_version_is_a_flag_of_gradsift_itself() -> None:
    assert "--version" in [name for option in get_command(app).params for name in option.opts]
