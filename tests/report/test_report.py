"""The report: what it says agrees with the files of the run."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradsift
from conftest import Write, configure
from gradsift.config import Config
from gradsift.errors import RunError
from gradsift.methods import gist
from gradsift.methods.job import Job, open_job
from gradsift.methods.registry import METHODS
from gradsift.pipeline import run
from gradsift.report import cards, wording
from gradsift.report.exhibits import Exhibit
from gradsift.report.overview import overview
from gradsift.report.page import render
from gradsift.report.target_page import TargetPage, _all_sources, target_page
from gradsift.runs.folder import Run
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.sections import read_yaml
from gradsift.selection import stability
from gradsift.selection.picks import candidates, read_selections
from gradsift.selection.policies import Candidates
from gradsift.selection.score_table import read_scores
from gradsift.selection.source_shares import SourceShare
from gradsift.selection.stability import compare_with_twice_the_rank, measure_sample, noise_at_cut
from gradsift.selection.stages import RunStages
from reported import HOSTILE, make_run

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(
    base: Path, pool_rows: Rows, target_rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two targets, one of which keeps only a part of its directions; a hostile pool."""
    return make_run(base, pool_rows, target_rows, tmp_path_factory.mktemp("report"))


@pytest.fixture
def job(folder: Path) -> Job:
    return open_job(
        RunStages.of(Config.build(read_yaml(folder / "config.yaml"))).inputs, Run(folder)
    )


def pool_of(job: Job) -> Candidates:
    return candidates(job.pool, job.config.data.columns)


def page_of(job: Job, name: str) -> TargetPage:
    scores = METHODS["gist"].scores(job)[name]
    return target_page(job, RunStages.of(job.config), name, pool_of(job), scores, ())


def test_the_overview_agrees_with_the_run(folder: Path, job: Job) -> None:
    kept = read_selections(job.folder)
    found = overview(job, RunStages.of(job.config), kept)
    assert found.others == []
    assert (found.method, found.budget, found.num_pool) == ("gist", "20", 92)
    assert [(name, picks) for name, _, _, picks, _ in found.targets] == [("t", 20), ("u", 20)]
    picks = pq.read_table(folder / "selected/t.parquet")
    assert found.targets[0][4] == sum(picks["num_tokens"].to_pylist())
    sizes = {name: size for name, _, size in found.stages}
    assert sizes["scores/gist"] == (folder / "scores/gist.parquet").stat().st_size
    assert sizes["coordinates/u"] == sum(
        p.stat().st_size for p in (folder / "coordinates/u").rglob("*") if p.is_file()
    )
    assert [(row[0], row[2]) for row in found.rejected] == [("pool", 1), ("pool", 1)]
    assert {Path(row[3]).name for row in found.rejected} == {"pool.jsonl:93", "pool.jsonl:94"}
    again = found.command.split()
    assert Config.build(read_yaml(again[again.index("--config") + 1])) == job.config


def test_a_targets_page_agrees_with_the_run(folder: Path, job: Job) -> None:
    page = page_of(job, "t")
    scores = pq.read_table(folder / "scores/gist.parquet").to_pandas()
    picks = pq.read_table(folder / "selected/t.parquet").to_pandas()
    assert page.edge is not None
    assert page.edge.cut == pytest.approx(picks.score.min())
    assert sum(page.sources[i].num_picks for i in range(len(page.sources))) == 20
    statuses = Counter(card.status for card in page.cards)
    assert statuses["picked"] == 20
    assert page.refusals == {"repeats the target": 2}
    assert statuses["refused: repeats the target"] == 2
    assert sum(statuses.values()) == 92  # all of this small pool
    for line in page.cards:
        row = scores[scores.id == line.id].iloc[0]
        assert line.score == pytest.approx(row["t/score"])
        assert line.best == row["t/best"]
        assert line.share == pytest.approx(row["t/projected_norm"] / row.gradient_norm)
        assert line.place == 1 + (scores["t/score"] > row["t/score"]).sum() or line.id == HOSTILE
        assert line.best in page.winners
    assert page.scores.pool.sum() == pytest.approx(1)
    assert page.lengths.picks.sum() == pytest.approx(1)
    [change] = [c for c in page.changes if c.settings == "aggregation task-mean"]
    other = gradsift.run(
        job.config.model_copy(
            update={"gist": job.config.gist.model_copy(update={"aggregation": "task-mean"})}
        ),
        folder,
    )
    shared = len({*picks.row} & {*other.selections["t"].picks["row"].to_pylist()})
    run(job.config, folder)
    assert change.jaccard == pytest.approx(shared / (40 - shared))


