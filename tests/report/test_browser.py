"""The report in a real browser: it draws, searches, prints, and fits every screen.

Pictures of it are left in `build/screenshots`, or in the folder that `GRADSIFT_SCREENSHOTS` names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from plotly import graph_objects as go

import gradsift
from gradsift.config import Config
from gradsift.errors import shorten
from gradsift.methods.job import Job, open_job
from gradsift.methods.registry import METHODS
from gradsift.report.exhibits import Exhibit, plotly_json
from gradsift.report.figures import PICKS, SEQUENTIAL
from gradsift.report.overview import overview
from gradsift.report.page import render
from gradsift.report.target_page import target_page
from gradsift.runs.folder import Run
from gradsift.sections import read_yaml
from gradsift.selection.picks import candidates
from gradsift.selection.source_shares import SourceShare
from gradsift.selection.stages import RunStages
from reported import HOSTILE, SOURCE, Rows, make_run

pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
LONG = "a" * 200  # a word without a place to break


@pytest.fixture(scope="module")
def report(
    base: Path, pool_rows: Rows, target_rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A report of which every section has something, some of it as long as a word can be."""
    folder = make_run(base, pool_rows, target_rows, tmp_path_factory.mktemp("report"))
    config = Config.build(read_yaml(folder / "config.yaml"))
    stages = RunStages.of(config)
    job = open_job(stages.inputs, Run(folder))
    pool, scores = candidates(job.pool, config.data.columns), METHODS["gist"].scores(job)
    first, second = (target_page(job, stages, name, pool, scores[name], ()) for name in "tu")
    first = replace(
        first, evaluation=_evaluation(stale=False),
        geometry=[Exhibit("Coupling", "A sentence.", _matrix(), [["part", LONG], ["a", "b"]])],
    )  # fmt: skip
    long = replace(second.cards[0], id=LONG, source=LONG)
    second = replace(
        second, cards=[long, *second.cards[1:]], evaluation=_evaluation(stale=True),
        sources=[*second.sources, *(SourceShare(f"{n}{LONG}", 0, 0.0, 0.01) for n in range(20))],
    )  # fmt: skip
    path = folder / "full.html"
    path.write_text(render(_long_overview(job, stages), [first, second]), encoding="utf-8")
    return path


def _long_overview(job: Job, stages: RunStages) -> Any:
    found = overview(job, stages)
    return replace(found, model=f"/{LONG}/{LONG}", run=f"/{LONG}/run", pool=[f"/{LONG}/pool.jsonl"])


def _matrix() -> dict[str, Any]:
    names = [f"model.layers.{n}.self_attn.q_proj.lora_A" for n in range(8)]
    figure = go.Figure(go.Heatmap(z=[[n * m for n in range(8)] for m in range(8)], x=names, y=names,
                                  colorscale=SEQUENTIAL))  # fmt: skip
    return plotly_json(figure.update_layout(height=620))


