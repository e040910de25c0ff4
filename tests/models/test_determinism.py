"""The same bits again on a GPU, and no look at the device inside a batch; as far as a CPU shows."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import tiny_models
from conftest import Write, configure
from gradsift.config import ModelConfig
from gradsift.determinism import use_deterministic_kernels
from gradsift.errors import ConfigError
from gradsift.executors.environment import worker_environment
from gradsift.models.batches import Batch
from gradsift.models.cache import ModelCache
from gradsift.models.losses import label_logits
from gradsift.pipeline import encode, run
from gradsift.runs.opening import locked_run
from gradsift.selection.stages import RunStages

Rows = list[dict[str, Any]]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "0")  # so that what is set now is taken away again
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # tests marked `gpu` may have
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("restored")
def test_deterministic_kernels_are_on_wherever_the_model_is_loaded(base: Path) -> None:
    config = ModelConfig(name=str(base), device="cpu")
    ModelCache(config).base()
    assert not torch.are_deterministic_algorithms_enabled()
    pickle.loads(pickle.dumps(ModelCache(config, deterministic=True))).base()  # as on a worker
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # else attention is not
    assert not torch.utils.deterministic.fill_uninitialized_memory
    there = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    assert there.items() <= os.environ.items()
    assert there.items() <= worker_environment().items()  # where Ray opens the GPU before us


@pytest.mark.usefixtures("restored")
def test_deterministic_kernels_after_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuBLAS found in the environment at its first call stays."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    told = "comes too late: .* start a new process, or set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the"
    with pytest.raises(ConfigError, match=told):
        use_deterministic_kernels()
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("wanted", [False, True])
def test_they_are_on_before_a_method_takes_a_device(
    base: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path, wanted: bool
) -> None:
    """An encoder of `embed`, say, which is no model of the cache."""
    pool, target = write("pool.jsonl", pool_rows), write("t.jsonl", target_rows)
    config = configure(base, pool, {"t": target}, engine={"deterministic": wanted})
    with locked_run(tmp_path / "run") as folder:
        stages = RunStages.of(config)
        folder.prepare(stages)
        encode(stages, folder, strict=False)
    assert torch.are_deterministic_algorithms_enabled() == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("restored")
def test_a_whole_run_finds_a_deterministic_kernel_for_all_it_does(
    base: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> None:
    pool, target, found = write("pool.jsonl", pool_rows), write("t.jsonl", target_rows), {}
    for wanted in (False, True):
        config = configure(base, pool, {"t": target}, engine={"deterministic": wanted})
        found[wanted] = run(config, tmp_path / str(wanted)).scores()["t/score"]
        assert torch.are_deterministic_algorithms_enabled() == wanted
    assert found[True].equals(found[False])  # on a CPU they are the same bits anyway


class _Waits(TorchDispatchMode):
    """Count what would wait for a device: values that Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func) or "is_nonzero" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "phi3"])
def test_a_forward_pass_asks_for_no_value(family: str) -> None:
    model, examples = tiny_models.adapted(family), tiny_models.examples(5, seed=1)
    batch = Batch.of(examples, torch.device("cpu"))
    looked_for = masking_utils.find_packed_sequence_indices
    with _Waits() as waits:
        ours = label_logits(model, batch)
    assert not waits.count
    assert masking_utils.find_packed_sequence_indices is looked_for
    with _Waits() as waits:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    assert waits.count  # it is transformers that asks
    torch.testing.assert_close(ours, logits[batch.rows, batch.columns])
