"""Write `settings.md`, beside this file, from the descriptions in the code.

After a change of a setting: `python docs/settings.py`.
"""

from __future__ import annotations

from pathlib import Path

from gradsift.cli.settings import all_settings

PAGE = Path(__file__).with_suffix(".md")
_HEAD = """# Settings

Made from the code by `python docs/settings.py`; `gradsift settings SECTION` prints the same. Flags
for what everyone uses, `--set SECTION.KEY=VALUE` for the rest, or a YAML file with these sections
(`--config`); `--set` overrides the flags, and flags override the file. Every run keeps its own
`config.yaml`: `gradsift select --config runs/gsm8k/config.yaml --output-dir runs/again` repeats it
(from the same directory, where its paths are relative).

What is in `policy` changes the picks alone, what is in `gist.aggregation` and `gist.norm_power`,
`influence.aggregation` and `influence.normalize` the scores: seconds. `engine` (but for `window`
and `shard_size`), `model.device` and `less`, `influence`, `target_path`, `embed`, `random` or
`fuse` under another method change nothing that was measured. Everything else does, and is refused
for a finished folder unless you say `--overwrite`.

The defaults are the method's own paper's, for a pool of 270,000 and a 7B model. Two need thought
elsewhere: a small pool gives a [warm-up of few steps](faq.md#my-pool-is-small), and `lora.alpha`
stays where it is when you lower `lora.rank`.
"""
_INTRODUCTIONS = {
    "evaluate": "`gradsift evaluate RUN --set KEY=VALUE`, or a file of these (`--config`).",
    "geometry": "Flags of `gradsift geometry RUN`.",
}


def render() -> str:
    """Return the page."""
    parts = [_HEAD]
    for name, settings in all_settings().items():
        rows = [
            f"| `{one.key}` | {one.default} | {one.description} | {one.paper or ''} |"
            for one in settings
        ]
        table = ["| key | default | what it does | paper |", "|---|---|---|---|", *rows]
        introduction = [_INTRODUCTIONS[name], ""] if name in _INTRODUCTIONS else []
        parts.append("\n".join([f"## {name}", "", *introduction, *table, ""]))
    return "\n".join(parts).replace("  |", " |")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