def _evaluation(stale: bool) -> list[Exhibit]:
    figure = go.Figure(go.Scatter(x=["base", "gist"], y=[2.0, 1.0], mode="markers",
                                  marker_color=PICKS))  # fmt: skip
    table = [["method", "loss"], ["base", "2.0"], ["gist", "1.0"]]
    verdict = "20: gist beats random."
    return [Exhibit("Does it help?", "In words.", plotly_json(figure), table, verdict, stale)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: the page is not opened (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield running
        running.close()


def open_page(browser: Any, address: str, width: int = 1200, scheme: str = "light") -> Any:
    """Open the report without a network; what goes to the console is collected."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme,
        reduced_motion="reduce",
    )  # fmt: skip
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("requestfailed", lambda request: page.complaints.append(request.url))
    page.goto(address)
    page.wait_for_selector("[role=tabpanel]:not([hidden]) .figure .main-svg")
    page.wait_for_selector("[role=tabpanel]:not([hidden]) .cards .card")
    return page


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    page = open_page(browser, report.as_uri())
    yield page
    assert page.complaints == []
    assert page.evaluate("window.hacked") is None
    page.context.close()


def at(page: Any, id_: str) -> Any:
    return page.locator(f"[id='{id_}']")


def top_of(page: Any, id_: str) -> float:
    return at(page, id_).evaluate("(element) => element.getBoundingClientRect().top")


def test_it_draws_and_runs_nothing_foreign(page: Any) -> None:
    for name, count in (("t", 5), ("u", 4)):
        page.click(f"[id='tab/{name}']")
        figures = at(page, name).locator(".figure")
        assert figures.count() == count
        for number in range(count):
            drawn = figures.nth(number).locator("svg.main-svg").first
            drawn.wait_for(state="visible")
            assert drawn.bounding_box()["width"] > 300
            assert figures.nth(number).locator("g.trace, g.hm").count() >= 1
            assert len(figures.nth(number).get_attribute("aria-label")) > 15
    assert page.locator(".modebar-container *").count() == 0
    page.click("[id='tab/t']")
    section = at(page, "t/examples")
    section.locator("input[type=search]").fill("hacked")
    cards = section.locator(".card")
    assert cards.count() == 2
    assert HOSTILE in cards.first.locator(".text").last.inner_text()
    assert HOSTILE in cards.first.locator(".label").first.inner_text()
    assert shorten(SOURCE, 80) in cards.first.locator(".facts").inner_text()
    assert page.locator("img").count() == 0


def test_targets_and_sections_are_in_the_address(page: Any, browser: Any, report: Path) -> None:
    assert at(page, "t").is_visible()
    assert not at(page, "u").is_visible()
    page.click("[id='tab/u']")
    assert page.url.endswith("#u")
    assert at(page, "u").is_visible()
    assert not at(page, "t").is_visible()
    page.click("nav a[href='#u/target']")
    assert page.url.endswith("#u/target")
    assert 0 <= top_of(page, "u/target") < 200
    page.wait_for_selector("nav a[href='#u/target'][aria-current]")
    page.go_back()
    page.go_back()
    page.wait_for_selector("[id='t']:not([hidden])")
    assert not at(page, "u").is_visible()
    deep = open_page(browser, report.as_uri() + "#u/sure")
    assert at(deep, "u/sure").is_visible()
    assert 0 <= top_of(deep, "u/sure") < 200
    assert deep.complaints == []
    deep.context.close()


def test_it_works_from_the_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab/t"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "2px"
    for key, name in (("ArrowRight", "u"), ("ArrowRight", "t"), ("End", "u"), ("Home", "t")):
        page.keyboard.press(key)
        page.wait_for_selector(f"[id='{name}']:not([hidden])")
        assert page.evaluate("document.activeElement.id") == f"tab/{name}"
        assert at(page, f"tab/{name}").get_attribute("aria-selected") == "true"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#t/picks"


def test_headings_landmarks_and_labels_are_there(page: Any) -> None:
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].filter((h) => h.checkVisibility())"
        ".map((h) => Number(h.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for landmark in ("header", "nav[aria-label]", "main", "footer"):
        assert page.locator(landmark).count() == 1
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter((e) => !e.labels.length).length"
        " + [...document.querySelectorAll('section')].filter((s) =>"
        " !document.getElementById(s.getAttribute('aria-labelledby'))).length"
    )
    assert nameless == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    own = [id_ for id_ in ids if not id_.startswith(("clip", "topdefs", "defs", "legend"))]
    assert len(own) == len(set(own))


def test_examples_are_searched_filtered_ordered_and_marked(page: Any) -> None:
    section = at(page, "t/examples")

    def facts(part: str) -> list[str]:
        found = section.locator(".card .facts").all_inner_texts()
        return [piece for text in found for piece in text.split("\n") if piece.startswith(part)]

    def places() -> list[int]:
        return [int(text.removeprefix("place ")) for text in facts("place")]

    assert places() == [*range(1, 13)]
    assert section.locator(".found").inner_text() == "12 of 92 examples"
    section.locator(".more").click()
    assert places() == [*range(1, 25)]
    section.locator("[name=order]").select_option("-place")
    assert places()[0] == 92
    section.locator("[name=order]").select_option("tokens")
    tokens = [int(text.split()[0]) for text in section.locator(".facts span:last-child")
              .all_inner_texts()]  # fmt: skip
    assert tokens == sorted(tokens)
    section.locator("[name=status]").select_option("picked")
    assert section.locator(".found").inner_text() == "12 of 20 examples"
    section.locator("[name=status]").select_option("")
    section.locator("[name=source]").select_option(shorten(SOURCE, 80))
    assert section.locator(".card").count() == 2
    assert not section.locator(".more").is_visible()
    section.locator("input").fill("nothing is like this")
    assert section.locator(".found").inner_text() == "No example is like that."
    section.locator("input").fill("")
    section.locator("[name=source]").select_option("")
    section.locator("[name=order]").select_option("place")
    card = section.locator(".card:has(.winner mark)").first
    left, right = (
        {word.lower() for word in card.locator(f"{side} mark").all_inner_texts()}
        for side in (".pair > div:first-child", ".winner")
    )
    assert left == right
    plain = card.locator(".pair > div:first-child .text").all_inner_texts()
    assert all(word in " ".join(plain).lower() for word in right)


def test_a_figure_has_the_colours_of_the_page(page: Any) -> None:
    def bars() -> list[str]:
        fill = "(elements) => [...new Set(elements.map((e) => getComputedStyle(e).fill))]"
        return at(page, "t").locator("[data-figure=scores] .bars path").evaluate_all(fill)

    def keys() -> list[str]:
        colour = "(element) => getComputedStyle(element).backgroundColor"
        places = ("i.pool", "i.picks")
        return [at(page, "t/picks").locator(p).first.evaluate(colour) for p in places]

    light = bars()
    assert light == keys()
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(500)
    assert bars() == keys() != light


def test_on_paper_there_is_the_chosen_target_alone(page: Any) -> None:
    page.click("[id='tab/u']")
    page.wait_for_selector("[id='u'] .figure .main-svg")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 690, "height": 900})
    assert not page.locator(".bar").is_visible()
    assert not page.locator(".contents").is_visible()
    assert at(page, "u").is_visible()
    assert not at(page, "t").is_visible()
    page.wait_for_function("document.documentElement.scrollWidth <= 690")
    assert at(page, "u").locator("details:not([open])").count() == 0
    text = page.evaluate("getComputedStyle(document.body).color")
    assert sum(map(int, text[4:-1].split(","))) < 150  # dark: on paper the scheme is light
    for figure in at(page, "u").locator(".figure svg.main-svg").all():
        assert figure.bounding_box()["width"] <= 690
    picture(page, "print")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert at(page, "u").locator("details:not([open])").count() > 0


def picture(page: Any, name: str) -> None:
    """Leave a picture of the whole page among what the tests make."""
    root = Path(__file__).parents[2] / "build" / "screenshots"
    folder = Path(os.environ.get("GRADSIFT_SCREENSHOTS", root))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 800, 1400])
def test_on_every_screen_nothing_is_wider_than_it(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    for name in "tu":
        page = open_page(browser, f"{report.as_uri()}#{name}", width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        background, text = page.evaluate(
            "(({backgroundColor, color}) => [backgroundColor, color])"
            "(getComputedStyle(document.body))"
        )
        brightness = [sum(map(int, value[4:-1].split(","))) for value in (background, text)]
        assert (brightness[0] > brightness[1]) == (scheme == "light")
        filled = (
            at(page, name)
            .locator(".figure text.xtitle")
            .first.evaluate("(element) => getComputedStyle(element).fill")
        )
        assert (sum(map(int, filled[4:-1].split(","))) < 380) == (scheme == "light")
        picture(page, f"{name}-{width}-{scheme}")
        assert page.complaints == []
        page.context.close()


def test_the_report_of_the_command_opens_too(browser: Any, report: Path) -> None:
    page = open_page(browser, gradsift.write_report(report.parent).as_uri())
    assert at(page, "t/evaluation").locator("pre").inner_text().startswith("gradsift evaluate ")
    assert page.complaints == []
    page.context.close()
