"""An index: one pass without a target, and then any target, as near to the exact way as is said."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import gradsift
import tiny_models
from conftest import QUICK, Write
from gradsift.config import Config
from gradsift.demo.skills import make_examples
from gradsift.errors import ConfigError, GradsiftError, RunError
from gradsift.gradients.per_example import gradient_rows
from gradsift.gradients.sketch import (
    allocate,
    draw_signs,
    fit_sketch,
    load_sketch,
    quantize,
    read_expected_error,
)
from gradsift.sections import merge

Rows = list[dict[str, Any]]
SETTINGS = {k: v for k, v in QUICK.items() if k != "policy"} | {
    "index": {"dimension": 256, "samples": 40}
}
SELECT = {"policy": {"decontaminate": "none"}}


@pytest.fixture
def files(write: Write, pool_rows: Rows, target_rows: Rows) -> dict[str, Path]:
    others = make_examples("sorting", 4, seed=5)
    return {
        "pool": write("pool.jsonl", pool_rows),
        "t": write("t.jsonl", target_rows),
        "u": write("u.jsonl", others),
    }


@pytest.fixture
def folder(base: Path, files: dict[str, Path], tmp_path: Path) -> Path:
    """A finished index."""
    given = {"model": str(base), "pool": str(files["pool"])}
    return gradsift.index(tmp_path / "index", **given, settings=SETTINGS)


def scores(result: gradsift.RunResult, target: str = "t") -> np.ndarray:
    return result.scores()[f"{target}/score"].to_numpy()


def test_an_index_scores_nearly_as_the_pass_does(
    base: Path, folder: Path, files: dict[str, Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    index = gradsift.open_index(folder)
    for method in ("gist", "cosine"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "gradsift"):
            found = index.select(
                target={"t": str(files["t"])}, method=method, budget="9", settings=SELECT
            )
        assert "batches of up to" not in caplog.text  # no pass over the pool
        exact = gradsift.select(
            model=str(base), pool=str(files["pool"]), target={"t": str(files["t"])}, method=method,
            output_dir=tmp_path / "exact", budget="9", settings=merge(SETTINGS, SELECT),
        )  # fmt: skip
        assert spearmanr(scores(found), scores(exact)).statistic > 0.97, method
        assert len(found.selections["t"].picks) == 9
    assert repr(index).startswith(f"Index({str(folder)!r}: ")


def test_any_folder_may_ask_and_says_how_sure_it_is(
    folder: Path, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = {name: str(files[name]) for name in "tu"}
    both = gradsift.open_index(folder).select(target=target, budget="9", settings=SELECT)
    with caplog.at_level(logging.INFO, "gradsift"):
        other = gradsift.select(
            index=folder, target={"u": target["u"]}, output_dir=tmp_path / "other", budget="9",
            settings=SELECT,
        )  # fmt: skip
    assert "data/pool: already done" in caplog.text
    assert "warmup: already done" in caplog.text
    np.testing.assert_array_equal(scores(other, "u"), scores(both, "u"))
    picked = other.selections["u"].picks["id"][0].as_py()
    [said] = gradsift.explain(tmp_path / "other", picked)
    assert said.expected_error is not None
    assert 0 < said.expected_error < 0.1
    assert f"off by about {said.expected_error:.2g}" in said.text()
    report = (tmp_path / "other/report.html").read_text(encoding="utf-8")
    assert f"is off by about {said.expected_error:.2g}" in report
    assert not (tmp_path / "other/stability").exists()


def test_what_cannot_be_asked_is_said(
    base: Path, folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    target = {"t": str(files["t"])}

    def ask(**given: Any) -> None:
        gradsift.select(
            **{"index": folder, "target": target, "output_dir": tmp_path / "asked", **given}
        )

    with pytest.raises(ConfigError, match=r"serves the methods gist, cosine; method=rds"):
        ask(method="rds")
    with pytest.raises(RunError, match=r"cannot serve this run: .*lora.rank was 4, is now 2"):
        ask(settings={"lora": {"rank": 2}})
    with pytest.raises(RunError, match=r"cannot serve this run: data.pool was .*, is now "):
        ask(pool=str(files["t"]))
    with pytest.raises(RunError, match=r"cannot serve this run: .*dimension was 256, is now 300"):
        ask(settings={"index": {"dimension": 300}})
    with pytest.raises(ConfigError, match=r"no target: expected one file"):
        ask(target={})
    with pytest.raises(RunError, match=r"holds no index; make one there with `gradsift index`"):
        ask(index=tmp_path / "nothing")
    gradsift.select(
        model=str(base), pool=str(files["pool"]), target=target, output_dir=tmp_path / "run",
        budget="9", method="bm25",
    )  # fmt: skip
    with pytest.raises(RunError, match=r"holds no index; make one there"):
        gradsift.open_index(tmp_path / "run")
    small = merge(SETTINGS, {"index": {"dimension": 8}})
    with pytest.raises(ConfigError, match=r"index.dimension=8 leaves less than two numbers"):
        gradsift.index(tmp_path / "small", model=str(base), pool=str(files["pool"]), settings=small)


@pytest.mark.slow
def test_an_index_goes_on_and_can_be_made_in_the_folder_of_a_run(
    base: Path, folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    shards = sorted((folder / "index/pool").rglob("*.safetensors"))
    before = {path: path.read_bytes() for path in shards}
    shards[1].unlink()
    given = {"model": str(base), "pool": str(files["pool"]), "settings": SETTINGS}
    with pytest.raises(RunError, match=r"0000000032.safetensors is gone; run `gradsift index`"):
        gradsift.open_index(folder).select(target={"t": str(files["t"])}, settings=SELECT)
    gradsift.index(folder)
    assert {path: path.read_bytes() for path in shards} == before
    run = tmp_path / "run"
    exact = gradsift.select(**given, target={"t": str(files["t"])}, output_dir=run, budget="9")
    kept = (run / "config.yaml").read_bytes()
    gradsift.index(run)
    assert (run / "config.yaml").read_bytes() == kept
    for path in shards:
        assert (run / path.relative_to(folder)).read_bytes() == before[path]
    again = gradsift.select(**given, target={"t": str(files["t"])}, output_dir=run, budget="9")
    np.testing.assert_array_equal(scores(again), scores(exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_sketches_are_those_of_gradients_as_far_as_is_said(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": {"name": "m"}, "data": {"pool": "p"}}
    model = tiny_models.adapted("llama", dtype=dtype)
    sample, others = tiny_models.examples(40, seed=1), tiny_models.examples(60, seed=2)
    given |= {"index": {"dimension": 400}}
    seeds = range(4)
    for seed in seeds:
        given["index"]["seed"] = seed
        fit_sketch(model, sample, Config.build(given), tmp_path / f"{seed}", lambda _: None)
    rows = torch.cat([*gradient_rows(model, others, 200).values()], dim=1)
    exact = rows @ rows.T
    lengths = exact.diagonal().sqrt()
    exact = exact / lengths / lengths[:, None]
    off = []
    for seed in seeds:
        sketch = load_sketch(model, tmp_path / f"{seed}")
        assert sketch.dimension == 400
        found = sketch.project(model, others, 200)
        torch.testing.assert_close(found.gradient_norms, lengths, rtol=1e-4, atol=0)
        numbers, steps = quantize(found.coordinates)
        for vectors in (found.coordinates, numbers * steps[:, None]):
            unit = vectors / lengths[:, None]
            off.append((unit @ unit.T - exact).fill_diagonal_(0))
    expected = read_expected_error(tmp_path / "0")
    measured = float(torch.stack(off).square().mean().sqrt())
    assert 0.5 * expected < measured < 2 * expected, (measured, expected)
    bias = torch.stack(off).mean(0)
    assert float(bias.square().mean().sqrt()) < 0.75 * measured  # chance, which seeds take out


def test_numbers_go_where_they_help_most() -> None:
    rng = np.random.default_rng(0)
    energies = [np.sort(rng.random(12))[::-1] ** 4 / 24 for _ in range(6)]
    totals = np.array([own.sum() for own in energies]) + rng.random(6) / 6
    for dimension in (12, 40, 200):
        directions, signs = allocate(energies, totals, dimension)
        assert directions.sum() + signs.sum() == dimension
        assert (signs >= 1).all()
        left = [t - e[:n].sum() for t, e, n in zip(totals, energies, directions, strict=True)]
        variance = (np.array(left) ** 2 / signs).sum()
        plain = (totals**2 / np.full(6, dimension / 6)).sum()  # signs alone, as many for each
        assert variance < plain or dimension == 12  # two for each: nothing to choose


def test_rows_as_bytes_lose_little() -> None:
    rows = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    numbers, steps = quantize(rows)
    assert numbers.dtype == torch.int8
    assert (rows - numbers * steps[:, None]).abs().max() <= 0.51 * steps.max()
    assert not numbers[3].any()


def test_the_command_line_makes_and_asks(
    base: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import sys

    from gradsift.cli import main

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gradsift", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    out = call(
        "index", tmp_path / "index", "--model", base, "--pool", files["pool"],
        "--set", "model.device=cpu", "--set", "lora.rank=4", "--set", "index.dimension=256",
    )  # fmt: skip
    assert f"gradsift select --index {tmp_path / 'index'} --target" in out
    out = call(
        "select", "--index", tmp_path / "index", "--target", f"t={files['t']}",
        "--output-dir", tmp_path / "run", "--budget", "6",
    )  # fmt: skip
    assert "t: 6 picks of 90 by gist" in out


def test_a_fault_of_an_index_is_one_of_ours(tmp_path: Path) -> None:
    with pytest.raises(GradsiftError, match=r"holds no index; make one there"):
        gradsift.open_index(tmp_path)


def make(base: Path, files: dict[str, Path], folder: Path, **sections: Any) -> Path:
    return gradsift.index(
        folder, model=str(base), pool=str(files["pool"]), settings=merge(SETTINGS, sections),
        overwrite=True,
    )  # fmt: skip


@pytest.mark.slow
def test_what_else_is_done_in_its_folder_leaves_an_index_what_it_is(
    base: Path, folder: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    target = {"t": str(files["t"])}
    given = {"model": str(base), "pool": str(files["pool"]), "target": target, "budget": "9"}
    first = gradsift.open_index(folder).select(target=target, budget="9", settings=SELECT)
    found = scores(first)
    gradsift.select(**given, output_dir=folder, method="bm25", settings=SELECT)
    exact = scores(gradsift.select(**given, output_dir=folder, settings=merge(SETTINGS, SELECT)))
    index = gradsift.open_index(folder)
    again = index.select(target=target, budget="9", settings=SELECT)
    np.testing.assert_array_equal(scores(again), found)
    assert (folder / "coordinates/t").exists()  # the exact ones stay beside
    assert np.abs(exact - found).max() > 0
    for rank in (2, 3):  # any number of times, with other settings
        index.select(target=target, budget="9", settings=merge(SELECT, {"gist": {"rank": rank}}))
    files["pool"].write_text(files["pool"].read_text().splitlines(keepends=True)[0] * 50)
    with pytest.raises(RunError, match=r"'data/pool' made with other settings"):
        gradsift.select(**given, output_dir=folder, method="bm25", settings=SELECT)
    files["pool"].unlink()  # an index has its pool
    caplog.clear()
    last = gradsift.open_index(folder).select(target=target, budget="9", settings=SELECT)
    assert last.selections["t"].picks.equals(first.selections["t"].picks)


def test_an_index_made_anew_with_other_settings_is_that_which_answers(
    base: Path, folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"dimension was 256, is now 300"):
        gradsift.index(folder, settings={"index": {"dimension": 300}})
    make(base, files, folder, index={"dimension": 300})
    target = {"t": str(files["t"])}
    gradsift.open_index(folder).select(target=target, settings=SELECT)
    other = make(base, files, tmp_path / "other")
    with pytest.raises(RunError, match=r"index/sketches: dimension was 256, is now 300"):
        gradsift.select(index=folder, target=target, output_dir=other, settings=SELECT)


def test_a_file_of_settings_does_not_hide_the_index_that_is_asked(
    base: Path, folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    from gradsift.cli.options import resolve_config, settings_of_flags
    from gradsift.runs.indexes import index_settings

    file = tmp_path / "exact.yaml"
    file.write_text((folder / "config.yaml").read_text())
    assert "path: null" in file.read_text()
    flags = settings_of_flags(None, [], [], None, None, None, None, None)
    flags["index"] |= {"path": str(folder)}
    found, _ = resolve_config(file, flags, [], index_settings(folder))
    assert found.index.path == str(folder)


def test_rows_that_targets_could_not_use_stay_named(
    base: Path, files: dict[str, Path], write: Write, target_rows: Rows, tmp_path: Path
) -> None:
    target = {"t": str(write("broken.jsonl", [*target_rows, "{"]))}
    given = {"model": str(base), "pool": str(files["pool"])}
    gradsift.select(
        **given, target=target, output_dir=tmp_path / "run", method="bm25",
        settings=merge(SETTINGS, SELECT),
    )  # fmt: skip
    before = (tmp_path / "run/rejected.jsonl").read_bytes()
    assert before
    gradsift.index(tmp_path / "run")
    assert (tmp_path / "run/rejected.jsonl").read_bytes() == before


def test_a_sample_that_makes_no_directions_is_refused(
    base: Path, files: dict[str, Path], write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"index.samples: expected a whole number of at least 2"):
        make(base, files, tmp_path / "one", index={"samples": 1})
    with pytest.raises(GradsiftError, match=r"a pool of two examples at least"):
        make(base, files | {"pool": write("one.jsonl", pool_rows[:1])}, tmp_path / "pool")
    model, path = tiny_models.adapted("llama"), tmp_path / "sketch"
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    given = {"model": {"name": "m"}, "data": {"pool": "p"}, "index": {"dimension": 100}}
    squares = []
    fit_sketch(model, tiny_models.examples(6, seed=1), Config.build(given), path, squares.extend)
    assert not np.isfinite(squares).any()


def test_signs_are_the_same_with_every_version() -> None:
    signs = draw_signs(np.random.Philox(7), (3, 100))
    assert (np.abs(signs) == 1).all()
    known = "6726"  # of the bytes of these signs
    assert hashlib.sha256(signs.astype(np.int8).tobytes()).hexdigest()[:4] == known


@pytest.mark.slow
def test_an_evaluation_asks_the_index_where_it_can(
    folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    target = {"t": str(files["t"])}
    run = gradsift.select(
        index=folder, target=target, output_dir=tmp_path / "run", budget="9", settings=SELECT
    ).path
    found = gradsift.evaluate(
        run, tests={"t": str(files["t"])}, methods=["gist", "gist:norm_power=1", "rds"],
        warmup_seeds=2, seeds=2, random_seeds=3, fine_tuning={"steps": 2},
    )  # fmt: skip
    assert {row.method for row in found.rows} >= {"gist", "gist:norm_power=1", "rds"}
    measured = [path.parent.name for path in (run / "evaluation").rglob("coordinates/t")]
    assert measured == ["coordinates"]  # of the second warm-up, which the index does not know
