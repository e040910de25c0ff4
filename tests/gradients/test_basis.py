"""Gram matrix, basis and coordinates keep their values within whatever memory they are given."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reference
import tiny_models
from gradsift import gradients
from gradsift.config import Config
from gradsift.errors import ModelError
from gradsift.gradients.basis import Basis, build_basis, choose_offloaded, whole_bytes
from gradsift.gradients.gram import gram_matrix, row_bytes
from gradsift.gradients.memory import basis_memory, room_for_basis
from gradsift.gradients.per_example import blocks
from gradsift.gradients.pinned import pieces_for
from gradsift.gradients.projection import product, project

AMPLE = 10**9


@pytest.mark.parametrize("num_rows", [1, 3, 7, 12, 100])
def test_row_blocks_change_no_product(num_rows: int) -> None:
    model, examples = tiny_models.adapted("llama"), tiny_models.examples(12, seed=3)
    memory = num_rows * row_bytes(model) + 5
    found = gram_matrix(model, examples, max_tokens=120, memory=memory)
    rows = reference.gradient_rows(tiny_models.adapted("llama", dtype=torch.float64), examples)
    expected = (rows @ rows.T).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 8, 9, 100])
def test_parts_have_the_same_products_in_any_company(num_rows: int) -> None:
    model, examples = tiny_models.adapted("llama"), tiny_models.examples(14, seed=3)
    memory = num_rows * row_bytes(model) + 5
    found = gram_matrix(model, examples, 120, memory, parts=[3, 5, 2, 4])
    rows = reference.gradient_rows(tiny_models.adapted("llama", dtype=torch.float64), examples)
    expected = (rows @ rows.T).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    for kept, parts in (((0, 3), [3, 4]), ((1, 3), [5, 4]), ((0, 1, 3), [3, 5, 4])):
        starts = np.cumsum([0, 3, 5, 2, 4])
        own = np.concatenate([np.arange(starts[part], starts[part + 1]) for part in kept])
        alone = gram_matrix(model, [examples[row] for row in own], 120, memory, parts=parts)
        assert np.array_equal(found[np.ix_(own, own)], alone)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a Linux process")
def test_a_target_of_512_examples_holds_no_more_than_its_block_of_rows() -> None:
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import tiny_models, torch
from math import prod
from gradsift.gradients.gram import gram_matrix
from gradsift.gradients.per_example import blocks
from gradsift.runs.provenance import peak_memory
model = tiny_models.adapted("llama", rank=800)  # 1.1 MiB a row
row, memory = 4 * sum(map(prod, blocks(model).values())), int(sys.argv[1])
gram_matrix(model, tiny_models.examples(16), max_tokens=100, memory=16 * row)
before = peak_memory()
gram_matrix(model, tiny_models.examples(512), max_tokens=100, memory=memory * row)
print(row, peak_memory() - before)
"""
    grown = {}
    # glibc keeps what is freed for later, more or less of it from run to run; large pieces not
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for held in (512, 64):
        command = [sys.executable, "-c", script, str(held)]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout
        row, more = map(int, output.split())
        grown[held] = more / row
    assert grown[512] > 400  # held all at once they are seen, less what was free before
    assert grown[64] < 64 + 32  # a block, and what one batch needs


def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    model = tiny_models.adapted("llama")
    with pytest.raises(ModelError, match=r"one example's gradient takes .* engine.memory"):
        gram_matrix(model, tiny_models.examples(2), 100, memory=row_bytes(model) - 1)


def test_the_basis_is_the_same_in_one_part_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, first, second = (
        tiny_models.adapted("llama"),
        tiny_models.examples(9),
        tiny_models.examples(5, seed=1),
    )
    rng = np.random.default_rng(0)
    targets = [(first, rng.normal(size=(9, 4))), (second, rng.normal(size=(5, 3)))]
    total = 7 * row_bytes(model)
    passes: list[int] = []
    plain = gradients.basis._combine_rows

    def counted(*args: Any) -> dict[str, torch.Tensor]:
        passes.append(len(args[3]))
        return plain(*args)

    monkeypatch.setattr(gradients.basis, "_combine_rows", counted)
    whole = build_basis(model, targets, 100, AMPLE)
    assert passes == [len(blocks(model))] * 2  # one for each target
    passes.clear()
    monkeypatch.setattr(gradients.basis, "choose_offloaded", lambda *_: frozenset())
    parts = build_basis(model, targets, 100, total * 2 // 3)
    assert len(passes) > 4
    assert passes[0] > passes[-1] == 1
    assert whole.rank == parts.rank == 7
    for name in blocks(model):
        assert torch.equal(whole[name], parts[name])
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"\(7 directions\) take .*--memory"):
        build_basis(model, targets, 100, total)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_blocks_that_wait_in_host_memory_give_the_same_coordinates(share: float) -> None:
    model, examples = tiny_models.adapted("llama", targets="all-linear"), tiny_models.examples(20)
    rng = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(6, prod(s), generator=rng) for n, s in blocks(model).items()}
    names = list(tensors)
    offloaded = frozenset(names[int(share * len(names)) :])
    here = Basis(tensors, frozenset(), torch.device("cpu"))
    brought = Basis(tensors, offloaded, torch.device("cpu"))
    one, other = (project(model, examples, 60, basis).coordinates for basis in (here, brought))
    assert torch.equal(one, other)


