"""The configurations of `examples/` are such as the commands in them take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from gradsift.cli.app import app
from gradsift.config import Config
from gradsift.sections import read_yaml

HOME = Path(__file__).parents[1]
EXAMPLES = [path for path in sorted(HOME.glob("examples/*.yaml")) if "cluster" not in path.name]


def test_there_is_one_for_every_common_case() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names == {"several-targets", "four-bit-7b", "ray", "s3", "token-budget"}
    page = (HOME / "examples/README.md").read_text("utf-8")
    assert all(f"]({path.name})" in page for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_and_so_are_their_commands(path: Path) -> None:
    config = Config.build(read_yaml(path))
    assert config.data.pool
    assert config.data.targets
    commands = re.findall(r"^#   (gradsift .*?)(?:\s+#.*)?$", path.read_text("utf-8"), re.MULTILINE)
    assert commands
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for command in commands:
        _, verb, *words = shlex.split(command)
        assert words[words.index("--config") + 1] == f"examples/{path.name}"
        known = {flag for option in verbs[verb].params for flag in option.opts}
        assert {word for word in words if word.startswith("--")} <= known
