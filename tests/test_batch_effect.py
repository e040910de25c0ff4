"""`plan --check`: how far scores move with what shares an example's batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from rich.console import Console
from torch import nn

import gradsift
from conftest import configure
from gradsift import batch_effect
from gradsift.batch_effect import BatchEffect, Movement, advise, measure_batch_effect
from gradsift.cli.app import main
from gradsift.cli.plan import _print_effect
from gradsift.config import Config, ModelConfig
from gradsift.data.encoding import Encoded
from gradsift.gradients.basis import Basis
from gradsift.gradients.projection import Projections, project
from gradsift.methods.job import Job
from gradsift.models import cache
from gradsift.models.loading import load_base
from gradsift.pipeline import encode
from gradsift.runs.opening import locked_run
from gradsift.sections import merge
from gradsift.selection.stages import RunStages

Check = Callable[..., BatchEffect]
Rows = list[dict[str, Any]]
OWN = Movement("bfloat16", "sdpa", False, 0.02, 0.1, 2, 0.9, 0.05, 1.0)


@pytest.fixture(scope="module")
def job(
    base: Path,
    pool_rows: Rows,
    target_rows: Rows,
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    """Return encoded data of a tiny Llama."""
    folder = tmp_path_factory.mktemp("batch-effect")
    pool, target = folder / "pool.jsonl", folder / "target.jsonl"
    for path, rows in ((pool, pool_rows), (target, target_rows)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = RunStages.of(configure(base, pool, {"mine": target}))
    with locked_run(folder / "run") as run:
        return encode(stages, run, strict=False)


@pytest.fixture
def check(job: Job, adapter: Path) -> Check:
    """Return what checks the batches of that model with other settings."""

    def run(batch_tokens: int = 400, **sections: Any) -> BatchEffect:
        config = Config.build(merge(job.config.model_dump(), sections))
        own = replace(job, inputs=replace(job.inputs, config=config))
        return measure_batch_effect(own, adapter, batch_tokens)

    return run


def names(effect: BatchEffect) -> list[tuple[str, str]]:
    return [(found.dtype, found.attention) for found in effect.tried]


def test_scores_move_with_the_batch_in_bfloat16_and_hardly_in_float32(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_effect, "_NEGLIGIBLE", 1e-5)
    monkeypatch.setattr(batch_effect, "_SHARE_OF_GAP", 0)  # so tiny a model is tame
    effect = check(model={"dtype": "bfloat16"})
    assert names(effect) == [("bfloat16", "sdpa"), ("bfloat16", "eager"), ("float32", "sdpa")]
    assert (effect.num_examples, effect.not_tried) == (16, {})
    half, _, single = effect.tried
    assert 0 < single.score <= 1e-5 < half.score
    assert 0 < single.coordinates <= 1e-5 < half.coordinates
    assert single.spread > single.gap > 0
    assert single.seconds > 0
    assert "--set model.dtype=float32 (to " in effect.advice


def test_a_fault_that_depends_on_batch_mates_is_found(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def longer_with_mates(
        model: nn.Module, examples: Sequence[Encoded], max_tokens: int, basis: Basis
    ) -> Projections:
        seen.append(([len(example.input_ids) for example in examples], max_tokens))
        found = project(model, examples, max_tokens, basis)
        return replace(found, coordinates=found.coordinates * (1 if max_tokens == 1 else 1.5))

    monkeypatch.setattr(batch_effect, "project", longer_with_mates)
    own, other = check(gist={"norm_power": 1, "rank": 7}).tried
    assert own.coordinates == pytest.approx(0.5, abs=1e-4)
    assert own.score == pytest.approx(other.score, rel=1e-2)
    assert own.score > 0.01  # ‖c‖/‖g‖ is half as large again, the cosine the same
    (every, alone), together, (even, _), (odd, _) = seen[:4]
    assert every == sorted(every)
    assert every[-1] > every[0]
    assert (alone, together) == (1, (every, 400))
    assert (even, odd) == (every[::2], every[1::2])


def test_a_batch_that_they_do_not_fill_has_others_in_it(
    check: Check, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def see(
        model: nn.Module, examples: Sequence[Encoded], max_tokens: int, basis: Basis
    ) -> Projections:
        seen.append(examples)
        return project(model, examples, max_tokens, basis)

    monkeypatch.setattr(batch_effect, "project", see)
    total = sum(job.pool.column("num_tokens").to_pylist())
    assert check(batch_tokens=total // 2).tried[0].score < 1e-5
    alone, together, *_ = seen
    assert [e.input_ids.tolist() for e in together[:16]] == [e.input_ids.tolist() for e in alone]
    sizes = [len(example.input_ids) for example in together]
    assert total // 2 - max(sizes) <= sum(sizes) <= total // 2


def test_a_setting_for_which_there_is_no_room_is_named(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(config: ModelConfig) -> object:
        if config.attention == "eager":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return load_base(config)

    monkeypatch.setattr(cache, "load_base", load)
    effect = check()
    assert names(effect) == [("float32", "sdpa")]
    assert "Tried to allocate 1 GiB" in effect.not_tried["float32, eager"]


def test_what_cannot_be_tried_is_named_with_the_reason(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf.LlamaForCausalLM, "_supports_sdpa", False)  # as of Gemma 2
    monkeypatch.setattr(tf.LlamaForCausalLM, "is_quantized", True, raising=False)
    effect = check(gist={"rank": 7, "directions": "tail"})  # a rank that leaves no tail is lowered
    assert names(effect) == [("float32", "eager")]
    assert "does not support an attention implementation" in effect.not_tried["float32, sdpa"]
    assert "is quantized: attention alone can be another" in effect.not_tried["float32"]


def test_a_gradient_that_is_not_finite_ends_the_check(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **named: Any) -> Projections:
        found = project(*given, **named)
        return replace(found, coordinates=found.coordinates * float("nan"))

    monkeypatch.setattr(batch_effect, "project", broken)
    monkeypatch.setattr(batch_effect, "_POOL_EXAMPLES", 2)
    with pytest.raises(gradsift.GradsiftError, match="not finite in float32; try another"):
        check()


def test_other_settings_are_those_that_the_model_can_have() -> None:
    def others(**changes: Any) -> list[tuple[str, str]]:
        own = replace(OWN, **changes)
        found = batch_effect._alternatives(ModelConfig(name="m"), own)
        return [(settings.dtype, settings.attention) for settings in found]

    assert others() == [("bfloat16", "eager"), ("float32", "sdpa")]
    assert others(quantized=True) == [("bfloat16", "eager")]
    assert others(dtype="float32", attention="eager") == [("float32", "sdpa")]
    flash = others(attention="flash_attention_2")
    assert flash == [("bfloat16", "eager"), ("bfloat16", "sdpa"), ("float32", "sdpa")]


def test_the_advice_names_what_at_least_halves_the_difference() -> None:
    eager = replace(OWN, attention="eager", score=0.011)
    assert "none of the settings tried halves it" in advise([OWN, eager])
    eager = replace(eager, score=0.01)
    float32 = replace(OWN, dtype="float32", attention="eager", score=1e-6)
    assert advise([OWN, eager, float32]).endswith(
        "it is lowered most by --set model.dtype=float32 --set model.attention=eager (to 1e-06), "
        "then by --set model.attention=eager (to 0.01)"
    )
    for small in (replace(OWN, gap=0.2), replace(OWN, score=1e-4, gap=0.0)):
        assert "no other setting is needed" in advise([small, float32])
    assert "none of the settings tried halves it" in advise([OWN])


def test_methods_with_other_scores_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(gradsift.GradsiftError, match="--method gist alone, found 'less'"):
        gradsift.plan(
            model="none", pool="none", target={"t": "none"}, output_dir=tmp_path / "run",
            method="less", check=True,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_row_is_printed_for_each_setting_then_reasons_and_the_advice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    effect = BatchEffect(16, (OWN,), {"bfloat16, eager": "no [room]"}, "none halves it")
    _print_effect(effect, Console())
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "16 examples alone and in batches",
        "│ bfloat16 │ sdpa │ 2.0e-02 │ 1.0e-01 │ 2 │ 1.00 │",
        "not tried: bfloat16, eager: no [room] none halves it",
    ):
        assert text in out


@pytest.mark.slow
def test_plan_checks_at_the_adapter_that_it_tries_with(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["gradsift", "plan", *map(str, arguments[1:]), "--check", "--json"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    effect = json.loads(capsys.readouterr().out)["batch_effect"]
    assert [found["attention"] for found in effect["tried"]] == ["sdpa", "eager"]
    assert 0 < effect["tried"][0]["score"] <= 1e-5
    assert all(found["score"] <= 1e-5 and found["places"] == 0 for found in effect["tried"])
    assert effect["advice"].endswith("no other setting is needed")
