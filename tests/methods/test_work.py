"""What methods have the base model do, in counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import tiny_models
from conftest import configure
from gradsift.config import LoraConfig, ModelConfig
from gradsift.methods.registry import METHODS
from gradsift.methods.work import Amount, Sizes, Work
from gradsift.models.lora import attach_lora
from gradsift.models.parameters import adapter_parameters, multiplied_parameters

SIZES = Sizes(Amount(1000, 100_000), {"t": Amount(10, 2000), "u": Amount(5, 500)}, {"t": 4, "u": 5})
KEYS = ("label", "kind", "num_tokens", "directions")


def works(method: str, **sections: object) -> list[tuple[str, str, int, int]]:
    config = configure(Path("m"), Path("p"), {"t": Path("t"), "u": Path("u")}, **sections)
    return [
        (work.label, work.kind, work.num_tokens, work.directions)
        for work in METHODS[method].work(config, SIZES)
    ]


def test_gist_and_cosine() -> None:
    warmup = {"epochs": 3, "checkpoints": 2, "fraction": 0.05}
    assert works("gist", warmup=warmup) == [
        ("warm-up", "training", 15_000, 0),
        ("subspace of t", "gram", 4000, 10),
        ("subspace of u", "gram", 1000, 5),
        ("pool pass", "basis", 5000, 9),
        ("pool pass", "projection", 200_000, 9),
    ]
    assert works("cosine", warmup={"fraction": 0.05})[-1][1:] == ("projection", 100_000, 15)


@pytest.mark.parametrize("warmup", [{"mode": "none"}, {"adapter": "a"}])
def test_without_a_training_there_is_one_checkpoint(warmup: dict[str, str]) -> None:
    found = works("gist", warmup=warmup | {"epochs": 3, "checkpoints": 2})
    assert "warm-up" not in [label for label, *_ in found]
    assert found[-1][2] == 100_000


def test_less_trains_and_measures_at_each_of_its_own_checkpoints() -> None:
    assert works("less", less={"checkpoints": 4, "dimension": 64}, warmup={"fraction": 0.01}) == [
        ("warm-up", "training", 4000, 0),
        ("gradients of t", "random projection", 8000, 64),
        ("gradients of u", "random projection", 2000, 64),
        ("pool pass", "random projection", 400_000, 64),
    ]


def test_forward_passes_and_nothing() -> None:
    assert works("rds") == [
        ("forward pass over t", "forward", 2000, 0),
        ("forward pass over u", "forward", 500, 0),
        ("pool pass", "forward", 100_000, 0),
    ]
    assert works("perplexity") == [("pool pass", "forward", 100_000, 0)]
    assert [works(method) for method in ("bm25", "length", "random", "embed")] == [[]] * 4


def test_a_training_and_a_pass_for_each_target() -> None:
    assert works("target-path", target_path={"steps": 20, "batch_size": 4}) == [
        ("pool pass", "forward", 100_000, 0),
        ("training on t", "training", 16_000, 0),
        ("pool pass after t", "forward", 100_000, 0),
        ("training on u", "training", 8_000, 0),
        ("pool pass after u", "forward", 100_000, 0),
    ]


def test_a_fusion_does_once_what_its_methods_share() -> None:
    fused = works("fuse", fuse={"methods": ["perplexity", "gist", "cosine", "rds", "bm25"]})
    assert len(fused) == len(set(fused))
    alone = [works(name) for name in ("perplexity", "gist", "cosine", "rds")]
    assert set(fused) == {piece for found in alone for piece in found}
    assert fused.count(("pool pass", "forward", 100_000, 0)) == 1
    assert works("fuse", fuse={"methods": ["length", "bm25"]}) == []


def test_operations() -> None:
    amount = Amount(num_examples=3, num_tokens=50)
    assert Work("", "forward", amount).flops(1000, 20) == 2 * 1000 * 50
    work = Work("", "projection", amount, passes=2, directions=7)
    assert work.flops(1000, 20) == (4 * 1000 + 6 * 20) * 100 + 2 * 7 * 20 * 6


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_without_weights(family: str, tied: bool, tmp_path: Path) -> None:
    model: Any = tiny_models.build(family, tied)
    model.config.save_pretrained(tmp_path)  # and no weights
    every = sum(parameter.numel() for parameter in model.parameters())
    lookup = 0 if tied else model.get_input_embeddings().weight.numel()
    assert multiplied_parameters(ModelConfig(name=str(tmp_path))) == every - lookup


def test_adapters_are_counted(base: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    adapted = attach_lora(model, LoraConfig(rank=3), seed=0)
    adapted.save_pretrained(str(tmp_path))
    expected = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert adapter_parameters(tmp_path) == expected


def test_sizes_are_those_of_the_encoded_sets() -> None:
    assert SIZES.all_targets == Amount(15, 2500)
    assert Amount(4, 10).of_part(2) == Amount(2, 5)
