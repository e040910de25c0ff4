"""What the docs say to run does run: examples of docstrings, commands of the pages.

The names in them stand for small things here: `Qwen/Qwen2.5-1.5B` is a folder with a tiny model.
"""

from __future__ import annotations

import doctest
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import gradsift
from gradsift.cli import main
from gradsift.demo.skills import make_examples

# in an order in which each finds what it needs; this model is a tiny one here
NAMES = [
    "Budget", "Config", "EvaluationConfig", "GradsiftError", "plan", "Forecast", "select", "run",
    "open_run", "RunResult", "Selection", "explain", "Explanation", "write_report", "evaluate",
    "Evaluation", "measure_geometry", "index", "open_index", "Index",
]  # fmt: skip
HOME = Path(__file__).parents[1]
PAGES = [  # in an order in which each finds what it needs
    "docs/requirements.md", "docs/index.md", "README.md", "docs/picks.md", "docs/evaluation.md",
    "docs/geometry.md", "docs/report.md", "docs/any-target.md", "docs/when.md",
    "docs/command-line.md",
]  # fmt: skip
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(name: str) -> list[doctest.Example]:
    """Return the examples of a public name, none of them left out, on few training steps."""
    found = doctest.DocTestParser().get_examples(getattr(gradsift, name).__doc__ or "", name)
    for example in found:
        example.options.pop(doctest.SKIP, None)
        example.source = example.source.replace('"steps": 200', '"steps": 2')
    return found


def test_every_public_name_has_an_example() -> None:
    assert sorted(NAMES) == sorted(gradsift.__all__)
    assert [name for name in NAMES if not examples(name)] == []


@pytest.fixture
def home(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder that has the models and files that the docs name."""
    monkeypatch.chdir(tmp_path)
    for size in ("0.5B", "1.5B"):
        shutil.copytree(base, f"Qwen/Qwen2.5-{size}")
    pool = make_examples("sql", 60, seed=1)
    pool = [row | {"id": f"gsm8k_cot-{n}", "source": "gsm8k_cot"} for n, row in enumerate(pool)]
    files = {
        "data/pool.jsonl": pool,
        "small/pool.jsonl": pool,
        "gsm8k_dev.jsonl": make_examples("sql", 6, seed=2),
        "gsm8k_test.jsonl": make_examples("sql", 6, seed=3),
    }
    for name, rows in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_the_examples_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner, names = doctest.DocTestRunner(optionflags=_OPTIONS), {"gradsift": gradsift}
    names |= {name: getattr(gradsift, name) for name in NAMES}
    for name in NAMES:
        runner.run(doctest.DocTest(examples(name), dict(names), name, None, 0, None))
        assert not runner.failures, capsys.readouterr().out


def commands(page: Path) -> list[str]:
    """Return the commands of a page that are whole and need nothing but these small things."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    found = re.findall(r"^(?:    )?(gradsift (?!implements)[a-z]+ [^#\n]*)", text, re.MULTILINE)
    return [own for own in found if not re.search(r"…|\.\./shared|--engine|demo|4bit", own)]


@pytest.mark.slow
def test_the_commands_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = set()
    for name in PAGES:
        for command in commands(HOME / name):
            words = shlex.split(re.sub(r"fine_tuning\.steps=\d+", "fine_tuning.steps=2", command))
            if tuple(words) in done:
                continue
            done.add(tuple(words))
            monkeypatch.setattr("sys.argv", words)
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code, f"{name}: {command}\n{capsys.readouterr().err}"
    verbs = {words[1] for words in done}
    assert verbs == {
        "evaluate", "explain", "geometry", "index", "picks", "plan", "report", "select", "settings",
    }  # fmt: skip


@pytest.mark.slow
def test_the_weighted_fine_tuning_of_the_docs_draws_by_weight(home: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from torch.utils.data import WeightedRandomSampler

    class Short(trl.SFTTrainer):
        def __init__(self, **given: Any) -> None:
            arguments = trl.SFTConfig(
                output_dir="trl", max_steps=2, per_device_train_batch_size=2, use_cpu=True,
                report_to="none", save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            super().__init__(args=arguments, **given)

    result = gradsift.select(
        model="Qwen/Qwen2.5-1.5B", pool="data/*.jsonl", target="gsm8k_dev.jsonl",
        output_dir="run", method="bm25", budget="20%",
    )  # fmt: skip
    names: dict[str, Any] = {
        "SFTTrainer": Short, "WeightedRandomSampler": WeightedRandomSampler,
        "selection": result.selections["gsm8k_dev"],
    }  # fmt: skip
    page = (HOME / "docs/picks.md").read_text("utf-8")
    [block] = [own for own in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class" in own]
    exec(block, names)
    sampler = names["trainer"].get_train_dataloader().batch_sampler.sampler
    assert isinstance(sampler, WeightedRandomSampler)
    assert sampler.weights.tolist() == pytest.approx(names["picks"]["weight"])
    assert len({*names["picks"]["weight"]}) == len(names["picks"])


def test_no_page_with_commands_is_forgotten() -> None:
    pages = [*HOME.glob("*.md"), *HOME.glob("docs/*.md")]
    has_some = {str(page.relative_to(HOME)) for page in pages if commands(page)}
    assert has_some == set(PAGES)
