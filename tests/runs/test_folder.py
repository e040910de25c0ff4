from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsift.errors import ModelError, RunError
from gradsift.models.checkpoints import read_checkpoints, write_checkpoints
from gradsift.models.identity import identity
from gradsift.runs.atomic import write_atomically
from gradsift.runs.folder import Run
from gradsift.runs.opening import locked_run, read_config
from gradsift.runs.stage import Stage

STAGE = Stage("warmup", {"lora": {"rank": 8}, "seed": 0}, ("warmup",))


def do(run: Run, stage: Stage) -> bool:
    with run.stage(stage) as todo:
        if todo:
            (run.path / stage.outputs[0]).mkdir(exist_ok=True)
            (run.path / stage.outputs[0] / "file").write_text("x")
        return todo


def test_a_stage_runs_once(tmp_path: Path) -> None:
    with locked_run(tmp_path / "run") as run:
        assert [do(run, STAGE), do(run, STAGE)] == [True, False]
        assert run.facts([STAGE])["warmup"]["seconds"] >= 0


def test_a_stage_that_broke_off_runs_again(tmp_path: Path) -> None:
    with locked_run(tmp_path) as run:
        with pytest.raises(KeyError), run.stage(STAGE) as todo:
            raise KeyError(todo)
        assert do(run, STAGE)
        assert not do(run, STAGE)


def test_a_changed_stage_is_named_with_the_difference(tmp_path: Path) -> None:
    changed = Stage("warmup", {"lora": {"rank": 16}, "seed": 0}, ("warmup",))
    with locked_run(tmp_path) as run:
        do(run, STAGE)
        run.prepare([STAGE])
        with pytest.raises(RunError) as error:
            run.prepare([changed])
        assert (
            "the stage 'warmup' made with other settings (warmup: lora.rank was 8, is now 16)"
            in str(error.value)
        )
        assert (tmp_path / "warmup" / "file").exists()
        run.prepare([changed], overwrite=True)
        (tmp_path / "warmup" / "old").write_text("x")
        assert do(run, changed)
        assert not (tmp_path / "warmup" / "old").exists()


def test_a_stage_that_broke_off_may_change_unless_it_keeps_parts(tmp_path: Path) -> None:
    for keeps_parts in (False, True):
        stage = Stage("s", {"seed": 0}, ("s",), keeps_parts=keeps_parts)
        changed = Stage("s", {"seed": 1}, ("s",), keeps_parts=keeps_parts)
        with locked_run(tmp_path / str(keeps_parts)) as run:
            with pytest.raises(KeyError), run.stage(stage) as todo:
                raise KeyError(todo)
            if keeps_parts:
                with pytest.raises(RunError, match=r"s: seed was 0, is now 1"):
                    run.prepare([changed])
            else:
                run.prepare([changed])
                assert do(run, changed)


def test_the_first_difference_is_told_and_nothing_is_removed_on_refusal(tmp_path: Path) -> None:
    early, late = Stage("data", {"file": "a"}, ("data",), cheap=True), STAGE
    with locked_run(tmp_path) as run:
        do(run, early)
        do(run, late)
        changed = [Stage("data", {"file": "b"}, ("data",), cheap=True), Stage("warmup", {}, ())]
        with pytest.raises(RunError, match=r'the stage .warmup. .*data: file was "a", is now "b"'):
            run.prepare(changed)
        assert not do(run, early)


def test_a_removal_that_broke_off_is_no_whole_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Stage("warmup", {"seed": 1}, ("warmup",))
    with locked_run(tmp_path) as run:
        do(run, STAGE)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
            patch.setattr("shutil.rmtree", lambda _: (_ for _ in ()).throw(OSError("killed")))
            do(run, changed)
        assert (tmp_path / "warmup" / "file").exists()
        (tmp_path / "warmup" / "file").write_text("stale")
        assert do(run, changed)
        assert (tmp_path / "warmup" / "file").read_text() == "x"


def test_a_cheap_stage_that_changed_is_done_again(tmp_path: Path) -> None:
    stage = Stage("scores", {"power": 0}, ("scores",), cheap=True)
    changed = Stage("scores", {"power": 1}, ("scores",), cheap=True)
    with locked_run(tmp_path) as run:
        do(run, stage)
        run.prepare([changed])
        assert do(run, changed)


def test_a_stage_that_goes_on_adds_up_the_seconds_of_its_parts(tmp_path: Path) -> None:
    """Whoever is killed writes nothing: the times of its files tell how long it had worked."""
    stage = Stage("pool", {}, ("pool",), keeps_parts=True)
    whole = Stage("adapter", {}, ("adapter",))
    with locked_run(tmp_path) as run:
        began = 0.0
        for part, seconds in (("a.safetensors", 100), ("b.safetensors", 20)):
            for each in (stage, whole):
                with pytest.raises(KeyboardInterrupt), run.stage(each):
                    (tmp_path / each.name).mkdir(exist_ok=True)
                    (tmp_path / each.name / part).touch()
                    manifest = tmp_path / "manifests" / f"{each.name}.json"
                    began = (tmp_path / each.name / part).stat().st_mtime - seconds
                    os.utime(manifest, (began, began))  # as if it had worked for so long
                    raise KeyboardInterrupt
        for _ in range(2):  # twice in a row, before anything was finished
            with pytest.raises(KeyboardInterrupt), run.stage(stage):
                raise KeyboardInterrupt
            for part in (tmp_path / "pool").iterdir():
                os.utime(part, (began - 1000, began - 1000))
        do(run, stage)
        do(run, whole)
        facts = run.facts([stage, whole])
        assert 120 <= facts["pool"]["seconds"] < 130
        assert facts["pool"]["resumed"]
        assert facts["adapter"]["seconds"] < 10, "it was done again from its beginning"
        with run.stage(stage, whole=False):  # a part was found damaged
            pass
        assert 120 <= run.facts([stage])["pool"]["seconds"] < 140


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from gradsift.runs.opening import locked_run\n"
        f"with locked_run(Path({str(tmp_path)!r})): pass"
    )
    with locked_run(tmp_path):
        found = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True
        )
    assert f"{tmp_path} is in use by process {os.getpid()} on" in found.stderr
    assert subprocess.run([sys.executable, "-c", code], check=True).returncode == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with (
        pytest.raises(RunError, match="is not empty and is not a gradsift run"),
        locked_run(tmp_path),
    ):
        pass
    with pytest.raises(RunError, match="is a file"), locked_run(tmp_path / "thesis.tex"):
        pass
    with pytest.raises(RunError, match="is not a gradsift run: it has no config"):
        read_config(tmp_path)


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a", fail)
    assert not (tmp_path / "a").exists()
    write_atomically(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_checkpoints_weigh_as_their_learning_rates(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, {"epoch-1": 3e-4, "epoch-2": 1e-4})
    found = read_checkpoints(tmp_path)
    assert [(c.label, c.path) for c in found] == [
        (label, tmp_path / label) for label in ("epoch-1", "epoch-2")
    ]
    assert [c.weight for c in found] == pytest.approx([0.75, 0.25])


def test_identity_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    before = identity(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"x")
    assert identity(str(tmp_path)) != before
    with pytest.raises(ModelError, match="no such folder"):
        identity("./nowhere")
    with pytest.raises(ModelError, match="cannot load the model 'nobody/nothing'"):
        identity("nobody/nothing")