def test_directions_are_those_of_the_coordinates(folder: Path, job: Job) -> None:
    from gradsift.methods.gist import stored_subspace

    page = page_of(job, "u")
    [checkpoint] = job.checkpoints()
    coordinates = gist.COORDINATES.read(job, "u", checkpoint.label)[:]
    norms = gist.COORDINATES.norms(job, "u", checkpoint.label)[:]
    loadings = coordinates / norms[:, None]
    ids = job.pool.column("id").to_pylist()
    sigma = stored_subspace(job, "u", checkpoint).singular_values
    for number, direction in enumerate(page.directions):
        assert direction.positive[0][0] == pytest.approx(loadings[:, number].max())
        assert direction.negative[0][0] == pytest.approx(loadings[:, number].min())
        assert direction.positive[0][1] == ids[loadings[:, number].argmax()]
        assert direction.variance == pytest.approx(sigma[number] ** 2 / (sigma**2).sum())


def test_twice_the_rank_agrees_with_a_run_of_that_rank(
    folder: Path, job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spectrum = json.loads((folder / "targets/u/spectrum.json").read_text())["epoch-1"]
    assert 2 * spectrum["rank"] < spectrum["span"], spectrum
    [change] = [c for c in page_of(job, "u").changes if c.sampled]
    assert change.settings == f"up to twice the rank ({2 * spectrum['rank']})"
    wider = job.config.gist.model_copy(update={"rank": 2 * spectrum["rank"]})
    targets = {"u": job.config.data.targets["u"]}
    data = job.config.data.model_copy(update={"targets": targets})
    adapter = str(folder / "warmup/epoch-1")
    warmup = job.config.warmup.model_copy(update={"adapter": adapter})
    config = job.config.model_copy(update={"gist": wider, "data": data, "warmup": warmup})
    other = run(config, tmp_path / "wider").selections["u"].picks["row"].to_pylist()
    own = pq.read_table(folder / "selected/u.parquet")["row"].to_pylist()
    shared = len({*own} & {*other})
    refused = pq.read_table(folder / "selected/u.refused.parquet")["row"].to_numpy()
    assert compare_with_twice_the_rank(job, "u", np.array(own), refused, pool_of(job)) == change
    scores = read_scores(folder, "gist", "u")
    with monkeypatch.context() as everything:
        everything.setattr(stability, "_DENSITY", 10**6)  # all of the pool is in the sample
        measure_sample(job, "u", scores)
        whole = compare_with_twice_the_rank(job, "u", np.array(own), refused, pool_of(job))
    measure_sample(job, "u", scores)
    assert whole.sampled == 92
    with monkeypatch.context() as nothing:  # no further directions: the ranking stays as it is
        nothing.setattr(stability, "_wider", gist.stored_subspace)
        nothing.setattr(stability, "_DENSITY", 10)
        measure_sample(job, "u", scores)
        same = compare_with_twice_the_rank(job, "u", np.array(own), refused, pool_of(job))
    measure_sample(job, "u", scores)
    assert same.sampled is not None
    assert same.sampled < 80
    assert same.jaccard == 1
    assert whole.jaccard == pytest.approx(shared / (40 - shared))


def test_the_sample_stands_for_the_whole() -> None:
    """Weighted counts are those of the pool, wherever in the ranking they are taken."""
    scores = np.random.default_rng(1).random(20_000)
    chances, places = stability._chances(scores), np.argsort(np.argsort(-scores))
    drawn = np.random.default_rng(0).random(len(scores)) < chances
    assert 200 < drawn.sum() < 400
    for first, last in ((0, 40), (40, 1000), (1000, 20_000)):
        within = drawn & (places >= first) & (places < last)
        assert (1 / chances[within]).sum() == pytest.approx(last - first, rel=0.25)


def test_noise_is_that_of_leaving_half_of_the_target_out() -> None:
    rng = np.random.default_rng(0)
    pool, target = rng.standard_normal((500, 8)), rng.standard_normal((30, 8))
    aligned = Alignment(Cosines([View(pool, target)]), ["a"] * 30, "mean-cosine")
    scores = aligned.scores()[0]
    cut = float(np.sort(scores)[-50])
    noise = noise_at_cut(aligned, scores, cut)
    assert noise is not None
    unit = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (pool, target))
    cosines = np.matmul(next(unit), next(unit).T)
    # the mean of half of n, drawn without replacement, strays by s / √n from the whole mean
    expected = np.sqrt(np.mean(cosines.var(axis=1, ddof=1)) / 30)
    assert noise.width == pytest.approx(expected, rel=0.25)
    assert noise.num_within == (np.abs(scores - cut) <= noise.width).sum()
    few = Alignment(Cosines([View(pool, target[:3])]), ["a"] * 3, "max")
    assert noise_at_cut(few, few.scores()[0], 0.5) is None