def test_what_waits_leaves_room_for_two_slots() -> None:
    shapes = {f"block{i}": (10, 100) for i in range(10)}
    size = 3 * 1000 * 2
    device = torch.device("cuda")
    assert choose_offloaded(shapes, 3, 2, device, memory=10 * size) == frozenset()
    some = choose_offloaded(shapes, 3, 2, device, memory=9 * size)
    assert some == {"block0", "block3", "block6"}  # spread over the layers
    assert len(choose_offloaded(shapes, 3, 2, device, memory=2 * size)) == 10
    huge = {"block": (10**7, 10**7)}
    with pytest.raises(ModelError, match=r"fit on cuda and .* GiB in host memory; lower gist.rank"):
        choose_offloaded(huge, 3, 2, device, memory=10**9)


LLAMA_2_7B = {  # with LoRA of rank 128 on q, k, v and o
    f"{layer}.{projection}.{matrix}": (128, 4096) if matrix == "A" else (4096, 128)
    for layer in range(32)
    for projection in "qkvo"
    for matrix in "AB"
}
CARD, WEIGHTS, TOKEN = 80 * 10**9, 13_476 * 10**6, 4_600_832  # bytes; of a token's activations


def test_on_80_gb_a_7b_keeps_its_whole_basis_and_what_cannot_stay_leaves_room_for_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients.basis, "host_memory", lambda: 10**12)
    cuda, free, batch = torch.device("cuda"), CARD - WEIGHTS, 2048 * TOKEN
    offloaded, here = {}, {}
    for rank in (150, 400):
        memory, kept = room_for_basis(free, batch, whole_bytes(LLAMA_2_7B, rank, 2))
        most = min(memory - 4 * rank * 128 * 4096, kept)
        offloaded[rank] = choose_offloaded(LLAMA_2_7B, rank, 2, cuda, most)
        here[rank] = 2 * rank * 128 * 4096 * (256 - len(offloaded[rank]))
    assert offloaded[150] == frozenset()
    assert here[150] + batch < free - free // 32  # a batch still fits
    assert 0 < len(offloaded[400]) < 256
    assert here[400] < free // 4
    before = free // 2 - free // 2 // 4  # three quarters of half of what was free
    assert len(choose_offloaded(LLAMA_2_7B, 150, 2, cuda, before)) > 90


