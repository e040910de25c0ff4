"""The report: what it says agrees with the files of the run, and it works in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
from gradsift.report import figures
from gradsift.report.overview import overview
from gradsift.report.target_page import TargetPage, target_page
from gradsift.runs.folder import Run
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.sections import read_yaml
from gradsift.selection import stability
from gradsift.selection.picks import candidates
from gradsift.selection.policies import Candidates
from gradsift.selection.score_table import read_scores
from gradsift.selection.source_shares import SourceShare
from gradsift.selection.stability import compare_with_twice_the_rank, measure_sample, noise_at_cut
from gradsift.selection.stages import RunStages

Rows = list[dict[str, Any]]

HOSTILE = "<script>hacked=1</script></script><img src=x onerror='hacked=1'>"
SOURCE = HOSTILE + "<a href='https://outside.example'>here</a>"  # Plotly would make it a link
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(
    base: Path, pool_rows: Rows, target_rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two targets, one of which keeps only a part of its directions; a hostile pool."""
    where = tmp_path_factory.mktemp("report")

    def write(name: str, rows: list[Any]) -> Path:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (where / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return where / name

    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": HOSTILE}]
    evil = {"messages": turns, "id": HOSTILE, "source": SOURCE}
    pool = write("pool.jsonl", [*pool_rows, evil, evil, "{", {"messages": []}])
    targets = {"t": write("t.jsonl", [*target_rows, evil]), "u": write("u.jsonl", pool_rows[:24])}
    config = configure(
        base, pool, targets, policy={"budget": "20", "decontaminate": "exact"},
        gist={"rank": "60%"},
    )  # fmt: skip
    run(config, where / "run")
    return where / "run"


@pytest.fixture
def job(folder: Path) -> Job:
    return open_job(
        RunStages.of(Config.build(read_yaml(folder / "config.yaml"))).inputs, Run(folder)
    )


def pool_of(job: Job) -> Candidates:
    return candidates(job.pool, job.config.data.columns)


def page_of(job: Job, name: str) -> TargetPage:
    scores = METHODS["gist"].scores(job)[name]
    return target_page(job, RunStages.of(job.config), name, pool_of(job), scores)


def test_the_overview_agrees_with_the_run(folder: Path, job: Job) -> None:
    found = overview(job, RunStages.of(job.config))
    assert (found.method, found.budget, found.num_pool) == ("gist", "20", 92)
    assert [(name, picks) for name, _, _, picks, _ in found.targets] == [("t", 20), ("u", 20)]
    picks = pq.read_table(folder / "selected/t.parquet")
    assert found.targets[0][4] == sum(picks["num_tokens"].to_pylist())
    sizes = {name: size for name, _, size in found.stages}
    assert sizes["scores/gist"] == (folder / "scores/gist.parquet").stat().st_size
    assert sizes["coordinates"] == sum(
        p.stat().st_size for p in (folder / "coordinates").rglob("*") if p.is_file()
    )
    assert [(row[0], row[2]) for row in found.rejected] == [("pool", 1), ("pool", 1)]
    assert {Path(row[3]).name for row in found.rejected} == {"pool.jsonl:93", "pool.jsonl:94"}
    again = found.command.split()
    assert Config.build(read_yaml(again[again.index("--config") + 1])) == job.config


def test_a_targets_page_agrees_with_the_run(folder: Path, job: Job) -> None:
    page = page_of(job, "t")
    scores = pq.read_table(folder / "scores/gist.parquet").to_pandas()
    picks = pq.read_table(folder / "selected/t.parquet").to_pandas()
    assert page.cut == pytest.approx(picks.score.min())
    assert sum(page.sources[i].num_picks for i in range(len(page.sources))) == 20
    statuses = Counter(line.status for line in page.lines)
    assert statuses["picked"] == 20
    assert page.refusals == {"repeats the target": 2}
    assert statuses["refused: repeats the target"] == 2
    assert sum(statuses.values()) == 92  # all of this small pool
    for line in page.lines:
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
    coordinates = job.pool_pass("coordinates").read("coordinates/u", checkpoint.label)[:]
    norms = job.pool_pass("coordinates").read("gradient_norm", checkpoint.label)[:]
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
    scores = {name: read_scores(folder, "gist", name) for name in "tu"}
    with monkeypatch.context() as everything:
        everything.setattr(stability, "_DENSITY", 10**6)  # all of the pool is in the sample
        measure_sample(job, scores)
        whole = compare_with_twice_the_rank(job, "u", np.array(own), refused, pool_of(job))
    measure_sample(job, scores)
    assert whole.sampled == 92
    with monkeypatch.context() as nothing:  # no further directions: the ranking stays as it is
        nothing.setattr(stability, "_wider", gist.stored_subspace)
        nothing.setattr(stability, "_DENSITY", 10)
        measure_sample(job, scores)
        same = compare_with_twice_the_rank(job, "u", np.array(own), refused, pool_of(job))
    measure_sample(job, scores)
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


def test_the_page_is_small_and_loads_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 7_000_000
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # the libraries themselves
    # in a tag: a text may speak of links, and its `<` is no tag's
    assert not re.search(r"<\w[^>]*\s(src|href)=[\"']?(https?:)?//", outside)
    assert "outside.example" in outside
    assert "@import" not in outside
    assert "<script>hacked" not in page


def test_source_names_are_no_markup_in_figures() -> None:
    drawn = figures.sources([SourceShare(SOURCE, 1, 1.0, 0.5)])
    assert all("<" not in name for bars in drawn["data"] for name in bars["y"])
    assert "&lt;a href='https://outside.example'&gt;" in drawn["data"][0]["y"][0]


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
    assert "picks spread evenly over the ranking" in page
    assert "How far scores would move with other target examples is not known here" in page
    assert "5. What the target looks like" not in page
    tables = json.loads(re.search(r'id="tables">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    statuses = Counter(row[0] for row in tables["t"]["rows"])
    assert statuses == {"picked": 300, "best not picked": 100, "lowest": 50}


def test_an_unfinished_run_has_no_report(base: Path, write: Write, tmp_path: Path) -> None:
    rows = [{"prompt": "What?", "completion": "That."}]
    config = configure(base, write("p.jsonl", rows), {"t": write("t.jsonl", rows)})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml())
    (tmp_path / "run/.owner").touch()
    with pytest.raises(RunError, match="has not finished; run `gradsift select` with it again"):
        gradsift.write_report(tmp_path / "run")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: the page is not opened (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """The report, opened without a network; what goes to the console is collected."""
    gradsift.write_report(folder)
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("requestfailed", lambda request: page.complaints.append(request.url))
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("#target-t table.examples tbody tr")
    page.wait_for_selector("#target-t .figure .main-svg")
    yield page
    context.close()


@pytest.mark.slow
def test_in_a_browser_it_opens_draws_and_runs_nothing_foreign(page: Any) -> None:
    assert page.complaints == []
    assert page.evaluate("window.hacked") is None
    for name in "tu":
        page.click(f"#tab-{name}")
        figures = page.locator(f"#target-{name} .figure")
        assert figures.count() == 4
        for number in range(figures.count()):
            drawn = figures.nth(number).locator("svg.main-svg").first
            drawn.wait_for(state="visible")
            assert drawn.bounding_box()["width"] > 300
            assert figures.nth(number).locator("g.trace").count() >= 1
    page.click("#tab-t")
    page.fill("#target-t input[type=search]", "hacked")
    rows = page.locator("#target-t table.examples tbody tr")
    assert HOSTILE in rows.first.inner_text()
    rows.first.locator("summary").first.click()
    assert HOSTILE in rows.first.locator("pre").first.inner_text()
    assert page.locator("#target-t img").count() == 0
    assert page.evaluate("window.hacked") is None
    assert page.complaints == []


@pytest.mark.slow
def test_in_a_browser_tabs_switch_and_the_table_filters_and_sorts(page: Any) -> None:
    assert page.locator("#target-t").is_visible()
    assert not page.locator("#target-u").is_visible()
    page.click("#tab-u")
    assert page.locator("#target-u").is_visible()
    assert not page.locator("#target-t").is_visible()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#target-t").is_visible()
    table = page.locator("#target-t table.examples")

    def column(number: int) -> list[str]:
        return table.locator(f"tbody tr td:nth-child({number})").all_inner_texts()

    assert column(2) == [str(number) for number in range(1, 11)]
    heads = table.locator("thead th")

    def sort(number: int, direction: str) -> None:
        """Click a head until it says so; the table is drawn a moment after."""
        for _ in range(3):
            heads.nth(number).click()
            page.wait_for_timeout(300)
            if heads.nth(number).get_attribute("aria-sort") == direction:
                return
        raise AssertionError(direction)

    sort(2, "ascending")
    scores = [float(text) for text in column(3)]
    assert scores == sorted(scores)
    sort(1, "descending")
    assert column(2)[0] == "92"
    page.select_option("#target-t .filters select[data-column='0']", "picked")
    assert {*column(1)} == {"picked"}
    assert "of 20 entries" in page.locator("#target-t .dt-info").inner_text()
    page.select_option("#target-t .filters select[data-column='0']", "")
    page.select_option("#target-t .filters select[data-column='4']", SOURCE)
    assert column(5) == [SOURCE] * 2
    assert page.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    browser: Any, folder: Path, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": 380, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("#target-t .figure .main-svg")
    page.wait_for_selector("#target-t table.examples tbody tr")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    background, text = page.evaluate(
        "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    brightness = [sum(map(int, re.findall(r"\d+", value)[:3])) for value in (background, text)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    filled = page.locator("#target-t .figure text.xtitle").first.evaluate(
        "(element) => getComputedStyle(element).fill"
    )
    assert (sum(map(int, re.findall(r"\d+", filled)[:3])) < 380) == (scheme == "light")
    context.close()
