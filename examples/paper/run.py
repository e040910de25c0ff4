"""The experiment of the GIST paper for one benchmark and one model, into one table.

    python examples/paper/run.py mmlu --model meta-llama/Llama-2-7b-hf --output-dir runs/paper-mmlu

The same command goes on where a killed one stopped. See README.md beside this file.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from math import ceil
from pathlib import Path
from typing import Annotated

import typer

import gradsift
from gradsift.errors import ConfigError, GradsiftError
from gradsift.evaluation.config import EvaluationConfig
from gradsift.evaluation.lm_eval import Harness
from gradsift.evaluation.tables import markdown
from gradsift.sections import merge, read_yaml
from paper_data import download, paths, write_data

HERE = Path(__file__).resolve().parent
METHODS = ("gist", "less")
METRICS = {"mmlu": "acc,none", "bbh": "exact_match,get-answer", "tydiqa": "f1,none"}
"""Of the harness's task `paper_…` of each benchmark, the one that is reported."""

LESS_TABLE_2 = {
    "meta-llama/Llama-2-7b-hf": {
        "mmlu": {"random": "46.5 (0.5)", "less": "50.2 (0.5)"},
        "tydiqa": {"random": "52.7 (0.4)", "less": "56.2 (0.7)"},
        "bbh": {"random": "38.9 (0.5)", "less": "41.5 (0.6)"},
    },
    "mistralai/Mistral-7B-v0.1": {
        "mmlu": {"random": "60.0", "less": "61.8"},
        "tydiqa": {"random": "56.9", "less": "60.3"},
        "bbh": {"random": "54.5", "less": "56.0"},
    },
}
"""Published figures, in brackets their standard deviations: table 2 of LESS, arXiv 2402.04333."""


class Benchmark(StrEnum):
    """What the picks are for."""

    MMLU = "mmlu"
    BBH = "bbh"
    TYDIQA = "tydiqa"


def experiment(
    benchmark: str,
    *,
    model: str,
    output_dir: Path,
    archive: Path | None = None,
    settings: Path | None = None,
    lm_eval: bool = True,
) -> str:
    """Select with GIST and LESS, fine-tune, evaluate; return the table as Markdown.

    What would stop the work after hours is looked at first; the model, when selection begins.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    given = read_yaml(HERE / "settings.yaml")
    if settings:
        given = merge(given, read_yaml(settings))
    pool, target, held_out = paths(benchmark, output_dir / "data")
    evaluation = {**given["evaluate"], "tests": {benchmark: str(held_out)}, "methods": METHODS}
    epochs = evaluation.pop("epochs")
    if lm_eval:
        own = {"lm_eval": [f"paper_{benchmark}"], "lm_eval_include": str(HERE / "tasks")}
        evaluation |= own | {"trust_remote_code": True}
    wanted = EvaluationConfig.build(evaluation)
    check_harness(wanted)
    write_data(archive or download(), benchmark, output_dir / "data")

    run = output_dir / "run"
    common = merge(given["select"], {"data": {"template": str(HERE / "tulu.jinja")}})
    picks = [
        gradsift.select(
            model=model, pool=str(pool), target={benchmark: str(target)}, output_dir=run,
            budget=common["policy"]["budget"], method=method,
            # those of the first method are the run's own, the others' lie beside them
            settings=merge(common, {"policy": {"name": None if number == 0 else method}}),
        ).selections[benchmark].picks
        for number, method in enumerate(METHODS)
    ]  # fmt: skip
    num_seen = epochs * picks[0].num_rows
    steps = ceil(num_seen / wanted.fine_tuning.batch_size)
    found = gradsift.evaluate(run, **merge(evaluation, {"fine_tuning": {"steps": steps}}))
    return table(found, benchmark, model)


def check_harness(settings: EvaluationConfig) -> None:
    """Make sure that the harness is installed, knows its tasks, and gets their data.

    Raises:
        ConfigError: If not.
    """
    harness = Harness.of(settings.lm_eval, settings.lm_eval_include, settings.trust_remote_code)
    if not harness.names:
        return
    try:
        harness.manager.load([*harness.names])
    except OSError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot load the data of {', '.join(harness.names)}: {error}\n"
            "It comes from the Hub; --no-lm-eval leaves the harness out"
        ) from None


def table(found: gradsift.Evaluation, benchmark: str, model: str) -> str:
    """Return a row for each method: our mean over its trainings, and the published figure.

    `hours`: of measuring, from the encoded pool to scores.
    """
    metric = METRICS[benchmark]
    published = LESS_TABLE_2.get(model, {}).get(benchmark, {})
    name = f"{benchmark}, {metric.partition(',')[0]}"
    rows = [["method", "picks", "trainings", name, "LESS's table 2", "held-out loss", "hours"]]
    for row in found.rows:
        score = row.tasks.get(f"paper_{benchmark} {metric}")
        rows.append([
            row.method,
            str(row.num_picks),
            str(row.seeds),
            "" if score is None else f"{100 * score:.1f}",
            published.get(row.method, ""),
            f"{row.loss:.4f} ± {row.loss_std:.4f}",
            "" if row.cost is None else f"{row.cost.seconds / 3600:.2f}",
        ])  # fmt: skip
    return "\n".join([f"# {benchmark}, {model}", "", markdown(rows), "", *found.verdicts, ""])


def main(
    benchmark: Annotated[Benchmark, typer.Argument(help="what the picks are for")],
    model: Annotated[str, typer.Option(help="base model: a local folder or a Hub id")],
    output_dir: Annotated[Path, typer.Option(help="folder for data, run and table")],
    archive: Annotated[
        Path | None, typer.Option(help="less-data.zip, if it is not to come from the Hub")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="what is to differ from settings.yaml")
    ] = None,
    lm_eval: Annotated[bool, typer.Option(help="also evaluate with lm-evaluation-harness")] = True,
) -> None:
    """Repeat the paper's experiment for one benchmark and one model."""
    logging.basicConfig(level="INFO", format="%(message)s")
    try:
        found = experiment(
            benchmark.value, model=model, output_dir=output_dir, archive=archive,
            settings=settings, lm_eval=lm_eval,
        )  # fmt: skip
    except GradsiftError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    (output_dir / "table.md").write_text(found, encoding="utf-8")
    typer.echo(found)


if __name__ == "__main__":
    typer.run(main)
