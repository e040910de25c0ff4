"""Every kind of damage to every file of a finished run: named and mended, or a plain refusal.

A run folder with all that `select`, `evaluate` and `geometry` leave is damaged one file at a time.
The verb that makes the file has to name it and make it again, the same bytes as before; the verbs
that make nothing have to refuse, naming it, or to say what they said before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

import gradsift
from conftest import Write, configure
from gradsift.config import Config
from gradsift.errors import GradsiftError, RunError
from gradsift.evaluation import grid
from gradsift.evaluation.costs import Cost, cost_of
from gradsift.methods.job import Job
from gradsift.pipeline import run
from gradsift.report.exhibits import Exhibit, write_exhibits
from gradsift.runs.opening import locked_run
from gradsift.selection.stages import RunStages

Rows = list[dict[str, Any]]
Damage = Callable[[Path, list[Path]], None]

# written anew by every command that ends, and read by none: nothing has to be named
_WRITTEN_EACH_TIME = {
    "rejected.jsonl", "report.html", "selected/dataset_info.json", "selected/axolotl.yaml",
    "evaluation/config.yaml", "evaluation/report.md", "evaluation/table.parquet",
    "evaluation/trainings.parquet", "evaluation/overlap.parquet", "evaluation/lds.parquet",
    "evaluation/lds_pairs.parquet", "evaluation/doses.parquet",
    "geometry/geometry.json", "manifests/config.yaml.json",
}  # fmt: skip
_NEITHER_READ_NOR_KEPT = {"log.txt", ".owner", ".lock"}


def flip(path: Path, others: list[Path]) -> None:
    content = bytearray(path.read_bytes() or b" ")
    place = int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % len(content)
    content[place] ^= 1
    path.write_bytes(content)


def truncate(path: Path, others: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path: Path, others: list[Path]) -> None:
    path.unlink()


def exchange(path: Path, others: list[Path]) -> None:
    """Put the content of another file of the same kind in its place."""
    content = path.read_bytes()
    alike = [p for p in others if p.suffix == path.suffix and p.read_bytes() != content]
    path.write_bytes(alike[0].read_bytes() if alike else b"[]")


DAMAGES = [flip, truncate, delete, exchange]


def _cost_without_time(job: Job, stages: RunStages) -> Cost:
    return replace(cost_of(job, stages), seconds=1.0)


@dataclass(frozen=True)
class Made:
    """A folder with everything in it, and what makes it again."""

    folder: Path
    config: Config
    test: Path

    def select(self, folder: Path) -> object:
        return run(self.config, folder)

    def evaluate(self, folder: Path) -> object:
        with pytest.MonkeyPatch.context() as patch:  # seconds are never the same twice
            patch.setattr(grid, "cost_of", _cost_without_time)
            return gradsift.evaluate(
                folder, tests={"t": str(self.test)}, seeds=2, random_seeds=3,
                methods=["less", "rds", "influence", "cosine", "cosine:aggregation=mean-cosine"],
                fine_tuning={"steps": 1, "batch_size": 4},
            )  # fmt: skip

    def geometry(self, folder: Path) -> object:
        return gradsift.measure_geometry(folder, examples=4, eigenvectors=2, probes=3)

    def owner(self, name: str) -> Callable[[Path], object]:
        """Return the verb that makes a file."""
        part = name.removeprefix("manifests/").partition("/")[0]
        own = ("cosine", "influence", "less", "rds", "random")
        if Path(name).stem in own and "scores" in name:
            return self.evaluate
        if part in ("evaluation", "less", "cosine", "influence", "base"):
            return self.evaluate
        return self.geometry if part == "geometry" else self.select


@pytest.fixture(scope="module")
def picked(
    base: Path, pool_rows: Rows, target_rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """A folder with what `select` leaves."""
    where = tmp_path_factory.mktemp("damage")

    def write(name: str, rows: list[Any]) -> Path:
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
        (where / name).write_text(text)
        return where / name

    pool = write("pool.jsonl", [*pool_rows[:40], "{"])
    config = configure(
        base, pool, {"t": write("t.jsonl", target_rows)},
        lora={"rank": 2, "target_modules": ["q_proj"]}, gist={"rank": 3},
        less={"checkpoints": 2, "dimension": 64},
        engine={"shard_size": 16}, policy={"budget": "6", "decontaminate": "exact"},
    )  # fmt: skip
    found = Made(where / "run", config, write("test.jsonl", pool_rows[40:44]))
    found.select(found.folder)
    return found


@pytest.fixture(scope="module")
def made(picked: Made) -> Made:
    """A folder with what all verbs leave."""
    found = replace(picked, folder=picked.folder.with_name("everything"))
    shutil.copytree(picked.folder, found.folder)
    found.evaluate(found.folder)
    found.geometry(found.folder)
    found.select(found.folder)  # the report knows them all
    return found


def files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if path.name not in _NEITHER_READ_NOR_KEPT]


def content(path: Path, folder: Path) -> object:
    """Return what has to be the same: all but how long it took, and when."""
    name = path.relative_to(folder).as_posix()
    if name == "report.html":
        return None
    if name.startswith("manifests/"):
        timed = ("seconds", "peak_memory_bytes", "resumed", "sha256")
        try:
            return {k: v for k, v in json.loads(path.read_text()).items() if k not in timed}
        except ValueError:
            return "damaged"
    if name.startswith("evaluation/cells/"):
        return {name: values.tolist() for name, values in load_file(path).items()}
    if name == "selected/axolotl.yaml":  # it has the path of its folder
        return [*yaml.safe_load(path.read_text())["datasets"][0]]
    return path.read_bytes()


def contents(folder: Path) -> dict[str, object]:
    return {p.relative_to(folder).as_posix(): content(p, folder) for p in files(folder)}


@contextmanager
def damaged(made: Made, name: str, damage: Damage, place: Path) -> Iterator[Path]:
    """Yield a copy of the folder in which one file is damaged."""
    folder = place / "run"
    shutil.copytree(made.folder, folder)
    damage(folder / name, files(folder))
    yield folder
    shutil.rmtree(folder)


def mended(made: Made, name: str, folder: Path, expected: dict[str, object], log: Any) -> str:
    """Return what went wrong when the file's own verb ran; nothing if it was named and mended."""
    log.clear()
    unchanged, gone = (made.folder / name).read_bytes(), not (folder / name).exists()
    if not gone and (folder / name).read_bytes() == unchanged:
        return ""  # half of nothing is nothing
    try:
        made.owner(name)(folder)
    except GradsiftError as error:
        refused = Path(name).name.removesuffix(".json") in str(error) or name in str(error)
        return "" if refused else f"refused without its name: {error}"
    except Exception as error:  # noqa: BLE001 (a traceback is what is looked for)
        return f"{type(error).__name__}: {error}"
    now = contents(folder)
    changed = [key for key in expected.keys() | now.keys() if expected.get(key) != now.get(key)]
    if changed:
        return f"other bytes in {changed}"
    # a fine-tuning that is not there is one to do: it is named when it is done
    told = " fine-tunings are there already" if "/cells/" in name and gone else str(folder / name)
    if name not in _WRITTEN_EACH_TIME and told not in log.text:
        return "mended, but not named"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_is_named_and_mended(
    made: Made, damage: Damage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gradsift")
    expected, wrong = contents(made.folder), {}
    names = [path.relative_to(made.folder).as_posix() for path in files(made.folder)]
    assert {name.partition("/")[0] for name in names} >= {
        "base", "config.yaml", "coordinates", "cosine", "data", "evaluation", "geometry",
        "influence", "less", "manifests", "rejected.jsonl", "report.html", "scores", "selected",
        "stability", "targets", "warmup",
    }  # fmt: skip
    for name in names:
        with damaged(made, name, damage, tmp_path) as folder, pytest.MonkeyPatch.context() as patch:
            # the report has a test of its own below, and takes a third of the time
            if not name.startswith(("report.html", "stability", "manifests/stability")):
                for verb in (
                    "evaluation.evaluate.refresh",
                    "geometry.measure.refresh",
                    "pipeline.build",
                ):
                    patch.setattr(f"gradsift.{verb}_report", lambda *_: None)
            fault = mended(made, name, folder, expected, caplog)
        if fault:
            wrong[name] = fault
    print(f"{damage.__name__}: {len(names) - len(wrong)} of {len(names)} files held")
    assert not wrong


def test_one_file_of_each_kind_is_named_and_mended(
    picked: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the test of every file, for those who wait: each file that `select` reads, flipped."""
    caplog.set_level(logging.INFO, "gradsift")
    expected = contents(picked.folder)
    for name in (
        "data/pool.parquet", "data/target.t.parquet", "warmup/epoch-1/adapter_model.safetensors",
        "targets/t/epoch-1.safetensors", "scores/gist.parquet", "selected/t.jsonl",
        "selected/t.parquet", "manifests/coordinates/t.json", "config.yaml",
        "coordinates/t/epoch-1/0000000016.safetensors",
    ):  # fmt: skip
        with damaged(picked, name, flip, tmp_path) as folder:
            assert not mended(picked, name, folder, expected, caplog), name


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_makes_nothing_refuses_or_says_the_same(
    made: Made, damage: Damage, tmp_path: Path
) -> None:
    first = json.loads((made.folder / "selected/t.jsonl").read_text().partition("\n")[0])["id"]
    explained = gradsift.explain(made.folder, first)
    names = [path.relative_to(made.folder).as_posix() for path in files(made.folder)]
    report, wrong = (made.folder / "report.html").read_bytes(), {}
    for name in names:
        if name == "report.html":
            continue
        with damaged(made, name, damage, tmp_path) as folder:
            for verb in (lambda f: gradsift.explain(f, first), gradsift.write_report):
                try:
                    said = verb(folder)
                except GradsiftError as error:
                    if "run `gradsift" not in str(error) and name not in str(error):
                        wrong[name] = f"refused without saying what to run: {error}"
                except Exception as error:  # noqa: BLE001
                    wrong[name] = f"{type(error).__name__}: {error}"
                else:
                    same = explained == said if isinstance(said, list) else None
                    if same is None:
                        now = (folder / "report.html").read_bytes()
                        same = now.replace(bytes(folder), bytes(made.folder)) == report
                    if not same:
                        wrong[name] = f"{verb} says something else"
    assert not wrong


def test_a_pool_is_never_measured_with_two_adapters(
    picked: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter that comes out otherwise, made again, takes all that it measured along."""
    caplog.set_level(logging.INFO, "gradsift")
    folder = tmp_path / "run"
    shutil.copytree(picked.folder, folder)
    flip(folder / "warmup/epoch-1/adapter_model.safetensors", [])
    (folder / "coordinates/t/epoch-1/0000000016.safetensors").unlink()
    before = {p: p.read_bytes() for p in (folder / "coordinates").rglob("*.safetensors")}
    with pytest.MonkeyPatch.context() as patch:  # other hardware, other rounding
        from gradsift.models import warmup

        save = warmup.save_adapter

        def save_otherwise(model: Any, path: Path) -> None:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data *= 1 + 1e-6
            save(model, path)

        patch.setattr(warmup, "save_adapter", save_otherwise)
        picked.select(folder)
    assert "targets/t is done again: warmup was made anew and is not what it was" in caplog.text
    assert "coordinates/t is done again: warmup was made anew" in caplog.text
    now = {p: p.read_bytes() for p in before}
    assert all(now[p] != before[p] for p in before)


def test_another_runs_shard_is_not_taken(
    picked: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = picked.config.model_copy(
        update={"warmup": picked.config.warmup.model_copy(update={"seed": 5})}
    )
    run(other, tmp_path / "other")
    folder, name = tmp_path / "run", "coordinates/t/epoch-1/0000000016.safetensors"
    shutil.copytree(picked.folder, folder)
    shutil.copyfile(tmp_path / "other" / name, folder / name)
    picked.select(folder)
    assert f"{folder / name} is damaged and is measured again: it is not what was" in caplog.text
    assert (folder / name).read_bytes() == (picked.folder / name).read_bytes()


def test_a_run_folder_that_was_removed_in_mid_run(
    picked: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def remove(*arguments: Any, **named: Any) -> None:
        shutil.rmtree(folder)

    for place in ("gradsift.pipeline.check_budgets", "gradsift.pool.worker.check_finite"):
        with monkeypatch.context() as patch:
            patch.setattr(place, remove)
            with pytest.raises(RunError, match=r"was removed while it was worked in; run the sam"):
                picked.select(folder)
    (folder / "manifests/data").mkdir(parents=True, exist_ok=True)  # a half-made one
    picked.select(folder)
    assert contents(folder)["selected/t.jsonl"] == contents(picked.folder)["selected/t.jsonl"]


def test_what_a_killed_process_left_is_cleared(picked: Made, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(picked.folder, folder)
    left = [
        folder / "scores/gist.parquet.1234.partial",
        folder / "coordinates/t/epoch-1/0000000000.safetensors.abcd.partial",
        folder / "data/pool.parquet.partial",
        folder / "targets/t/.tmpAbC123",  # as safetensors names it
    ]
    for path in left:
        path.write_bytes(b"half")
    picked.select(folder)
    assert not [path for path in left if path.exists()]


def test_what_an_earlier_attempt_left_is_no_output(picked: Made, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(picked.folder, folder)
    (folder / "manifests/targets/t.json").unlink()
    (folder / "targets/t/epoch-9.safetensors").write_bytes(b"of another time")
    picked.select(folder)
    assert not (folder / "targets/t/epoch-9.safetensors").exists()
    assert contents(folder) == contents(picked.folder)


def test_damaged_exhibits_are_left_out_by_select_and_named(
    picked: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(picked.folder, folder)
    shown = {"t": [Exhibit("An exhibit of this test", "What it says")]}
    (folder / "geometry").mkdir()
    with locked_run(folder) as run_folder:
        write_exhibits(run_folder, "geometry", shown, {"t": "x"})
    picked.select(folder)
    assert "An exhibit of this test" in (folder / "report.html").read_text()
    flip(folder / "geometry/exhibits.json", [])
    picked.select(folder)
    assert "An exhibit of this test" not in (folder / "report.html").read_text()
    assert f"left out of the report: {folder / 'geometry/exhibits.json'} is damaged" in caplog.text
    for change in (lambda: None, (folder / "manifests/geometry/exhibits.json").unlink):
        change()
        with pytest.raises(RunError, match=r"run `gradsift geometry .*` again, or remove"):
            gradsift.write_report(folder)


def test_explaining_while_another_process_picks_is_told(
    picked: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(picked.folder, folder)

    def vanish(*arguments: Any) -> Any:
        raise FileNotFoundError(2, "No such file", str(folder / "selected/t.parquet"))

    monkeypatch.setattr("gradsift.selection.explanation.read_selections", vanish)
    with pytest.raises(RunError, match="changed while it was read, perhaps by another"):
        gradsift.explain(folder, "sql-1-0")
