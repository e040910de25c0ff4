"""The roofline's counts against those made by hand, and its table on the page."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

import launches
import pool_pass
import requirements
import roofline
from gradsift.data.encoding import Encoded
from gradsift.gradients.per_example import blocks
from roofline import Card, Operator, batches_of, count, like, rows_of, shape_of, whole

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
HIDDEN, KV, MLP, VOCABULARY, RANK = 64, 32, 96, 50, 8
EXAMPLES, TOKENS, LABELS, DIRECTIONS = 6, 10, 5, 3
QKV = HIDDEN * HIDDEN + 2 * HIDDEN * KV
LAYER = QKV + HIDDEN * HIDDEN + 3 * HIDDEN * MLP
LORA_A, LORA_B = 4 * RANK * HIDDEN, 2 * RANK * (HIDDEN + KV)  # of a layer


def tiny(monkeypatch: pytest.MonkeyPatch, layers: int) -> PeftModel:
    shape = pool_pass._shape(HIDDEN, layers, (4, 2), MLP, VOCABULARY)
    monkeypatch.setitem(pool_pass.SHAPES, "tiny", ("llama", shape | {"tie_word_embeddings": False}))
    return pool_pass.build_model("tiny", RANK, roofline.META)


def counted(model: PeftModel) -> Counter[Operator]:
    examples = like(EXAMPLES, TOKENS, LABELS / TOKENS)
    return count(model, examples, DIRECTIONS, EXAMPLES * TOKENS)


def total(operators: Counter[Operator], group: str, field: str) -> int:
    return sum(
        times * getattr(each, field) for each, times in operators.items() if each.group == group
    )


def test_operations_are_those_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(tiny(monkeypatch, layers=2))
    tokens, lora = EXAMPLES * TOKENS, 2 * (LORA_A + LORA_B)
    # nothing goes back through the first layer's q, k and v: nothing below them is wanted; the last
    # layer's o and MLP are run at labels alone; h is formed on the way there and on the way back
    unlabelled = EXAMPLES * (TOKENS - LABELS)
    by_hand = {
        roofline.BASE: tokens * (4 * 2 * LAYER - 2 * QKV) - unlabelled * 4 * (LAYER - QKV),
        roofline.LORA: tokens * (2 * (6 * LORA_A + 4 * LORA_B) - 2 * 3 * RANK * HIDDEN)
        - unlabelled * 10 * RANK * HIDDEN,
        roofline.EACH: tokens * 2 * lora,
        roofline.BASIS: EXAMPLES * 2 * DIRECTIONS * lora,
        # two products on the way there, five on the way back, uncut by causality
        roofline.ATTENTION: EXAMPLES * 2 * 7 * 2 * TOKENS**2 * HIDDEN,
        roofline.HEAD: EXAMPLES * LABELS * 4 * HIDDEN * VOCABULARY,
        roofline.REST: 0,
    }
    assert {group: total(found, group, "operations") for group in roofline.GROUPS} == by_hand


def test_bytes_of_the_product_with_the_basis_are_those_counted_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(monkeypatch, layers=1)
    sizes = [out * into for out, into in blocks(model).values()]
    pieces = sum(gcd(size, 64) for size in sizes)  # each written in float32
    product = 2 * (EXAMPLES + DIRECTIONS) * sum(sizes) + 4 * EXAMPLES * DIRECTIONS * pieces
    norms = sum(2 * EXAMPLES * size + 4 * EXAMPLES for size in sizes)
    assert total(counted(model), roofline.BASIS, "bytes") == product + norms


def test_all_layers_follow_from_one_and_two(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, four = (counted(tiny(monkeypatch, layers)) for layers in (1, 2, 4))
    assert whole(one, two, 4) == four


def test_useful_operations_need_the_output_head_at_labels_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(monkeypatch, layers=2)
    example = Encoded(np.zeros(8, np.int32), np.arange(8) > 4)  # 7 enter, 3 have a label
    norms = 5 * HIDDEN
    rest = 2 * (LAYER + LORA_A + LORA_B) + norms
    by_hand = 4 * (7 * rest + 3 * HIDDEN * VOCABULARY)
    assert pool_pass.useful_operations(model, [example]) == by_hand


def test_an_operator_takes_the_longer_of_computing_and_moving() -> None:
    card = Card(peak=100, reached=0.5, bandwidth=10)
    operators = Counter({
        Operator("mm", roofline.BASE, 100, 10): 3,  # 2 s of computing, 1 s of moving
        Operator("mm", roofline.BASE, 10, 40): 1,
        Operator("add", roofline.REST, 0, 20): 2,
    })  # fmt: skip
    found = card.seconds(operators)
    assert found[roofline.BASE] == (10, "operations")
    assert found[roofline.REST] == (4, "bytes")


def test_what_does_not_fit_of_the_basis_waits_in_host_memory() -> None:
    shape = shape_of("7b")
    assert batches_of(shape, 50, Card())[1] == 0
    total_bytes = 2 * 400 * sum(shape.blocks)
    room = (80e9 - shape.weight_bytes) / 4
    slots = 2 * 2 * 400 * max(shape.blocks)
    assert batches_of(shape, 150, Card()) == (5120, 0)
    assert batches_of(shape, 400, Card())[1] == pytest.approx(total_bytes - room + slots)
    assert batches_of(shape, 400, Card(memory=2e12)) == (32768, 0)


@pytest.mark.slow
def test_the_table_on_the_page_is_the_one_computed() -> None:
    for row in rows_of("1.5b", [150], Card()):
        cells: Any = " | ".join(row)
        assert f"| {cells} |" in PAGE.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [*zip(("1.5b", "qwen-7b", "7b", "14b"), requirements.SHAPES, strict=True)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_shares_in_the_requirements_are_those_computed(
    name: str, shape: requirements.Shape
) -> None:
    assert shape_of(name) == replace(shape, name=name, share=1.0, waiting=1.0)
    models = [pool_pass.build_model(name, 128, roofline.META, layers) for layers in (1, 2)]
    num_tokens = batches_of(shape, requirements.DIRECTIONS, Card())[0]
    examples = like(num_tokens // roofline.TOKENS, roofline.TOKENS, roofline.LABELLED)
    found = roofline.estimate(models, shape, examples, requirements.DIRECTIONS, Card())
    waiting = max(1, found.copying / sum(seconds for seconds, _ in found.groups.values()))
    assert (round(found.share * waiting, 2), round(waiting, 1)) == (shape.share, shape.waiting)


def test_launches_and_bytes_of_a_layer_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (counted(tiny(monkeypatch, layers)) for layers in (1, 2))
    layer = launches.counts(two - one)
    # with PEFT's layers and transformers' norms and rotations 182 launches, 2,588,720 bytes
    assert layer.launches <= 122
    assert layer.bytes <= 1_443_896