def test_an_unfinished_run_has_no_report(base: Path, write: Write, tmp_path: Path) -> None:
    rows = [{"prompt": "What?", "completion": "That."}]
    config = configure(base, write("p.jsonl", rows), {"t": write("t.jsonl", rows)})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml())
    (tmp_path / "run/.owner").touch()
    with pytest.raises(RunError, match="has not finished; run `gradsift select` with it again"):
        gradsift.write_report(tmp_path / "run")


def test_the_page_is_small_and_loads_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 6_000_000
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # our script and Plotly
    # in a tag: a text may speak of links, and its `<` is no tag's
    assert not re.search(r"<\w[^>]*\s(src|href)=[\"']?(https?:)?//", outside)
    assert "outside.example" in outside
    assert "@import" not in outside
    assert "url(" not in outside
    assert "<script>hacked" not in page
    assert "Permission is hereby granted" in page  # Plotly's license goes where its code goes


def test_no_data_makes_the_page_larger_than_12_megabytes(job: Job) -> None:
    page = page_of(job, "t")
    worst = [cards._cut([("user", text * 2000)] * 9) for text in "<漢"]
    ids = [f"{number}-{'漢' * 5000}" for number in range(500)]
    shown = [replace(page.cards[0], id=id_, source=id_, best=id_, turns=worst[0]) for id_ in ids]
    page = replace(page, cards=shown, winners=dict.fromkeys(ids, worst[1]))
    pages = [replace(page, key=f"{name}-{number}") for name in "tu" for number in (1, 2)]
    rendered = render(overview(job, RunStages.of(job.config)), pages).encode()
    assert 9_000_000 < len(rendered) < 12_000_000


def test_the_page_says_first_what_was_picked_and_by_which_rules(folder: Path, job: Job) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    found = page_of(job, "t")
    top = found.sources[0]
    assert top.num_picks == max(share.num_picks for share in found.sources)
    sentence = f"<b>20 of 92 examples</b> for t; {top.of_picks:.0%} from {top.source}, "
    assert sentence.replace("%", " %") + f"{top.lift:.1f} times its share." in page
    first = page[page.index('id="t/picks"') : page.index('id="t/sure"')]
    for setting in ("budget=20", "strategy=top", "source_cap=none", "duplicates=exact"):
        assert setting in first
    assert "repeats of target examples are refused <code>decontaminate=exact</code>" in first
    assert "Not measured yet" in first
    assert f"gradsift evaluate {folder} --test t=FILE" in first
    order = [page.index(f'id="{place}"') for place in (
        "t/picks", "t/sure", "t/examples", "t/target", "t/evaluation", "t/geometry", "u/picks",
        "/run",
    )]  # fmt: skip
    assert order == sorted(order)


