"""The Hessian of a target's loss in the LoRA parameters, by its products with vectors.

    H v = ∇(∇L · v),   L = Σ_e w_e ℓ_e

(Pearlmutter, 1994): the first backward pass is kept as a graph, and each product is one more pass
through it; nothing of size parameter × parameter is ever formed. A vector is flat, the blocks (A
and B of each adapted layer) one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from gradsift.data.encoding import Encoded
from gradsift.errors import ConfigError
from gradsift.gradients.lanczos import lanczos_bytes, largest_eigenpairs, most_eigenvectors
from gradsift.gradients.memory import host_memory
from gradsift.gradients.per_example import blocks
from gradsift.models.batches import group_examples, make_batches, to_device
from gradsift.models.lora import lora_pairs
from gradsift.models.losses import label_logits

logger = logging.getLogger(__name__)


class Hessian:
    """The Hessian of Σ_e w_e ℓ_e over some examples, in the model's precision.

    `slices`: where each block, of `shapes` (out, in), lies in a flat vector of `size` entries.
    Products are formed on `device`, the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Encoded],
        weights: Float[np.ndarray, " example"],
        max_tokens: int,
    ) -> None:
        """Remember the examples, in batches of at most `max_tokens` once padded."""
        self._model, self._examples, self._weights = model, examples, weights
        self._groups = group_examples(model, examples, max_tokens)
        self.shapes = blocks(model)
        sizes = {name: prod(shape) for name, shape in self.shapes.items()}
        ends = np.cumsum([*sizes.values()]).tolist()
        parts = zip(sizes.items(), ends, strict=True)
        self.slices = {name: slice(end - size, end) for (name, size), end in parts}
        self.size: int = ends[-1]
        self._parameters = [m.weight for pair in lora_pairs(model).values() for m in pair]
        self.device = self._parameters[0].device

    def __call__(
        self, vectors: Float[Tensor, "probe parameter"], rows: Collection[str] = ()
    ) -> Float[Tensor, "probe parameter"]:
        """Return H v for each vector; with `rows`, zero outside the blocks so named."""
        names = [*self.slices]
        wanted = [i for i, name in enumerate(names) if not rows or name in rows]
        # blocks on which no vector lies take no part in the inner product; asked for all at once,
        # as the answer waits for a GPU
        lies = torch.stack([vectors[:, own].any() for own in self.slices.values()]).tolist()
        given = [i for i, any_there in enumerate(lies) if any_there]
        vectors = vectors.to(self._parameters[0])
        products = torch.zeros_like(vectors)
        for gradient in self._gradients():
            for vector, into in zip(vectors, products, strict=True):
                along = sum(gradient[i].flatten() @ vector[self.slices[names[i]]] for i in given)
                if not isinstance(along, Tensor) or not along.requires_grad:
                    continue  # a zero vector, or a gradient that no parameter changes
                parameters = [self._parameters[i] for i in wanted]
                found = torch.autograd.grad(along, parameters, retain_graph=True, allow_unused=True)
                for i, part in zip(wanted, found, strict=True):
                    if part is not None:
                        into[self.slices[names[i]]] += part.flatten()
        return products

    def _gradients(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield each batch's gradient, block by block, as a graph to be passed through again."""
        coming = make_batches(self._model, self._examples, self._groups)
        with _twice_differentiable(self._parameters), closing(coming) as batches:
            for group, batch in zip(self._groups, batches, strict=True):
                own = to_device(self._weights[group].astype(np.float32), self.device)
                logits = label_logits(self._model, batch)
                # our own softmax (`token_losses`) has no second derivative
                nll = cross_entropy(logits, batch.labels, reduction="none")
                loss = (nll * batch.weights * own[batch.rows]).sum()
                yield torch.autograd.grad(
                    loss, self._parameters, create_graph=True, materialize_grads=True
                )


@contextmanager
def _twice_differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let the parameters have gradients, and gradients of gradients, for a while.

    The fused attention kernels have no second derivative; the plain one does.
    """
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def check_eigenvectors(count: int, num_parameters: int, memory: int) -> None:
    """Find out whether so many eigenvectors of a Hessian can be looked for here.

    `memory`: the bytes that they may take on the model's device; else they lie in the host's.

    Raises:
        ConfigError: If there are not so many, or their Lanczos vectors do not fit into memory.
    """
    asked = f"asked for {count:,} eigenvectors of a Hessian over {num_parameters:,} parameters"
    if count >= num_parameters:
        raise ConfigError(f"{asked}; ask for fewer than it has (--eigenvectors)")
    needed, room = lanczos_bytes(count, num_parameters), max(memory, host_memory())
    if needed > room:
        most = most_eigenvectors(room, num_parameters)
        advice = f"ask for at most {most:,} (--eigenvectors)"
        raise ConfigError(
            f"{asked}: the vectors of Lanczos' method take {needed / 2**30:,.1f} GiB, and "
            f"{room / 2**30:,.1f} are free on the model's device or in host memory; "
            f"{advice if most else 'even one needs more than there is'}"
        )


def leading_eigenpairs(
    hessian: Hessian, count: int, seed: int, memory: int
) -> tuple[Float[np.ndarray, " eigenvalue"], Float[np.ndarray, "eigenvalue parameter"]]:
    """Return the eigenvalues of largest magnitude, the largest first, and their unit vectors.

    In float32, to a relative accuracy of 1 % (`largest_eigenpairs`). The vectors that Lanczos'
    method works with lie on the model's device if they take at most `memory` bytes, else in host
    memory; then each is copied for its product, and the product copied back.
    """
    num_products = 0

    def multiply(vector: Tensor) -> Tensor:
        nonlocal num_products
        num_products += 1
        return hessian(vector[None])[0]

    fits = lanczos_bytes(count, hessian.size) <= memory
    device = hessian.device if fits else torch.device("cpu")
    values, vectors = largest_eigenpairs(multiply, hessian.size, count, seed, device)
    logger.info("%d eigenvectors took %d products with the Hessian", count, num_products)
    return values, vectors.numpy()


def sines(
    inside: Float[np.ndarray, "direction vector"],
) -> Float[np.ndarray, " angle"]:
    """Return the sines of the principal angles between two subspaces, the largest first.

    `inside`: the coordinates of one's orthonormal basis in the other's.

    >>> sines(np.array([[1.0, 0.0], [0.0, 0.6]])).round(6).tolist()
    [0.8, 0.0]
    """
    cosines = np.linalg.svd(inside, compute_uv=False)
    return np.sqrt(np.clip(1 - cosines**2, 0, None))[::-1]


@dataclass(frozen=True)
class Estimate:
    """A mean over probes and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Coupling:
    """Where the squared Frobenius norm of a Hessian lies, as shares, estimated.

    `off_diagonal`: of the whole norm, what no diagonal holds: min_D ‖H − D‖² / ‖H‖² over diagonal
    D. `cross`: of the whole, between A and B of the same layer. `between_layers`: of the whole,
    between different layers. `layers`: of each layer's own sub-matrix, what lies between its A and
    its B. `masses`: ‖H_bc‖² of every two blocks.
    """

    off_diagonal: Estimate
    cross: Estimate
    between_layers: Estimate
    layers: Mapping[str, Estimate]
    masses: Float[np.ndarray, "block block"]


def measure_coupling(
    hessian: Hessian,
    num_probes: int,
    seed: int,
    advance: Callable[[int], object] = lambda done: None,
) -> Coupling:
    """Return where the Hessian's squared entries lie, from random signs v on one block at a time.

    With v on block c alone, E‖(Hv)_b‖² = ‖H_bc‖², and E[v ⊙ (Hv)_c] is the diagonal of H_cc
    (Hutchinson, 1989). Its squares are summed over pairs of different probes, which alone is
    unbiased: the square of a mean would count noise as diagonal. Standard errors are the
    jackknife's over the probes.
    """
    assert num_probes >= 3, "a jackknife leaves one out, and two make a pair"
    rng, slices = np.random.default_rng(seed), [*hessian.slices.values()]
    squares = np.zeros((num_probes, len(slices), len(slices)))  # of a probe on c, found in b
    pairs = np.zeros((num_probes, num_probes, len(slices)))
    for c, own in enumerate(slices):
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], (num_probes, own.stop - own.start)))
        probes = torch.zeros(num_probes, hessian.size, device=hessian.device)
        probes[:, own] = signs.to(probes)
        products = hessian(probes)
        found = torch.stack([products[:, o].double().square().sum(1) for o in slices], 1)
        squares[:, :, c] = found.cpu().numpy()
        diagonals = signs * products[:, own].double().cpu()
        pairs[:, :, c] = (diagonals @ diagonals.T).numpy()
        advance(1)
    layers = [name.rpartition(".")[0] for name in hessian.slices]

    def shares(kept: np.ndarray) -> np.ndarray:
        return _shares(squares[kept], pairs[np.ix_(kept, kept)], layers)

    everything = np.arange(num_probes)
    shared = shares(everything)
    others = np.stack([shares(np.delete(everything, i)) for i in everything])
    errors = np.sqrt((num_probes - 1) * others.var(axis=0))
    estimates = [Estimate(float(v), float(e)) for v, e in zip(shared, errors, strict=True)]
    per_layer = dict(zip(dict.fromkeys(layers), estimates[3:], strict=True))
    masses = _symmetric(squares.mean(axis=0))
    return Coupling(*estimates[:3], layers=per_layer, masses=masses)


