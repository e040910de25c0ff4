"""On CUDA: the device memory that `plan` states is what a pool pass then takes, within 15 %."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gradsift
import tiny_models
from conftest import Write
from gradsift.demo.skills import make_examples
from gradsift.pool.worker import Worker

pytestmark = pytest.mark.gpu

# Qwen2.5-1.5B's, with random weights
LARGE: dict[str, Any] = {
    "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151_936,
    "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
NEEDED = 40 * 2**30  # bytes of a device for it


@pytest.fixture(params=["tiny", "1.5b"])
def model(request: pytest.FixtureRequest, device: torch.device, tmp_path: Path) -> Path:
    path = tmp_path / "base"
    if request.param == "tiny":
        return tiny_models.save_base(path, hidden_size=256, max_position_embeddings=2048)
    if device.type == "cpu" or torch.cuda.get_device_properties(device).total_memory < NEEDED:
        pytest.skip("a model of 1.5B wants a GPU of 40 GiB or more")
    settings = transformers.AutoConfig.for_model("qwen2", **LARGE)
    with device:
        made = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    made.save_pretrained(str(path))
    del made
    gc.collect()
    torch.cuda.empty_cache()
    tiny_models.tokenizer().save_pretrained(str(path))
    return path


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[int]:
    """The most memory that tensors took while pool examples were measured, in bytes."""
    found: list[int] = []
    plain = Worker.__call__

    def watched(self: Worker, shards: Any) -> Iterator[Any]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield from plain(self, shards)
        if device.type == "cuda":
            found.append(torch.cuda.max_memory_allocated(device))

    monkeypatch.setattr(Worker, "__call__", watched)
    return found


def rows(count: int, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """Return examples of like length, nearly all tokens supervised: as the worst that plan tries.

    Elsewhere plan states more than is taken, by what the pool's other examples have less.
    """
    pieces = 20 if device.type == "cuda" else 2
    made = make_examples("record", pieces * count, seed=seed)
    texts = [example["messages"][1]["content"] for example in made]
    return [
        {"messages": [{"role": "user", "content": "?"},
                      {"role": "assistant", "content": f"{i} " + " ".join(texts[i::count])}]}
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_plan_states_the_memory_of_the_pool_pass(
    model: Path,
    write: Write,
    tmp_path: Path,
    device: torch.device,
    peaks: list[int],
    figure: Callable[..., None],
) -> None:
    count = 512 if device.type == "cuda" else 12
    given: dict[str, Any] = {
        "model": str(model), "pool": str(write("p.jsonl", rows(count, 1, device))),
        "target": {"t": str(write("t.jsonl", rows(max(4, count // 8), 2, device)))},
        "output_dir": tmp_path / "run", "budget": "6",
        "settings": {
            "model": {"device": str(device)}, "warmup": {"mode": "none"},
            "policy": {"decontaminate": "none"}, "data": {"max_length": 800},
            "lora": {"rank": 128 if device.type == "cuda" else 4},
        },
    }  # fmt: skip
    planned = gradsift.plan(**given)
    gc.collect()
    result = gradsift.select(**given)
    assert len(result.scores()) == count
    figure(
        planned=planned.device_memory, taken=max(peaks, default=0), tokens=planned.batch_tokens,
        planned_seconds=planned.seconds["pool pass"], seconds=sum(result.seconds.values()),
    )  # fmt: skip
    if device.type == "cuda":
        assert planned.device_memory == pytest.approx(max(peaks), rel=0.15)