def test_sources_without_a_pick_are_shown(job: Job) -> None:
    pool, picks = pa.array(["a"] * 2 + ["b"] * 5 + ["c"] * 3), pa.array(["a", "a", "c"])
    shares = _all_sources(pool, picks)
    assert [share.source for share in shares] == ["a", "c", "b"]
    assert shares[-1] == SourceShare("b", 0, 0.0, 0.5)
    assert sum(share.of_pool for share in shares) == pytest.approx(1)
    page = render(
        overview(job, RunStages.of(job.config)), [replace(page_of(job, "t"), sources=shares)]
    )
    assert page.count('<tr class="none">') == 1
    assert '<tr class="none"><th scope="row"><span class="name">b</span></th>' in page


def test_the_verdict_stands_on_top_and_says_when_it_is_of_other_picks(job: Job) -> None:
    exhibit = Exhibit("Does it help? (20)", "Losses.", verdict="20: gist beats random.")
    for stale in (False, True):
        shown = replace(page_of(job, "t"), evaluation=[replace(exhibit, stale=stale)])
        page = render(overview(job, RunStages.of(job.config)), [shown])
        first = page[page.index('id="t/picks"') : page.index('id="t/sure"')]
        assert "20: gist beats random." in first
        assert "Not measured yet" not in first
        assert ("Measured for other picks of this folder, not for these" in first) == stale
        assert (f"--config {job.folder.path}/evaluation/config.yaml" in first) == stale


def test_what_to_do_about_chance_is_said_in_the_runs_own_numbers(job: Job) -> None:
    page = page_of(job, "t")
    assert page.edge is not None
    assert page.edge.noise is not None
    assert page.edge.at_twice is not None
    scores = read_scores(job.folder.path, "gist", "t")
    rows = page.selection.picks["row"].to_numpy()
    assert page.edge.num_sure == (scores[rows] > page.edge.cut + page.edge.noise.width).sum()
    there = np.sort(scores)[-40]
    aligned = METHODS["gist"].scores(job)["t"]
    assert page.edge.at_twice == noise_at_cut(aligned, scores, float(there))
    told = " ".join(wording.how_sure(page))
    assert f"{page.edge.noise.num_within} examples lie that near to it, against 20 picks" in told
    commands = [command for _, command in wording.advice(page, "runs/a b")]
    assert commands == [
        "gradsift evaluate 'runs/a b' --test t=FILE --method gist --seeds 5",
        "gradsift select --config 'runs/a b/config.yaml' --output-dir 'runs/a b-more' "
        "--target t=FILE",
        "gradsift select --config 'runs/a b/config.yaml' --output-dir 'runs/a b' --budget 40 "
        "--name twice",
    ]
    unknown = replace(page, edge=None)
    assert "is not known here" in wording.how_sure(unknown)[0]
    assert wording.advice(unknown, "run") == []


def test_of_many_picks_a_part_is_shown_and_it_says_so(
    base: Path, adapter: Path, write: Write, tmp_path: Path
) -> None:
    from gradsift.demo.skills import make_examples

    rows = make_examples("sorting", 900, seed=1)
    config = configure(
        base, write("pool.jsonl", rows), {"t": write("t.jsonl", make_examples("sql", 3, seed=2))},
        policy={"budget": "700", "duplicates": "keep"}, method="length",
    )  # fmt: skip
    run(config, tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "the picks spread evenly over the ranking" in page
    assert "How far scores would move with other target examples is not known here" in page
    assert "What the target looks like" not in page
    assert "all from sorting, the pool’s only source." in page
    assert "repeats were not looked for" in page
    found = re.search(r'data-name="examples">(.*?)</script>', page, re.S)
    assert found is not None
    statuses = Counter(row[0] for row in json.loads(found[1])["t"]["rows"])
    assert statuses == {"picked": 300, "best not picked": 100, "lowest": 50}