def _shares(
    squares: Float[np.ndarray, "probe block block"],
    pairs: Float[np.ndarray, "probe probe block"],
    layers: Sequence[str],
) -> Float[np.ndarray, " share"]:
    """Return off-diagonal, cross and between-layer shares, then the cross share of each layer."""
    masses, num_probes = _symmetric(squares.mean(axis=0)), len(squares)
    diagonal = (pairs.sum() - np.trace(pairs).sum()) / (num_probes * (num_probes - 1))
    total = masses.sum()
    cross, own = [], []
    for layer in dict.fromkeys(layers):
        a, b = (i for i, name in enumerate(layers) if name == layer)
        cross.append(2 * masses[a, b])
        own.append(masses[a, a] + masses[b, b] + cross[-1])
    within = np.divide(cross, own, out=np.zeros(len(own)), where=np.array(own) > 0)
    whole = [1 - diagonal / total, np.sum(cross) / total, 1 - np.sum(own) / total]
    return np.array([*whole, *within])


def _symmetric(matrix: Float[np.ndarray, "block block"]) -> Float[np.ndarray, "block block"]:
    return (matrix + matrix.T) / 2


def entries(
    hessian: Hessian, layer: str, per_block: int
) -> tuple[Float[np.ndarray, "entry entry"], list[str]]:
    """Return some entries of a layer's own sub-matrix, exactly, and what parameter each is.

    They are spread evenly over A and then B, so that several rank components are among them.
    """
    names = (f"{layer}.A", f"{layer}.B")
    chosen: list[int] = []
    labels: list[str] = []
    for name in names:
        own, (_, width) = hessian.slices[name], hessian.shapes[name]
        flat = np.linspace(0, own.stop - own.start - 1, per_block).astype(int)
        chosen += [own.start + int(i) for i in flat]
        labels += [f"{name[-1]}[{i // width},{i % width}]" for i in flat]
    rows = []
    for column in chosen:  # one at a time: a vector is as large as all of the adapter
        unit = torch.zeros(1, hessian.size, device=hessian.device)
        unit[0, column] = 1
        rows.append(hessian(unit, rows=names)[0, chosen].double().cpu().numpy())
    return _symmetric(np.stack(rows)), labels
