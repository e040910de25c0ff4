"""What a method cost, against the plain counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from conftest import Write, configure
from gradsift.config import Config
from gradsift.evaluation.costs import Cost, cost_of
from gradsift.methods.job import open_job
from gradsift.pipeline import run
from gradsift.runs.opening import locked_run
from gradsift.selection.stages import RunStages

Rows = list[dict[str, Any]]
LORA = 1792  # parameters of rank 4 on q, k, v and o of both layers


@pytest.fixture
def config(base: Path, write: Write, pool_rows: Rows, target_rows: Rows) -> Config:
    files = write("pool.jsonl", pool_rows[:40]), {"t": write("t.jsonl", target_rows)}
    return configure(base, *files, less={"checkpoints": 1, "dimension": 64}, gist={"rank": 3})


def cost(config: Config, method: str, folder: Path) -> Cost:
    config = config.model_copy(update={"method": method})
    run(config, folder)
    stages = RunStages.of(config)
    with locked_run(folder) as opened:
        return cost_of(open_job(stages.inputs, opened), stages)


def tokens(folder: Path, config: Config, name: str) -> int:
    stages = RunStages.of(config)
    with locked_run(folder) as opened:
        job = open_job(stages.inputs, opened)
        encoded = {"pool": job.pool} | dict(job.targets)
        return sum(encoded[name].column("num_tokens").to_pylist())


def seconds(folder: Path, *stages: str) -> float:
    files = [folder / "manifests" / f"{stage}.json" for stage in stages]
    return sum(json.loads(file.read_text())["seconds"] for file in files)


def test_costs_are_those_of_the_stages_and_their_counts(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    gist, perplexity, rds = (cost(config, m, folder) for m in ("gist", "perplexity", "rds"))
    pool, target = (tokens(folder, config, name) for name in ("pool", "t"))
    model: Any = tf.AutoModelForCausalLM.from_pretrained(config.model.name)
    every = sum(parameter.numel() for parameter in model.parameters())
    tied = model.config.tie_word_embeddings
    multiplied = every if tied else every - model.get_input_embeddings().weight.numel()

    assert perplexity.tokens == pool
    assert perplexity.flops == 2 * multiplied * pool
    assert rds.tokens == pool + target
    trained = round(pool * 8 / 40)  # a fifth of the pool
    assert gist.tokens == trained + 2 * target + pool
    per_token = 4 * multiplied + 6 * LORA
    products = 2 * LORA * (7 * 7 + 3 * 7 + 3 * 40)
    assert gist.flops == per_token * gist.tokens + products

    own = ("warmup", "targets/t", "coordinates/t", "scores/gist")
    assert gist.seconds == pytest.approx(seconds(folder, *own))
    forward = seconds(folder, "base/pool")  # shared, and counted for each
    assert perplexity.seconds == pytest.approx(forward + seconds(folder, "scores/perplexity"))
    assert rds.seconds > forward


def test_less_counts_its_own_warm_up_and_its_projections(config: Config, tmp_path: Path) -> None:
    less = cost(config, "less", tmp_path / "run")
    longer = config.less.model_copy(update={"checkpoints": 2})
    twice = cost(config.model_copy(update={"less": longer}), "less", tmp_path / "twice")
    assert twice.tokens == 2 * less.tokens
    assert twice.flops == 2 * less.flops
    pool, target = (tokens(tmp_path / "run", config, name) for name in ("pool", "t"))
    assert less.tokens == round(pool / 5) + pool + target


def test_a_method_without_a_model_costs_seconds_alone(config: Config, tmp_path: Path) -> None:
    found = cost(config, "random", tmp_path / "run")
    assert (found.tokens, found.flops) == (0, 0.0)
    assert found.seconds >= 0
