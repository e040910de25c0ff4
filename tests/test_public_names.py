"""What users build upon: a name or a flag may not go, come or move without a change here."""

from __future__ import annotations

import pytest
from typer.main import get_command

import gradsift
from gradsift.cli.app import app

PUBLIC_NAMES = [
    "Budget", "Config", "Evaluation", "EvaluationConfig", "Explanation", "Forecast",
    "GradsiftError", "RunResult", "Selection", "evaluate", "explain", "measure_geometry",
    "plan", "run", "select", "write_report",
]  # fmt: skip

COMMANDS = {
    "select": [
        "--output-dir", "--model", "--pool", "--target", "--budget", "--method", "--adapter",
        "--warmup", "--memory", "--engine", "--ray-address", "--workers", "--config", "--set",
        "--strict", "--no-strict", "--overwrite", "--no-overwrite",
    ],
    "plan": [
        "--output-dir", "--model", "--pool", "--target", "--budget", "--adapter", "--warmup",
        "--memory", "--config", "--set", "--strict", "--no-strict",
    ],
    "evaluate": [
        "run", "--test", "--method", "--budget", "--seeds", "--full", "--no-full", "--lds",
        "--lm-eval", "--engine", "--ray-address", "--config", "--set",
    ],
    "explain": ["run", "example"],
    "report": ["run"],
    "geometry": [
        "run", "--examples", "--eigenvectors", "--probes", "--engine", "--ray-address",
    ],
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
    assert flags == COMMANDS


def test_version_is_a_flag_of_gradsift_itself() -> None:
    assert "--version" in [name for option in get_command(app).params for name in option.opts]
