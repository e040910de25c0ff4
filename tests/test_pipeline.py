"""The whole line on a tiny model: what it writes, what changes nothing, what it survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import gradsift
import reference
import tiny_models
from conftest import QUICK, Write, configure
from gradsift.config import ModelConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import ConfigError, DataError, ModelError, NumericsError, RunError
from gradsift.models.adapters import load_adapter
from gradsift.models.loading import load_base
from gradsift.pipeline import run
from gradsift.sections import merge
from gradsift.selection.run_result import RunResult

Rows = list[dict[str, Any]]


def by_id(result: RunResult, column: str) -> dict[str, Any]:
    table = result.scores()
    return dict(zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True))


def assert_same_scores(one: RunResult, other: RunResult, name: str = "t") -> None:
    """Scores agree by id but for rounding, and so do the picks."""
    left, right = (by_id(result, f"{name}/score") for result in (one, other))
    assert left.keys() == right.keys()
    ids = [*left]
    np.testing.assert_allclose([left[i] for i in ids], [right[i] for i in ids], atol=2e-5)
    picked = [set(r.selections[name].picks["id"].to_pylist()) for r in (one, other)]
    assert picked[0] == picked[1]


@pytest.fixture
def files(write: Write, pool_rows: Rows, target_rows: Rows) -> dict[str, Path]:
    return {"pool": write("pool.jsonl", pool_rows), "t": write("t.jsonl", target_rows)}


def test_what_a_run_leaves(base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    config = configure(base, files["pool"], {"t": files["t"], "u": files["t"]})
    result = run(config, tmp_path / "run")
    folder = tmp_path / "run"
    table = pq.read_table(folder / "scores/gist.parquet")
    assert table.column_names == [
        "row", "id", "source", "num_tokens", "num_supervised", "loss", "gradient_norm",
        "t/score", "t/projected_norm", "t/best", "u/score", "u/projected_norm", "u/best",
    ]  # fmt: skip
    assert table.num_rows == result.num_pool == 90
    one, other = (table[f"{name}/score"].to_numpy() for name in "tu")
    np.testing.assert_allclose(one, other, atol=1e-5)
    norms, projected = table["gradient_norm"].to_numpy(), table["t/projected_norm"].to_numpy()
    assert (projected <= norms * (1 + 1e-5)).all()
    assert (projected > 0).all()
    ids = {json.loads(line)["id"] for line in files["t"].read_text().splitlines()}
    assert set(table["t/best"].to_pylist()) <= ids
    spectrum = json.loads((folder / "targets" / "t" / "spectrum.json").read_text())["epoch-1"]
    assert (spectrum["num_examples"], spectrum["rank"]) == (7, 7)
    picks = result.selections["t"].picks
    assert picks["rank"].to_pylist() == list(range(1, 10))
    scores = picks["score"].to_pylist()
    assert scores == sorted(table["t/score"].to_pylist(), reverse=True)[:9]
    lines = files["pool"].read_bytes().splitlines(keepends=True)
    picked = b"".join(lines[row] for row in picks["row"].to_pylist())
    assert (folder / "selected" / "t.jsonl").read_bytes() == picked
    assert (folder / "rejected.jsonl").read_bytes() == b""
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".partial")]
    manifest = json.loads((folder / "manifests" / "coordinates" / "t.json").read_text())
    assert manifest["complete"]
    assert manifest["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("aggregation", ["max", "task-mean", "mean-cosine"])
def test_scores_are_those_of_the_plain_loop(
    base: Path, adapter: Path, files: dict[str, Path], tmp_path: Path, aggregation: str
) -> None:
    config = configure(
        base, files["pool"], {"t": files["t"]},
        warmup={"adapter": str(adapter)}, gist={"aggregation": aggregation},
    )  # fmt: skip
    result = run(config, tmp_path / "run")
    model = load_adapter(load_base(ModelConfig(name=str(base), device="cpu")), adapter).double()
    rows = {}
    for name in ("pool", "target.t"):
        encoded = EncodedSet(tmp_path / "run" / "data" / f"{name}.parquet")
        examples = encoded.examples(range(len(encoded)))
        rows[name] = reference.gradient_rows(model, examples)
    coordinates, target, scores = reference.select(rows["target.t"], rows["pool"], rank=7)
    if aggregation != "max":
        tasks = [target[:5], target[5:]]
        unit = F.normalize(coordinates)
        means = torch.stack([task.mean(0) for task in tasks])
        by_task = unit @ F.normalize(means).T
        if aggregation == "mean-cosine":
            by_task = torch.stack([(unit @ F.normalize(t).T).mean(1) for t in tasks], dim=1)
        scores = by_task.max(dim=1).values
    found = result.scores()["t/score"].to_numpy()
    np.testing.assert_allclose(found, scores.numpy(), rtol=1e-4, atol=1e-6)
    picked = result.selections["t"].picks["row"].to_pylist()
    best = torch.argsort(scores, descending=True, stable=True)[:9].tolist()
    assert {*picked} == {*best}
    ordered = scores.numpy()[picked]  # coordinates are kept in float16
    assert (np.diff(ordered) <= 1e-4 * np.abs(ordered[1:])).all()
    norms = rows["pool"].norm(dim=1).numpy()
    np.testing.assert_allclose(result.scores()["gradient_norm"].to_numpy(), norms, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"window": 7, "shard_size": 7}},
        {"engine": {"window": 1000, "shard_size": 1000}},
        {"engine": {"batch_tokens": 1}},
        {"engine": {"batch_tokens": 10_000}},
    ],
    ids=str,
)
def test_how_the_work_is_cut_changes_nothing(
    base: Path, adapter: Path, files: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    given = (base, files["pool"], {"t": files["t"]})
    warmup = {"adapter": str(adapter)}
    plain = run(configure(*given, warmup=warmup), tmp_path / "a")
    assert_same_scores(plain, run(configure(*given, warmup=warmup, **change), tmp_path / "b"))


def test_the_order_of_the_pool_changes_nothing(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, files: dict[str, Path], tmp_path: Path
) -> None:
    shuffled = write(
        "other.jsonl", [pool_rows[i] for i in np.random.default_rng(0).permutation(90)]
    )
    warmup = {"adapter": str(adapter)}
    one = run(configure(base, files["pool"], {"t": files["t"]}, warmup=warmup), tmp_path / "a")
    other = run(configure(base, shuffled, {"t": files["t"]}, warmup=warmup), tmp_path / "b")
    assert_same_scores(one, other)


def test_duplicate_target_rows_change_nothing_at_full_rank(
    base: Path, adapter: Path, write: Write, target_rows: Rows, files: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    # of unequal number, between others: no rounding may make a direction of the difference
    twice = write("twice.jsonl", [*target_rows, target_rows[0], target_rows[3], target_rows[0]])
    targets = {"t": files["t"], "twice": twice}
    config = configure(base, files["pool"], targets, warmup={"adapter": str(adapter)})
    result = run(config, tmp_path / "run")
    spectrum = json.loads((tmp_path / "run/targets/twice/spectrum.json").read_text())
    assert (spectrum["adapter"]["num_examples"], spectrum["adapter"]["rank"]) == (10, 7)
    one, other = (result.scores()[f"{name}/score"].to_numpy() for name in targets)
    np.testing.assert_allclose(one, other, atol=2e-4)
    assert by_id(result, "t/best") == by_id(result, "twice/best")


def test_one_target_example_is_enough(
    base: Path, adapter: Path, write: Write, target_rows: Rows, files: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    target = write("one.jsonl", target_rows[:1])
    config = configure(base, files["pool"], {"t": target}, warmup={"adapter": str(adapter)})
    result = run(config, tmp_path / "run")
    # one direction is left: every example points along it or against it
    np.testing.assert_allclose(np.abs(result.scores()["t/score"].to_numpy()), 1, atol=1e-6)


def rounds_equal_rows_alike() -> bool:
    """Return whether this CPU's batched matrix product gives equal rows equal results.

    Some with AVX-512 do not: a row's place in the batch decides with which kernel it is multiplied.
    """
    from gradsift.gradients.projection import product

    torch.manual_seed(0)
    rows, directions = torch.randn(20, 96).repeat_interleave(2, 0), torch.randn(19, 96)
    found = product(rows, directions)
    return torch.equal(found[0::2], found[1::2])


def test_equal_examples_tie_and_the_first_is_picked(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, files: dict[str, Path], tmp_path: Path
) -> None:
    twins = [row | {"id": f"{row['id']}-{k}"} for row in pool_rows[:20] for k in (1, 2)]
    policy = {"budget": "40", "duplicates": "keep"}
    config = configure(
        base, write("twins.jsonl", twins), {"t": files["t"]},
        warmup={"adapter": str(adapter)}, policy=policy,
    )  # fmt: skip
    result = run(config, tmp_path / "run")
    rows, scores = result.selections["t"].picks["row"].to_pylist(), result.scores()["t/score"]
    first, second = scores.to_numpy()[0::2], scores.to_numpy()[1::2]
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert all(first == second) or not rounds_equal_rows_alike()
    for row, (one, other) in enumerate(zip(first, second, strict=True)):
        if one == other:
            assert rows.index(2 * row) < rows.index(2 * row + 1)


def test_padding_changes_nothing(base: Path, adapter: Path) -> None:
    from gradsift.gradients.basis import build_basis
    from gradsift.gradients.gram import gram_matrix
    from gradsift.gradients.projection import project
    from gradsift.gradients.subspace import fit_subspace

    model = load_adapter(load_base(ModelConfig(name=str(base), device="cpu")), adapter)
    examples = tiny_models.examples(12, seed=4)
    subspace = fit_subspace(gram_matrix(model, examples, 10_000, memory=10**8), "full")
    basis = build_basis(model, [(examples, subspace.combination)], 10_000, memory=10**8)
    together, alone = (project(model, examples, tokens, basis) for tokens in (10_000, 1))
    for field in ("coordinates", "losses", "gradient_norms"):
        one, other = getattr(together, field), getattr(alone, field)
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def shard_files(folder: Path) -> list[Path]:
    return sorted((folder / "coordinates" / "t" / "adapter").glob("*.safetensors"))


@pytest.mark.slow
def test_killed_and_started_again_the_bytes_are_the_same(
    base: Path, adapter: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    config = configure(
        base, files["pool"], {"t": files["t"]},
        warmup={"adapter": str(adapter)}, engine={"window": 2, "shard_size": 2},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "gradsift", "select", "--config"]
    command += [str(tmp_path / "config.yaml"), "--output-dir", str(folder)]
    for shards in (1, 15, 30):
        before = {p: p.stat().st_mtime_ns for p in shard_files(folder)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while len(shard_files(folder)) < shards and process.poll() is None:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        output = process.communicate()[0].decode()
        assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {output}"
        assert not (folder / "scores/gist.parquet").exists()
        assert before.items() <= {p: p.stat().st_mtime_ns for p in shard_files(folder)}.items()
    subprocess.run(command, check=True, capture_output=True)
    run(config, tmp_path / "whole")
    assert len(shard_files(folder)) == 45
    kept = ("coordinates", "targets", "selected", "data", "scores", "rejected.jsonl")
    for part in kept:
        whole = tmp_path / "whole" / part
        for path in [whole] if whole.is_file() else filter(Path.is_file, whole.rglob("*")):
            twin = folder / path.relative_to(tmp_path / "whole")
            if path.name != "axolotl.yaml":  # it says where its folder is
                assert path.read_bytes() == twin.read_bytes(), path


def test_the_same_command_again_does_nothing(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    config = configure(base, files["pool"], {"t": files["t"]})
    run(config, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    before |= {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.parquet")}
    run(config, tmp_path / "run")
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_another_policy_picks_anew_from_what_is_stored(
    base: Path, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = (base, files["pool"], {"t": files["t"]})
    run(configure(*given), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    policy = {"budget": "20", "strategy": "round-robin", "per": "task", "source_cap": "60%"}
    with caplog.at_level("INFO", "gradsift"):
        result = run(configure(*given, policy=policy), tmp_path / "run")
    assert 'selected/t is done again: budget was "10%", is now "20"' in caplog.text
    assert before == {p: p.stat().st_mtime_ns for p in before}
    plain, picks = result.scores()["t/score"].to_numpy(), result.selections["t"].picks
    assert picks["task"].to_pylist() == ["a", "b"] * 10
    assert max(picks["source"].to_pylist().count(s) for s in ("sql", "record", "sorting")) <= 12
    config = gradsift.Config.build(
        merge(
            QUICK,
            {
                "model": {"name": str(base)},
                "data": {"pool": str(files["pool"]), "targets": {"t": str(files["t"])}},
                "gist": {"norm_power": 1},
            },
        )
    )
    powered = run(config, tmp_path / "run").scores()
    shares = powered["t/projected_norm"].to_numpy() / powered["gradient_norm"].to_numpy()
    assert not np.allclose(powered["t/score"].to_numpy(), plain)
    assert (np.abs(powered["t/score"].to_numpy()) <= shares + 1e-5).all()


def test_other_settings_for_costly_stages_are_refused_until_told(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    given = (base, files["pool"], {"t": files["t"]})
    run(configure(*given), tmp_path / "run")
    changed = configure(*given, warmup={"seed": 7})
    with pytest.raises(RunError, match=r"the stage 'warmup' .*warmup.seed was 0, is now 7"):
        run(changed, tmp_path / "run")
    assert "seed: 0" in (tmp_path / "run" / "config.yaml").read_text()
    again = run(changed, tmp_path / "run", overwrite=True)
    assert by_id(again, "t/score") == by_id(run(changed, tmp_path / "fresh"), "t/score")


def test_several_checkpoints_and_kept_optimizer_state(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    warmup = {"epochs": 3, "checkpoints": 2, "keep_optimizer": True}
    config = configure(base, files["pool"], {"t": files["t"]}, warmup=warmup)
    result = run(config, tmp_path / "run")
    weights = json.loads((tmp_path / "run" / "warmup" / "checkpoints.json").read_text())
    assert [*weights] == ["epoch-2", "epoch-3"]
    assert weights["epoch-2"] > weights["epoch-3"] > 0
    parts = []
    for label, rate in weights.items():
        folder = tmp_path / "run" / "warmup" / label
        weight_names = set(load_file(folder / "adapter_model.safetensors"))
        state = load_file(folder / "optimizer.safetensors")
        assert state.keys() == {
            f"{n}.{what}" for n in weight_names for what in ("exp_avg", "exp_avg_sq", "step")
        }
        assert all((state[f"{n}.exp_avg_sq"] > 0).any() for n in weight_names)
        shards = sorted((tmp_path / "run" / "coordinates" / "t" / label).glob("*"))
        pool = torch.cat([load_file(shard)["coordinates"].float() for shard in shards])
        stored = load_file(tmp_path / "run" / "targets" / "t" / f"{label}.safetensors")
        target = stored["coordinates"].float()
        parts.append(F.normalize(pool) @ F.normalize(target).T * rate / sum(weights.values()))
    expected = sum(parts).max(dim=1).values  # type: ignore[union-attr]
    np.testing.assert_allclose(result.scores()["t/score"].to_numpy(), expected.numpy(), atol=1e-5)


def test_a_fresh_adapter_is_measured_without_warm_up(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    config = configure(base, files["pool"], {"t": files["t"]}, warmup={"mode": "none"})
    run(config, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "warmup" / "fresh" / "adapter_model.safetensors")
    assert all((value == 0).all() for name, value in weights.items() if "lora_B" in name)
    assert all((value != 0).any() for name, value in weights.items() if "lora_A" in name)


def test_a_rank_that_is_not_there_is_refused(
    base: Path, adapter: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    warmup = {"adapter": str(adapter)}
    config = configure(base, files["pool"], {"t": files["t"]}, warmup=warmup, gist={"rank": 12})
    with pytest.raises(NumericsError, match=r"asked for rank 12, but 7 target gradients span 7"):
        run(config, tmp_path / "run")


def test_a_broken_adapter_stops_the_run(
    base: Path, adapter: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] * float("nan")}, broken / "adapter_model.safetensors")
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    config = configure(base, files["pool"], {"t": files["t"]}, warmup={"adapter": str(broken)})
    with pytest.raises(
        NumericsError, match=r"gradient of the target 't' is not finite for 7 .*'sql-2-0' "
    ):
        run(config, tmp_path / "run")


def test_a_warm_up_that_diverges_stops_the_run(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    warmup = {"learning_rate": 1e30, "epochs": 3}
    config = configure(base, files["pool"], {"t": files["t"]}, warmup=warmup)
    with pytest.raises(NumericsError, match=r"of the warm-up is nan at step .*learning_rate"):
        run(config, tmp_path / "run")


def test_a_mistake_costs_nothing_that_is_stored(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    given = (base, files["pool"], {"t": files["t"]})
    run(configure(*given), tmp_path / "run")
    kept = {p: p.read_bytes() for p in (tmp_path / "run" / "selected").iterdir()}
    kept |= {p: p.read_bytes() for p in (tmp_path / "run" / "coordinates").rglob("*.safetensors")}
    with pytest.raises(ConfigError, match=r"a budget of 91"):
        run(configure(*given, policy={"budget": "91"}), tmp_path / "run")
    wider = tiny_models.save_base(tmp_path / "wider", hidden_size=64)
    other = {"adapter": str(tiny_models.save_adapter(wider, tmp_path / "other"))}
    with pytest.raises(ModelError, match=r"belongs to another base model"):
        run(configure(*given, warmup=other), tmp_path / "run", overwrite=True)
    assert kept == {p: p.read_bytes() for p in kept}


def test_outputs_removed_by_hand_are_made_again(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    config = configure(base, files["pool"], {"t": files["t"]})
    run(config, tmp_path / "run")
    path = tmp_path / "run" / "selected" / "t.jsonl"
    content = path.read_bytes()
    path.unlink()
    run(config, tmp_path / "run")
    assert path.read_bytes() == content
    shard = next((tmp_path / "run" / "coordinates").rglob("*.safetensors"))
    stored = shard.read_bytes()
    shard.unlink()
    path.unlink()
    run(config, tmp_path / "run")
    assert (path.read_bytes(), shard.read_bytes()) == (content, stored)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "header", "swapped", "emptied"])
def test_a_damaged_shard_is_found_by_its_hash_and_measured_again(
    base: Path, adapter: Path, files: dict[str, Path], tmp_path: Path, damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = configure(base, files["pool"], {"t": files["t"]}, warmup={"adapter": str(adapter)})
    plain = run(config, tmp_path / "run").scores()
    paths = shard_files(tmp_path / "run")
    before = {path: path.read_bytes() for path in paths}
    content = bytearray(before[paths[1]])
    if damage == "flipped":
        content[-5] ^= 4
    elif damage == "header":
        content[content.index(b"batch_tokens") + 15] ^= 1
    elif damage == "swapped":
        content = bytearray(before[paths[2]])
    else:
        content = content[: len(content) // 2 if damage == "truncated" else 0]
    paths[1].write_bytes(content)
    times = {path: path.stat().st_mtime_ns for path in paths}
    (tmp_path / "run" / "manifests" / "scores" / "gist.json").unlink()
    with caplog.at_level("WARNING", "gradsift"):
        again = run(config, tmp_path / "run").scores()
    assert f"{paths[1]} is damaged and is measured again: " in caplog.text
    assert {path: path.read_bytes() for path in paths} == before
    assert [path for path in paths if path.stat().st_mtime_ns != times[path]] == [paths[1]]
    assert again.equals(plain)


@pytest.mark.slow
def test_the_number_of_shards_changes_no_bit(
    base: Path, adapter: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    found = [
        run(
            configure(
                base, files["pool"], {"t": files["t"]}, warmup={"adapter": str(adapter)},
                engine={"window": 2, "shard_size": size},
            ),
            tmp_path / str(size),
        ).scores()
        for size in (2, 4, 90)
    ]  # fmt: skip
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])


def test_template_and_order_of_files_count(
    base: Path, files: dict[str, Path], write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(tiny_models.CHATML)
    other = write("other.jsonl", pool_rows[:5])
    data = {"template": str(template), "pool": [str(files["pool"]), str(other)]}
    given = (base, files["pool"], {"t": files["t"]})
    warmup = {"mode": "none"}
    assert run(configure(*given, data=data, warmup=warmup), tmp_path / "run").num_pool == 95
    swapped = data | {"pool": [str(other), str(files["pool"])]}
    with pytest.raises(RunError, match=r"'coordinates/t' .*data/pool: the order of the files was"):
        run(configure(*given, data=swapped, warmup=warmup), tmp_path / "run")
    template.write_text(tiny_models.CHATML + " ")
    with pytest.raises(RunError, match=r"data/pool: the content of the template .* changed"):
        run(configure(*given, data=data, warmup=warmup), tmp_path / "run")


def test_bad_targets_are_named(
    base: Path, write: Write, files: dict[str, Path], pool_rows: Rows, tmp_path: Path
) -> None:
    empty = write("empty.jsonl", [])
    with pytest.raises(DataError, match=r"target.t is empty: no row in"):
        run(configure(base, files["pool"], {"t": empty}), tmp_path / "a")
    asked = write("asked.jsonl", [{"messages": pool_rows[0]["messages"][:1]}])
    with pytest.raises(DataError, match=r"target.t has no usable row.* no assistant turn"):
        run(configure(base, files["pool"], {"t": asked}), tmp_path / "b")


def test_a_budget_above_the_pool_is_named_before_the_work(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    config = configure(base, files["pool"], {"t": files["t"]}, policy={"budget": "91"})
    with pytest.raises(ConfigError, match=r"a budget of 91 examples, but the pool holds 90"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "warmup").exists()


def test_strict_holds_for_a_finished_run_too(
    base: Path, write: Write, pool_rows: Rows, files: dict[str, Path], tmp_path: Path
) -> None:
    pool = write("bad.jsonl", [*pool_rows[:40], "{"])
    config = configure(base, pool, {"t": files["t"]})
    assert run(config, tmp_path / "run").num_rejected == 1
    with pytest.raises(DataError, match=r"under --strict, the first: .*bad.jsonl"):
        run(config, tmp_path / "run", strict=True)


def test_a_model_that_is_not_there(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = configure(tmp_path / "empty", files["pool"], {"t": files["t"]})
    with pytest.raises(ModelError, match=r"cannot load the model"):
        run(config, tmp_path / "run")
