"""Every method against its own plain reference, and what all of them have in common."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import gradsift
import reference
from conftest import Write, configure
from gradsift.config import Config, ModelConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import ConfigError, ModelError, NumericsError
from gradsift.methods.registry import METHODS
from gradsift.models.adapters import load_adapter
from gradsift.models.loading import load_base
from gradsift.pipeline import run
from gradsift.selection.explanation import explain
from gradsift.selection.run_result import RunResult
from gradsift.types import MethodName

Rows = list[dict[str, Any]]
COMPARING = ("gist", "less", "cosine", "influence", "rds", "bm25")
RANKING = ("target-path", "perplexity", "length", "random", "fuse")


@pytest.fixture
def files(write: Write, pool_rows: Rows, target_rows: Rows) -> dict[str, Path]:
    return {"pool": write("pool.jsonl", pool_rows[:45]), "t": write("t.jsonl", target_rows)}


@pytest.fixture
def config(base: Path, files: dict[str, Path]) -> Config:
    less, path = {"checkpoints": 1, "dimension": 64}, {"steps": 4}
    return configure(base, files["pool"], {"t": files["t"]}, less=less, target_path=path)


def by(method: str, config: Config) -> Config:
    return config.model_copy(update={"method": method})


def scores(result: RunResult) -> np.ndarray:
    return result.scores()["t/score"].to_numpy()


def examples_of(folder: Path, name: str) -> list[Any]:
    encoded = EncodedSet(folder / "data" / f"{name}.parquet")
    return encoded.examples(range(len(encoded)))


def test_the_registry_has_every_name() -> None:
    assert tuple(METHODS) == get_args(MethodName)


@pytest.mark.parametrize("method", [*COMPARING, *RANKING])
def test_every_method_picks_its_best_and_explains_them(
    method: str, config: Config, tmp_path: Path
) -> None:
    result = run(by(method, config), tmp_path / "run")
    assert result.method == method
    assert [*(tmp_path / "run" / "scores").iterdir()] == [tmp_path / f"run/scores/{method}.parquet"]
    found, picks = scores(result), result.selections["t"].picks
    assert picks["row"].to_pylist() == np.argsort(-found, kind="stable")[:4].tolist()
    winners = picks["best"].to_pylist()
    assert all(winners) if method in COMPARING else winners == [None] * 4
    shares = picks["projected_share"].to_pylist()
    assert all(0 < s <= 1 for s in shares) if method == "gist" else shares == [None] * 4
    [explanation] = explain(tmp_path / "run", picks["id"][0].as_py())
    assert (explanation.position, explanation.method) == (1, method)
    told = f"for t, by {method}: picked as number 1 of 4"
    assert (f"{told}, for " if method in COMPARING else f"{told}\n") in explanation.text()
    assert ("most like these target examples" in explanation.text()) == (method in COMPARING)


def test_another_method_uses_what_is_there(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "run")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    for method in ("cosine", "rds"):
        result = run(by(method, config), tmp_path / "run")
    hidden = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/base").rglob("*.safetensors")}
    run(by("perplexity", config), tmp_path / "run")  # the same forward pass
    for paths in (kept, hidden):
        assert paths == {p: p.stat().st_mtime_ns for p in paths}
    assert len([*(tmp_path / "run" / "scores").iterdir()]) == 4
    alone = run(by("rds", config), tmp_path / "alone")
    np.testing.assert_array_equal(scores(result), scores(alone))


def test_cosine_is_that_of_whole_gradients(
    base: Path, adapter: Path, config: Config, tmp_path: Path
) -> None:
    warmup = config.warmup.model_copy(update={"adapter": str(adapter)})
    found = scores(
        run(by("cosine", config.model_copy(update={"warmup": warmup})), tmp_path / "run")
    )
    model = load_adapter(load_base(ModelConfig(name=str(base), device="cpu")), adapter).double()
    pool, target = (
        F.normalize(reference.gradient_rows(model, examples_of(tmp_path / "run", name)))
        for name in ("pool", "target.t")
    )
    np.testing.assert_allclose(found, (pool @ target.T).max(1).values.numpy(), atol=5e-4)


def test_cosine_is_gist_with_all_directions_and_norm_power_1(
    config: Config, tmp_path: Path
) -> None:
    gist = config.gist.model_copy(update={"rank": "full", "norm_power": 1.0})
    one = run(config.model_copy(update={"gist": gist}), tmp_path / "a")
    other = run(by("cosine", config), tmp_path / "b")
    np.testing.assert_allclose(scores(one), scores(other), atol=1e-3)


def test_the_tail_is_what_the_rank_leaves_out(config: Config, tmp_path: Path) -> None:
    def with_gist(**changes: Any) -> Config:
        return config.model_copy(update={"gist": config.gist.model_copy(update=changes)})

    whole, leading, tail = (
        run(with_gist(**changes), tmp_path / str(number))
        for number, changes in enumerate(
            [{"rank": "full"}, {"rank": 3}, {"rank": 3, "directions": "tail"}]
        )
    )
    squares = [r.scores()["t/projected_norm"].to_numpy() ** 2 for r in (whole, leading, tail)]
    np.testing.assert_allclose(squares[0], squares[1] + squares[2], rtol=1e-3)
    assert not np.allclose(scores(leading), scores(tail), atol=0.05)
    with pytest.raises(NumericsError, match=r"keeps all 7 directions .* leaves no tail"):
        run(with_gist(directions="tail"), tmp_path / "none")


def test_rds_and_perplexity_are_those_of_the_base_model(
    base: Path, config: Config, tmp_path: Path
) -> None:
    found = {m: scores(run(by(m, config), tmp_path / "run")) for m in ("rds", "perplexity")}
    model = AutoModelForCausalLM.from_pretrained(str(base)).eval()

    def pooled(example: Any) -> torch.Tensor:
        ids = torch.from_numpy(example.input_ids).long()[None]
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        weights = torch.arange(1, len(hidden) + 1.0)
        return (weights[:, None] * hidden).sum(0) / weights.sum()

    with torch.no_grad():
        pool, target = (
            F.normalize(torch.stack([pooled(e) for e in examples_of(tmp_path / "run", name)]))
            for name in ("pool", "target.t")
        )
        losses = [reference.loss(model, e).item() for e in examples_of(tmp_path / "run", "pool")]
    np.testing.assert_allclose(found["rds"], (pool @ target.T).max(1).values.numpy(), atol=1e-3)
    np.testing.assert_allclose(found["perplexity"], losses, rtol=1e-4)


def test_bm25_is_that_of_the_formula(base: Path, write: Write, tmp_path: Path) -> None:
    texts = [("red fish", "blue fish swims"), ("green bird", "flies"), ("red stone", "falls far")]
    rows = [_example(f"p{i}", *text) for i, text in enumerate(texts)]
    targets = [_example("a", "red", "fish fish") | {"task": "x"}, _example("b", "stone", "unseen")]
    config = configure(
        base, write("pool.jsonl", rows), {"t": write("t.jsonl", targets)},
        method="bm25", policy={"budget": "1"},
    )  # fmt: skip
    found = scores(run(config, tmp_path / "run"))
    documents = [Counter(f"{q} {a}".split()) for q, a in texts]
    mean_length = sum(map(Counter.total, documents)) / 3

    def score(query: str, document: Counter[str]) -> float:
        total = 0.0
        for word in query.split():
            having = sum(word in d for d in documents)
            idf = math.log(1 + (3 - having + 0.5) / (having + 0.5))
            length = 1 - 0.75 + 0.75 * document.total() / mean_length
            total += idf * document[word] / (document[word] + 1.5 * length)
        return total

    expected = [max(score("red fish fish", d), score("stone unseen", d)) for d in documents]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def _example(name: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": turns}


def test_length_and_random(config: Config, tmp_path: Path) -> None:
    result = run(by("length", config), tmp_path / "run")
    assert scores(result).tolist() == result.scores()["num_supervised"].to_pylist()
    one = scores(run(by("random", config), tmp_path / "run"))
    again = scores(run(by("random", config), tmp_path / "again"))
    np.testing.assert_array_equal(one, again)
    seeded = by("random", config).model_copy(
        update={"random": config.random.model_copy(update={"seed": 1})}
    )
    assert not np.isin(scores(run(seeded, tmp_path / "again")), one).any()
    assert len(set(one.tolist())) == 45


def test_target_examples_cannot_take_turns_where_they_do_not_count(
    config: Config, tmp_path: Path
) -> None:
    for strategy in ("round-robin", "balanced"):
        policy = config.policy.model_copy(update={"strategy": strategy})
        other = by("random", config.model_copy(update={"policy": policy}))
        with pytest.raises(
            ConfigError, match=rf"strategy={strategy} needs .* and this one does not"
        ):
            run(other, tmp_path / "run")


def test_embeddings_need_their_library(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    monkeypatch.setattr("gradsift.errors.find_spec", lambda name: None)
    embed = config.embed.model_copy(update={"model": str(base)})
    with pytest.raises(ConfigError, match=r"needs sentence-transformers: pip install"):
        run(by("embed", config.model_copy(update={"embed": embed})), tmp_path / "run")
    monkeypatch.setattr("gradsift.errors.find_spec", lambda name: True)
    with pytest.raises(ModelError, match=r"no such folder: './nowhere'"):
        embed = config.embed.model_copy(update={"model": "./nowhere"})
        run(by("embed", config.model_copy(update={"embed": embed})), tmp_path / "run")


def test_a_method_by_its_name_in_python(base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model": str(base), "pool": str(files["pool"]), "target": {"t": str(files["t"])},
        "output_dir": tmp_path / "run", "budget": "3",
    }  # fmt: skip
    assert gradsift.select(**given, method="length").method == "length"
    with pytest.raises(
        ConfigError, match=r"method \(--method\): expected one of 'gist', 'less', .* found 'best'"
    ):
        gradsift.select(**given, method="best")


def test_manifests_say_what_scores_depend_on(config: Config, tmp_path: Path) -> None:
    run(by("random", config), tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifests/scores/random.json").read_text())
    assert manifest["inputs"]["method"] == "random"
    assert manifest["inputs"]["seed"] == 0
    assert manifest["complete"]
