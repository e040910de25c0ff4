"""Shared fixtures; shapes and types are checked by beartype throughout (see pyproject.toml)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MKL_CBWR"] = "AUTO,STRICT"  # as in the processes of a run: the same bits as theirs
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes with two threads each wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from gradsift.config import Config
from gradsift.sections import merge

if TYPE_CHECKING:
    import torch

Write = Callable[..., Path]
QUICK = {
    "model": {"dtype": "float32", "device": "cpu"},
    "lora": {"rank": 4, "alpha": 8},
    "warmup": {"learning_rate": 1e-2, "batch_size": 8, "fraction": 0.2},
    "engine": {"window": 8, "shard_size": 32, "batch_tokens": 400},
    "policy": {"budget": "10%", "decontaminate": "none"},
}


def configure(base: Path, pool: Path, targets: dict[str, Path], **sections: Any) -> Config:
    given = {
        "model": {"name": str(base)},
        "data": {"pool": str(pool), "targets": {name: str(p) for name, p in targets.items()}},
    }
    return Config.build(merge(QUICK, given, sections))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with a tokenizer and a chat template."""
    import tiny_models

    return tiny_models.save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA adapter of that model, both of its matrices random."""
    import tiny_models

    return tiny_models.save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as JSON Lines and return the path."""

    def writer(name: str, rows: Sequence[dict[str, Any] | str]) -> Path:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return writer


@pytest.fixture(scope="session")
def pool_rows() -> list[dict[str, Any]]:
    """Ninety examples of three skills."""
    from gradsift.demo.skills import make_examples

    made = [make_examples(skill, 30, seed=1) for skill in ("sorting", "sql", "record")]
    return [example for together in zip(*made, strict=True) for example in together]


@pytest.fixture(scope="session")
def target_rows() -> list[dict[str, Any]]:
    """Seven examples of two skills, as two tasks of unequal size."""
    from gradsift.demo.skills import make_examples

    return [e | {"task": "a"} for e in make_examples("sql", 5, seed=2)] + [
        e | {"task": "b"} for e in make_examples("record", 2, seed=2)
    ]


@pytest.fixture
def arguments(
    base: Path,
    adapter: Path,
    write: Write,
    pool_rows: list[dict[str, Any]],
    target_rows: list[dict[str, Any]],
    tmp_path: Path,
) -> list[object]:
    pool, target = write("pool.jsonl", [*pool_rows, "{"]), write("t.jsonl", target_rows)
    return [
        "select", "--model", base, "--pool", pool, "--target", f"mine={target}",
        "--adapter", adapter, "--budget", "6", "--output-dir", tmp_path / "run",
        "--set", "model.device=cpu", "--set", "policy.decontaminate=none",
    ]  # fmt: skip


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none, before anything is made for them."""
    if item.get_closest_marker("gpu") and named_device().startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: `make gpu` runs it where there is one")


def named_device() -> str:
    """Return where tests marked `gpu` run.

    With GRADSIFT_GPU_TESTS_ON=cpu on the CPU: whether the tests themselves are in order.
    """
    return os.environ.get("GRADSIFT_GPU_TESTS_ON", "cuda:0")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests marked `gpu` run."""
    import torch

    return torch.device(named_device())


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write numbers down as a test marked `gpu` finds them, where `make gpu` collects them."""

    def write_down(**found: object) -> None:
        entry = {"test": request.node.name, **found}
        if "GRADSIFT_GPU_FIGURES" in os.environ:
            with Path(os.environ["GRADSIFT_GPU_FIGURES"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    return write_down