@pytest.mark.parametrize(
    ("engine", "room"),
    [({}, 80 - 80 // 32 - 20), ({"memory": 30}, 30), ({"memory": 70}, 80 - 80 // 32 - 20)],
)
def test_a_basis_gets_what_a_small_batch_leaves_of_a_gpu(
    engine: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, tried = [20], []

    def run(measure: object, lengths: np.ndarray, tokens: int) -> None:
        tried.append((int(lengths.max()), tokens))
        if taken[0] > 80:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gradients.memory, "run_worst", run)
    monkeypatch.setattr(gradients.memory, "device_of", lambda _: torch.device("cuda"))
    for name, value in (
        ("mem_get_info", lambda _: (70, 100)), ("memory_reserved", lambda _: 25),
        ("memory_allocated", lambda _: 15), ("reset_peak_memory_stats", lambda _: None),
        ("max_memory_allocated", lambda _: 15 + taken[0]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    given = {"model": {"name": "m"}, "data": {"pool": "p", "targets": {"t": "t"}}}
    config, model = Config.build(given | {"engine": engine}), tiny_models.build("gpt2")
    longest = model.config.max_position_embeddings
    assert longest < config.data.max_length
    assert basis_memory(config, model, 2048, whole=58) == (room, room)
    # what does not fit whole leaves most to batches
    less = room if engine else 80 // 4
    assert basis_memory(config, model, 2048, whole=59) == (room, less)
    taken[0] = 81  # the longest that may be: perhaps none is so long
    half = 40 if not engine else int(engine["memory"])
    assert basis_memory(config, model, 2048, whole=58) == (half, half)
    assert {*tried} == {(longest, 2048)}


# (rank of the adapter, hidden size, that of keys and values, layers) of models of 3 to 14 billion
@pytest.mark.parametrize(
    "sizes", [(128, 2048, 256, 36), (128, 4096, 4096, 32), (16, 5120, 1024, 48)]
)
@pytest.mark.parametrize("directions", [50, 150, 400])
def test_blocks_lie_in_pieces_of_powers_of_two_without_waste(
    sizes: tuple[int, int, int, int], directions: int
) -> None:
    adapter, hidden, narrow, layers = sizes
    parameters = [adapter * n for n in (hidden, hidden, hidden, narrow, hidden, narrow, hidden)]
    wanted = {
        f"{layer}.{i}": 2 * directions * count
        for layer in range(layers)
        for i, count in enumerate(parameters)
    }
    pieces, places = pieces_for(wanted)
    assert all(piece.bit_count() == 1 for piece in pieces)
    assert sum(wanted.values()) <= sum(pieces) <= 1.05 * sum(wanted.values())
    assert [*places] == [*wanted]
    ends = [0] * len(pieces)
    for name, (piece, start) in sorted(places.items(), key=lambda place: place[1]):
        assert start >= ends[piece]
        assert start % 512 == 0
        ends[piece] = start + wanted[name]
    assert all(end <= piece for end, piece in zip(ends, pieces, strict=True))


def test_no_blocks_need_no_piece_and_odd_ones_one_each() -> None:
    assert pieces_for({}) == ([], {})
    assert pieces_for({"odd": 1000}) == ([1024], {"odd": (0, 0)})
    pieces, places = pieces_for({"large": 1 << 20, "one": 1, "more": 1})
    assert (sum(pieces), len({*places.values()})) == ((1 << 20) + 1024, 3)


def test_host_memory_is_counted_as_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece for each block would take 1.7 times as much."""
    shapes, device = {f"block{i}": (128, 4096) for i in range(64)}, torch.device("cuda")
    total = 64 * 150 * 128 * 4096 * 2
    for available, fits in ((1.05 * total, True), (0.9 * total, False)):
        monkeypatch.setattr("gradsift.gradients.basis.host_memory", lambda n=available: int(n))
        with nullcontext() if fits else pytest.raises(ModelError, match="GiB in host memory"):
            assert len(choose_offloaded(shapes, 150, 2, device, total // 20)) > 60


def test_more_stays_on_a_gpu_where_host_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, size = {f"block{i}": (128, 4096) for i in range(64)}, 150 * 128 * 4096 * 2
    cuda = torch.device("cuda")
    choose = partial(choose_offloaded, shapes, 150, 2, cuda)
    waiting = {}
    for room in (64, 40):  # blocks
        monkeypatch.setattr(gradients.basis, "host_memory", lambda n=room: n * size)
        waiting[room] = len(gradients.basis._offloaded(choose, 60 * size, 10 * size))
    assert 40 < waiting[64] < 64
    assert 0 < waiting[40] <= 10
    with pytest.raises(ModelError, match="GiB fit on cuda"):
        gradients.basis._offloaded(choose, 10 * size, 5 * size)


@pytest.mark.parametrize("columns", [1, 97, 96, 4096 * 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_in_pieces_is_the_product(columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, columns, generator=generator).to(dtype) for n in (5, 7))
    expected = left.double() @ right.double().T
    found = product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * columns**0.5 * 4)


def test_small_gradients_survive_float16() -> None:
    examples, found = tiny_models.examples(12), {}
    for dtype in (torch.float32, torch.float16):
        model = tiny_models.adapted("llama", dtype=dtype)
        with torch.no_grad():  # the loss hardly depends on anything below
            model.get_output_embeddings().weight.mul_(1e-4)  # type: ignore[union-attr]
        gram = gram_matrix(model, examples, 200, AMPLE)
        basis = build_basis(
            model, [(examples, np.eye(12)[:, :8] / np.diag(gram).max())], 200, AMPLE
        )
        found[dtype] = project(model, examples, 200, basis)
        assert np.allclose(np.sqrt(np.diag(gram)), found[dtype].gradient_norms, rtol=1e-2)
    one, other = found.values()
    assert one.gradient_norms.max() < 1e-2
    assert torch.allclose(one.gradient_norms, other.gradient_norms, rtol=2e-2)
    assert torch.cosine_similarity(one.coordinates, other.coordinates).min() > 0.999


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.99), (torch.float16, 0.9999)])
def test_coordinates_in_half_precision_point_the_same_way(dtype: torch.dtype, least: float) -> None:
    examples, combination = tiny_models.examples(12), np.eye(12)[:, :8]
    found = {}
    for precision in (torch.float32, dtype):
        model = tiny_models.adapted("llama", dtype=precision)
        basis = build_basis(model, [(examples, combination)], 200, AMPLE)
        found[precision] = project(model, examples, 200, basis).coordinates
    assert torch.cosine_similarity(found[torch.float32], found[dtype]).min() > least
