"""Trainings that are logged besides, where the Trainer's users look."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradsift
from gradsift.errors import ConfigError


def test_every_training_has_a_log_of_its_own(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pool, target = tmp_path / "pool.jsonl", tmp_path / "t.jsonl"
    rows = [f'{{"prompt": "{n} and {n}?", "completion": "{2 * n}"}}\n' for n in range(40)]
    pool.write_text("".join(rows))
    target.write_text("".join(rows[:4]))
    run = tmp_path / "run"
    settings = {"engine": {"report_to": "tensorboard"}, "lora": {"rank": 4}}
    warmup = {"fraction": 0.5, "epochs": 2, "batch_size": 10, "learning_rate": 1e-3}
    gradsift.select(
        model=base,
        pool=pool,
        target=target,
        output_dir=run,
        settings={**settings, "warmup": warmup},
    )
    gradsift.evaluate(
        run, tests={"t": str(target)}, methods=["gist"], seeds=2, random_seeds=3,
        fine_tuning={"steps": 3, "batch_size": 2},
    )  # fmt: skip
    folders = {path.name for path in (run / "trainings").iterdir()}
    assert "warmup" in folders
    assert len(folders) == 1 + 2 + 3  # trained twice on the picks, and on three random selections
    for folder in folders:
        events = EventAccumulator(str(next((run / "trainings" / folder).rglob("events.*"))))
        events.Reload()
        losses = events.Scalars("train/loss")
        assert len(losses) == (4 if folder == "warmup" else 3)
        assert all(own.value > 0 for own in losses)
    again = gradsift.select(
        model=base, pool=pool, target=target, output_dir=run,
        settings={"lora": {"rank": 4}, "warmup": warmup},
    )  # fmt: skip
    assert set(again.selections) == {"t"}  # and nothing was refused as other settings


def test_every_training_is_a_run_of_wandb(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the optional wandb is not installed")
    code = (
        "import gradsift\n"
        "rows = [{'prompt': f'{n} and {n}?', 'completion': str(n)} for n in range(40)]\n"
        f"gradsift.select(model={str(base)!r}, pool=rows, target=rows[:4], output_dir='run',\n"
        "    settings={'engine': {'report_to': 'wandb'}, 'warmup': {'fraction': 0.5}})\n"
        "gradsift.evaluate('run', tests={'target': rows[5:9]}, methods=['gist'], seeds=2,\n"
        "    random_seeds=3, fine_tuning={'steps': 3, 'batch_size': 2})\n"
    )
    environment = os.environ | {"WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert len([*(tmp_path / "wandb").glob("offline-run-*")]) == 1 + 2 + 3


def test_a_tracker_that_is_not_there_is_named_before_the_work(tmp_path: Path) -> None:
    code = (
        "import sys, gradsift; sys.modules['wandb'] = None\n"
        "from importlib import util; real = util.find_spec\n"
        "import gradsift.errors as e\n"
        "e.find_spec = lambda name: None if name == 'wandb' else real(name)\n"
        f"gradsift.select(model='m', pool='p', target='t.jsonl', output_dir={str(tmp_path)!r}, "
        "settings={'engine': {'report_to': 'wandb'}})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "engine.report_to=wandb needs wandb: pip install 'gradsift[wandb]'" in done.stderr


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.report_to"):
        gradsift.Config.build(
            {"model": {"name": "m"}, "data": {"pool": "p"}, "engine": {"report_to": "neptun"}}
        )
