"""The benchmark beside other tools, without them: its side, its turns, its check and its table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

import peers
import peers_ours
import reference
import tiny_models
from gradsift.models.adapters import load_adapter
from peers_inputs import make_base, make_job
from peers_job import Job, batches_of

POOL, QUERIES = 12, 3


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("job")
    tiny_models.build("llama").save_pretrained(base)
    return make_job(base, 4, (POOL, QUERIES), folder)


def adapted(job: Job) -> PeftModel:
    return load_adapter(AutoModelForCausalLM.from_pretrained(job.base), job.adapter)


def test_our_side_finds_the_cosines_of_the_plain_loop(job: Job) -> None:
    peers_ours.main(job.folder)
    found, figures = job.read("gradsift")
    model = adapted(job)
    pool, queries = (
        F.normalize(reference.gradient_rows(model, peers_ours.encoded(job, name)))
        for name in ("pool", "queries")
    )
    torch.testing.assert_close(torch.from_numpy(found), pool @ queries.T, rtol=1e-4, atol=1e-5)
    assert figures["seconds"] > 0
    assert figures["memory"] > 2**20


def test_the_adapter_moves_both_matrices(job: Job) -> None:
    model = adapted(job)
    rows = reference.gradient_rows(model, peers_ours.encoded(job, "queries")[:1])[0]
    sizes = [parameter.numel() for parameter in reference.lora_parameters(model).values()]
    assert all(part.any() for part in rows.split(sizes))


def test_rows_carry_our_mask(job: Job) -> None:
    for row in job.rows("pool"):
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        assert (labels != -100).any()
        assert (labels[labels != -100] == ids[labels != -100]).all()


def test_batches_hold_every_row_once_within_the_tokens() -> None:
    rows = [{"input_ids": [1] * length} for length in (3, 90, 7, 40, 40, 12, 200)]
    batches = batches_of(rows, 100)
    assert sorted(np.concatenate(batches)) == list(range(len(rows)))
    padded = [len(b) * max(len(rows[i]["input_ids"]) for i in b) for b in batches if len(b) > 1]
    assert padded
    assert max(padded) <= 100


def test_scores_that_rank_otherwise_end_the_benchmark() -> None:
    ours = np.random.default_rng(0).normal(size=(200, 4))
    assert peers.agreement(ours, ours + 1e-6, "bergson")["spearman"] > 0.9999
    wrong = ours.copy()
    wrong[:, 2] = wrong[::-1, 2]  # one query of four
    with pytest.raises(SystemExit, match="bergson ranks the pool otherwise"):
        peers.agreement(ours, wrong, "bergson")
    with pytest.raises(SystemExit, match="ranks the pool otherwise"):
        peers.agreement(ours, np.full_like(ours, np.nan), "bergson")
    with pytest.raises(SystemExit, match=r"shape \(199, 4\), expected \(200, 4\)"):
        peers.agreement(ours, ours[1:], "bergson")


def test_sides_take_turns_and_are_held_to_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, turns = Job(tmp_path), []
    scores = {side: np.arange(6.0).reshape(3, 2) for side in ("gradsift", "bergson", "dattri-llm")}

    def run(command: Sequence[str], threads: int, log: Path) -> None:
        turns.append((command[0], threads))
        job.write(command[0], scores[command[0]], 2.0)

    monkeypatch.setattr(peers, "run_side", run)
    commands = {side: [side] for side in scores}
    runs, agree = peers.compare(job, commands, 2, 5)
    assert turns == [(side, 5) for side in scores] * 2
    assert {side: len(own) for side, own in runs.items()} == dict.fromkeys(scores, 2)
    assert set(agree) == {"bergson", "dattri-llm"}
    scores["dattri-llm"] = -scores["dattri-llm"]
    with pytest.raises(SystemExit, match="dattri-llm ranks"):
        peers.compare(job, commands, 1, 5)


def test_peers_get_the_batches_that_suit_the_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[Sequence[str | Path]] = []
    monkeypatch.setattr(peers, "run_side", lambda command, *_: stored.append(command))
    pythons = {name: Path(name) for name in peers.PEERS}
    found = peers.commands_of(Job(tmp_path), pythons, peers.tokens_of("base", {}), 2)
    assert list(found) == ["gradsift", "bergson", "dattri-llm"]
    assert [found[name][3] for name in peers.PEERS] == ["1024", "2048"]
    assert stored == [[*found["bergson"], "queries"]]
    assert peers.tokens_of("100m", {"bergson": 512}) == {"bergson": 512, "dattri-llm": 1024}


def test_the_table_takes_medians_and_compares_with_ours() -> None:
    def runs(*seconds: float) -> list[dict[str, Any]]:
        return [{"seconds": s, "memory": 2**30 * s} for s in seconds]

    made_up = {"gradsift": runs(2, 9, 1), "bergson": runs(4, 3, 5)}
    summary = peers.summarise(made_up, 100, 8000)
    agree = {"bergson": {"spearman": 0.99999, "difference": 1e-6}}
    assert peers.rows_of("base", 16, summary, agree) == [
        ("base", "16", "gradsift", "50", "4,000", "9.00", "1.00×", ""),
        ("base", "16", "bergson", "25", "2,000", "5.00", "2.00×", "0.999990"),
    ]


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS']); raise SystemExit('no such module')"
    with pytest.raises(SystemExit, match=r"ended with 1:\n3\nno such module"):
        peers.run_side([sys.executable, "-uc", code], 3, tmp_path / "log")


def test_peers_are_pinned_and_nothing_that_is_here_is_installed_again() -> None:
    packages = [package for peer in peers.PEERS.values() for package in peer.packages]
    assert all("==" in package for package in packages)
    assert not any(package.startswith(("torch", "transformers", "peft")) for package in packages)


def test_a_shape_that_needs_the_shared_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pool_pass.SHARED", tmp_path)
    with pytest.raises(SystemExit, match=r"base needs .*models"):
        make_base("base", tmp_path)
