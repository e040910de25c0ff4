"""Write `command-line.md`, beside this file, from the commands themselves.

After a change of a flag: `python docs/command_line.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from gradsift.cli.app import app

PAGE = Path(__file__).with_name("command-line.md")
_HEAD = """# Command line

Made from the code by `python docs/command_line.py`; `gradsift VERB --help` says the same. What has
no flag is a [setting](settings.md): `--set SECTION.KEY=VALUE`. All verbs that print something take
`--json`; [exit codes](faq.md#exit-codes).
"""


def render() -> str:
    """Return the page."""
    verbs: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join([_HEAD, *(_verb(name, own) for name, own in verbs.items())])


def _verb(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    rows = [
        f"| {_cell(flag, code=True)} | {_cell(what)} |"
        for flag, what in filter(None, (_record(own, context) for own in command.params))
    ]
    examples = [line for line in (command.epilog or "").splitlines() if line.startswith("gradsift")]
    parts = [f"## gradsift {name}", "", (command.help or "").strip(), ""]
    parts += ["| | |", "|---|---|", *rows, ""]
    if examples:
        parts += ["```", *examples, "```", ""]
    return "\n".join(parts)


def _record(own: Any, context: Any) -> tuple[str, str] | None:
    """Return how an option or argument is written, and what it does; nothing of a hidden one."""
    return own.get_help_record(context)


def _cell(text: str, code: bool = False) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`" if code and text else text


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
