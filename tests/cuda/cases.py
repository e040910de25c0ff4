"""What runs on a GPU, run on GPUs that are not there: one line of JSON for each case.

Run in a process of its own by `test_without_a_gpu.py`, which says what has to come out. What a case
takes from its `Watch` may wait; what is left there afterwards waited where nothing should.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fake_cuda import FakeCuda, adapt_libraries
from peft import PeftModel
from safetensors.numpy import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from watch import Watch

import tiny_models
from gradsift.config import Config, EngineConfig, LoraConfig, WarmupConfig
from gradsift.data.encoding import Encoded
from gradsift.geometry.target import _fitting_hessian
from gradsift.gradients import random_projection as projections
from gradsift.gradients.basis import Basis, _combine_rows
from gradsift.gradients.gram import fitting_gram, row_bytes
from gradsift.gradients.hessian import Hessian
from gradsift.gradients.per_example import blocks, gradient_rows
from gradsift.gradients.projection import project
from gradsift.method_config import LessConfig
from gradsift.methods.less import make_random_projection_measure
from gradsift.models import last_layer, training
from gradsift.models.batch_size import find_batch_tokens
from gradsift.models.batches import group_examples, lengths_of, padded
from gradsift.models.lora import attach_lora
from gradsift.pool.coordinates import make_projection_measure
from gradsift.pool.hidden_states import make_forward_measure
from gradsift.runs import layout

EXAMPLES = tiny_models.examples(6, longest=30)
TWO, THREE = 60, 40  # padded tokens per batch, so that they make so many batches
AMPLE = 1 << 30  # bytes
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class Scene:
    """A model on a GPU, standing in for the cache of models too."""

    family: str
    device: torch.device
    dtype: torch.dtype
    model: PeftModel
    tokens: int

    def with_adapter(self, path: Path) -> PeftModel:
        return self.model

    def base(self) -> PeftModel:
        return self.model


def build(family: str, device: str, dtype: str, tokens: int = AMPLE) -> Scene:
    """Return a tiny model of a family with an adapter, on a GPU."""
    model = tiny_models.adapted(family, dtype=DTYPES[dtype]).to(device)
    check_batches(model)
    base = model.get_base_model()
    last_layer._known[base] = tuple(name for name, _ in last_layer._candidates(base))  # untried
    return Scene(family, torch.device(device), DTYPES[dtype], model, tokens)


def expect(found: Tensor, device: torch.device, dtype: torch.dtype, *shape: int) -> None:
    """Check where a result is and of what kind."""
    assert (found.device, found.dtype, found.shape) == (device, dtype, shape), found


def make_basis(scene: Scene, offloaded: bool, **changes: Tensor) -> Basis:
    """Return a basis of three directions, every other block of it offloaded if any is."""
    names, tensors = list(blocks(scene.model)), {}
    waiting = frozenset(names[::2] if offloaded else ())
    for name, shape in blocks(scene.model).items():
        block = torch.empty(3, prod(shape), dtype=scene.dtype, device=scene.device)
        tensors[name] = block.cpu().pin_memory() if name in waiting else block
    return Basis(tensors | changes, waiting, scene.device)


def pool_pass(scene: Scene, watch: Watch, offloaded: bool) -> None:
    """Coordinates, losses and norms, in several batches."""
    basis, tokens = make_basis(scene, offloaded), scene.tokens
    if offloaded:  # what the first batch asks for is brought ahead in the second
        tokens = THREE if tokens == TWO else TWO
    watch.take()
    found = project(scene.model, EXAMPLES, tokens, basis)
    expect(found.coordinates, scene.device, torch.float32, len(EXAMPLES), 3)
    expect(found.losses, scene.device, torch.float32, len(EXAMPLES))
    expect(found.gradient_norms, scene.device, torch.float32, len(EXAMPLES))


def basis_read_by_caller(scene: Scene, watch: Watch) -> None:
    """Offloaded blocks, on the thread of the caller: no autograd has chosen the device there."""
    basis = make_basis(scene, offloaded=True)
    watch.take()
    for _ in range(3):
        for name in blocks(scene.model):
            block = basis[name]
            expect(block @ block.T, scene.device, scene.dtype, 3, 3)


def two_targets(scene: Scene, watch: Watch, offloaded: bool) -> None:
    """The bases of two targets, stacked: to build them waits for the blocks it offloads alone."""
    widths = {"first": 3, "second": 2}
    size = sum(widths.values()) * scene.dtype.itemsize * row_bytes(scene.model) // 4
    settings = {"model": {"name": "m"}, "data": {"pool": "p", "targets": {"t": "t"}}}
    memory = {"engine": {"memory": size if offloaded else AMPLE}}
    config = Config.build(settings | memory)
    given = [(EXAMPLES[:4], np.ones((4, 3))), (EXAMPLES[3:], np.ones((3, 2)))]
    measure, device = make_projection_measure(scene, Path(), given, widths, config)  # type: ignore[arg-type]
    waits, num_blocks = watch.take(), len(blocks(scene.model))
    moved = waits.pop("copy from cuda to cpu in gradsift.gradients.basis.build_basis", 0)
    assert not waits, waits
    assert 1 <= moved < num_blocks if offloaded else moved == 0, (moved, num_blocks)
    found = measure(EXAMPLES, scene.tokens)
    assert device == scene.device
    for name, width in widths.items():
        expect(found[f"{name}/coordinates"], device, torch.float16, len(EXAMPLES), width)
        expect(found[f"{name}/length"], device, torch.float32, len(EXAMPLES))


def rows(scene: Scene, watch: Watch) -> None:
    found = gradient_rows(scene.model, EXAMPLES, scene.tokens)
    for name, (height, width) in blocks(scene.model).items():
        expect(found[name], scene.device, torch.float32, len(EXAMPLES), height * width)


def gram(scene: Scene, watch: Watch) -> None:
    """Rows all at once or four at a time: what waits is the copy of the products, at the end."""
    num_rows = 4 if scene.tokens == TWO else len(EXAMPLES)
    engine = EngineConfig(memory=num_rows * row_bytes(scene.model))
    fitting_gram(scene.model, EXAMPLES, engine)
    assert watch.take() == {"copy from cuda to cpu in gradsift.gradients.gram.gram_matrix": 1}


def basis_sums(scene: Scene, watch: Watch) -> None:
    shapes, combination = blocks(scene.model), np.ones((len(EXAMPLES), 3))
    found = _combine_rows(scene.model, EXAMPLES, combination, shapes, scene.tokens)
    for name, (height, width) in shapes.items():
        expect(found[name], scene.device, torch.float32, 3, height * width)


def random_projection(scene: Scene, watch: Watch, in_kernel: bool) -> None:
    """LESS's directions of the pool, with Adam's moments, and its gradients of targets."""

    def add_product(rows: Tensor, first: int, start: Tensor, into: Tensor) -> None:
        assert {t.device for t in (rows, start, into)} == {scene.device}
        into.addmm_(rows, torch.empty(rows.shape[1], into.shape[1], device=rows.device))

    # in the place of Triton's, which knows no such tensors
    kernel = SimpleNamespace(add_product=add_product)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(projections, "has_kernel", lambda _: in_kernel),
        patch.dict(sys.modules, {"gradsift.gradients.sign_kernel": kernel}),  # type: ignore[dict-item]
    ):
        save_moments(scene, Path(folder))
        _project_at_random(scene, watch, Path(folder))


def _project_at_random(scene: Scene, watch: Watch, folder: Path) -> None:
    settings, engine = LessConfig(dimension=128), EngineConfig(memory=AMPLE)
    for with_moments in (True, False) if scene.tokens == TWO else (True,):
        args = (scene, folder, settings, engine, with_moments)
        measure, _ = make_random_projection_measure(*args)  # type: ignore[arg-type]
        watch.take()  # moments and seed are copied before the first batch
        found = measure(EXAMPLES, scene.tokens)
        expect(found["gradient"], scene.device, torch.float16, len(EXAMPLES), 128)


def save_moments(scene: Scene, folder: Path) -> None:
    """Store what LESS finds beside an adapter."""
    state = {}
    for block, shape in blocks(scene.model).items():
        layer, _, matrix = block.rpartition(".")
        for moment in ("exp_avg", "exp_avg_sq"):
            name = f"base_model.model.{layer}.lora_{matrix}.weight.{moment}"
            state[name] = np.ones(shape, np.float32)
    save_file(state, folder / layout.OPTIMIZER_STATE)


def forward(scene: Scene, watch: Watch) -> None:
    measure, _ = make_forward_measure(scene)  # type: ignore[arg-type]
    found = measure(EXAMPLES, scene.tokens)
    width = scene.model.config.hidden_size
    expect(found["loss"], scene.device, torch.float32, len(EXAMPLES))
    expect(found["hidden"], scene.device, torch.float16, len(EXAMPLES), width)


def hessian(scene: Scene, watch: Watch) -> None:
    """Products with a vector from the host, which is copied once; and with one on the GPU.

    There it asks, before its first batch and once for all, on which blocks the vector lies.
    """
    weights = np.full(len(EXAMPLES), 1 / len(EXAMPLES))
    operator = Hessian(scene.model, EXAMPLES, weights, TWO)
    vector = torch.ones(1, operator.size)
    expect(operator(vector), scene.device, scene.dtype, 1, operator.size)
    assert watch.take() == {
        "copy from cpu to cuda in gradsift.gradients.hessian.Hessian.__call__": 1
    }
    if scene.tokens == TWO:
        vector = torch.ones(1, operator.size, device=scene.device)
        expect(operator(vector), scene.device, scene.dtype, 1, operator.size)
        # fake tensors are asked for the entries of a list one by one
        place = "_local_scalar_dense in gradsift.gradients.hessian.Hessian.__call__"
        assert watch.take() == {place: len(operator.slices)}


def fitting_hessian(scene: Scene, watch: Watch) -> None:
    """Products in fewer tokens per batch where those of all examples together do not fit."""
    weights = np.full(len(EXAMPLES), 1 / len(EXAMPLES))
    build = partial(_fitting_hessian, scene.model, EXAMPLES, weights, EngineConfig())
    assert len(build(1000)._groups) == 1
    watch.largest = 1 << 13
    assert len(build(1000)._groups) > 1
    watch.take()  # a trial asks on which blocks its vector lies


def training_steps(scene: Scene, watch: Watch) -> None:
    """A warm-up of two steps: what the Trainer does between steps may wait, a step may not."""
    base = tiny_models.build(scene.family, dtype=scene.dtype).to(scene.device)
    watch.cuda.opened.clear()
    model = attach_lora(base, LoraConfig(rank=4, alpha=8), seed=0)
    assert watch.cuda.opened <= {scene.device.index}, watch.cuda.opened
    within: list[dict[str, int]] = []
    plain = training._Trainer.training_step

    def step(*args: Any, **kwargs: Any) -> Tensor:
        watch.take()
        found = plain(*args, **kwargs)
        within.append(watch.take())
        return found

    training._Trainer.training_step = step
    try:
        training.train(model, EXAMPLES, WarmupConfig(batch_size=5), steps=2, seed=0, progress=False)
    finally:
        training._Trainer.training_step = plain
    assert within == [{}, {}], within
    assert {p.device for p in model.parameters()} == {scene.device}
    watch.take()


def probing(scene: Scene, watch: Watch) -> None:
    """Tokens per batch where little fits: halved, and what comes after runs as if nothing was."""
    basis = make_basis(scene, offloaded=False)

    def measure(examples: Sequence[Encoded], max_tokens: int) -> object:
        return project(scene.model, examples, max_tokens, basis)

    watch.largest = 1 << 21
    tokens = find_batch_tokens(measure, lengths_of(EXAMPLES), EngineConfig(), scene.device)
    assert 1024 <= tokens <= 8192, tokens
    measure(EXAMPLES, scene.tokens)


PATHS: dict[str, Callable[[Scene, Watch], None]] = {
    "pool pass, offloaded": partial(pool_pass, offloaded=True),
    "two targets": partial(two_targets, offloaded=False),
    "gram": gram,
    "random projection": partial(random_projection, in_kernel=False),
    "random projection in a kernel": partial(random_projection, in_kernel=True),
    "forward": forward,
    "hessian": hessian,
    "training": training_steps,
}
MORE: dict[str, Callable[[Scene, Watch], None]] = {
    "basis read by the caller": basis_read_by_caller,
}
CONTAINED: dict[str, Callable[[Scene, Watch], None]] = {  # in others, but for what is costly
    "pool pass": partial(pool_pass, offloaded=False),
    "gradient rows": rows,
    "basis sums": basis_sums,
    "probing": probing,
    "fitting Hessian": fitting_hessian,
    "two targets, offloaded": partial(two_targets, offloaded=True),
}


def paths(how_many: str) -> dict[str, Callable[[Scene, Watch], None]]:
    """Return `some` paths by name, `most` or `all` of them."""
    return {"some": PATHS, "most": PATHS | MORE, "all": PATHS | MORE | CONTAINED}[how_many]


def check_batches(model: PeftModel) -> None:
    """Make sure that the examples fall into as many batches as their names say."""
    lengths = padded(model, lengths_of(EXAMPLES))
    assert not any(lengths % 8), lengths
    assert [len(group_examples(model, EXAMPLES, tokens)) for tokens in (TWO, THREE)] == [2, 3]


def run(what: str, case: Callable[[Scene, Watch], None], scene: Scene, cuda: FakeCuda) -> None:
    """Run a case and print what is wrong with it, if anything."""
    watch, problem = Watch(cuda), ""
    try:
        with watch:
            case(scene, watch)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is what the case found)
        traceback.print_exc(limit=-5)
        problem = f"{type(error).__name__}: {error}"
    if watch.waits:
        problem += f" waits: {dict(watch.waits)}"
    products = {str(dtype).removeprefix("torch."): n for dtype, n in watch.products.items()}
    print(json.dumps({"case": what, "problem": problem.strip(), "products": products}), flush=True)


def prepare(library: ctypes.CDLL) -> FakeCuda:
    """Put the GPUs in place that are not there."""
    cuda = FakeCuda(library)
    cuda.install()
    adapt_libraries()
    return cuda


def main(library: ctypes.CDLL, scenes: Sequence[str]) -> None:
    """Run the paths of each scene, such as `llama cuda:0 bfloat16 most`."""
    cuda = prepare(library)
    with FakeTensorMode(allow_non_fake_inputs=False):
        for asked in scenes:
            family, device, dtype, how_many = asked.split()
            scene = build(family, device, dtype, AMPLE if how_many == "some" else TWO)
            for path, case in paths(how_many).items():
                run(f"{family} {device} {dtype}: {path}", case, scene, cuda)
