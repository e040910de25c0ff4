"""The pool pass against the plain loop: same model, same examples, one process after the other.

The plain loop is what a research script does: one example at a time, logits at every position,
all gradients concatenated, one product with the stacked basis. Weights and tokens are random but
for `--shape base`; lengths are drawn as in a real pool of 13,000 instruction examples.

    python benchmarks/pool_pass.py --shape base --shape 135m
    python benchmarks/pool_pass.py --shape 1.5b --shape 7b --rank 128 --directions 64
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from gradsift.config import EngineConfig, LoraConfig
from gradsift.data.encoding import Encoded
from gradsift.gradients.basis import Basis
from gradsift.gradients.per_example import blocks
from gradsift.gradients.projection import project
from gradsift.models.batch_size import find_batch_tokens
from gradsift.models.batches import lengths_of
from gradsift.models.lora import attach_lora
from gradsift.runs.provenance import peak_memory

SHARED = Path(__file__).parents[2] / "shared"
# tokens, and the share of them that is supervised, of a real pool: every 5 % of its examples
LENGTHS = (
    *(18, 30, 39, 51, 59, 66, 72, 78, 83, 88, 95, 102, 112, 124, 140, 162, 191, 225, 269, 322, 616),
)
SUPERVISED = (
    *(0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.17, 0.21, 0.26, 0.32, 0.37),
    *(0.41, 0.46, 0.5, 0.53, 0.56, 0.6, 0.68, 0.81, 0.9, 0.97),
)


def _shape(hidden: int, layers: int, heads: tuple[int, int], mlp: int, vocabulary: int) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "135m": ("llama", _shape(576, 30, (9, 3), 1536, 49152) | {"tie_word_embeddings": True}),
    "100m": ("llama", _shape(640, 12, (10, 10), 1728, 32000) | {"tie_word_embeddings": False}),
    "1.5b": ("qwen2", _shape(1536, 28, (12, 2), 8960, 151936) | {"tie_word_embeddings": True}),
    "3b": ("qwen2", _shape(2048, 36, (16, 2), 11008, 151936) | {"tie_word_embeddings": True}),
    "7b": ("llama", _shape(4096, 32, (32, 32), 11008, 32000) | {"tie_word_embeddings": False}),
    "qwen-7b": ("qwen2", _shape(3584, 28, (28, 4), 18944, 152064) | {"tie_word_embeddings": False}),
    "14b": ("qwen2", _shape(5120, 48, (40, 8), 13824, 152064) | {"tie_word_embeddings": False}),
}  # 135m is SmolLM2's, 7b is Llama 2's, the others are Qwen2.5's; 100m is nobody's


def build_model(shape: str, rank: int, device: torch.device, layers: int = 0) -> PeftModel:
    """Return the model, or its first layers, with random LoRA matrices on q, k, v and o."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with device:
        if shape == "base":
            base = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "base", dtype=dtype)
        else:
            family, settings = SHAPES[shape]
            settings = settings | ({"num_hidden_layers": layers} if layers else {})
            base = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **settings), dtype=dtype
            )
    base = base.to(device).requires_grad_(False).eval()
    model = attach_lora(base, LoraConfig(rank=rank), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data = values.to(parameter.device, dtype)
    return model.requires_grad_(False).eval()  # type: ignore[return-value]


def draw_examples(count: int, vocabulary: int) -> list[Encoded]:
    """Return examples of random tokens with a pool's lengths; the last tokens are supervised."""
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, len(LENGTHS))
    examples = []
    for _ in range(count):
        length = int(np.interp(rng.random(), grid, LENGTHS))
        num_supervised = max(1, int(length * np.interp(rng.random(), grid, SUPERVISED)))
        supervised = np.arange(length) >= max(1, length - num_supervised)
        examples.append(Encoded(rng.integers(5, vocabulary, length).astype(np.int32), supervised))
    return examples


def useful_operations(model: PeftModel, examples: Sequence[Encoded]) -> int:
    """Return what no way to measure can do without: 4 per parameter and token it has to see.

    Forward and backward pass through frozen weights. Input embeddings are looked up, not
    multiplied; the output head has to see the tokens with a label alone.
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    rest = sum(p.numel() for p in model.parameters()) - head.numel()
    if embeddings is not head:
        rest -= embeddings.numel()
    num_labels = sum(int(example.supervised.sum()) for example in examples)
    return 4 * (rest * int(lengths_of(examples).sum()) + head.numel() * num_labels)


def random_basis(model: PeftModel, directions: int) -> dict[str, torch.Tensor]:
    """Return rows that are nearly orthonormal, the same in both processes."""
    device = model.device
    generator = torch.Generator(device).manual_seed(2)
    dtype = model.dtype if device.type == "cuda" else torch.float32
    total = sum(out * into for out, into in blocks(model).values())
    basis = {}
    for name, (out, into) in blocks(model).items():
        basis[name] = torch.empty(directions, out * into, dtype=dtype, device=device)
        basis[name].normal_(std=total**-0.5, generator=generator)
    return basis


def run_ours(
    model: PeftModel, examples: Sequence[Encoded], directions: int
) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """Return coordinates, seconds, and the batch size that was found."""
    basis = Basis(random_basis(model, directions), frozenset(), model.device)
    tokens = find_batch_tokens(
        partial(project, model, basis=basis), lengths_of(examples), EngineConfig(), model.device
    )
    project(model, examples[:64], tokens, basis).losses.cpu()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    coordinates = project(model, examples, tokens, basis).coordinates.cpu()
    return coordinates, time.perf_counter() - started, {"batch_tokens": tokens}


def run_plain(
    model: PeftModel, examples: Sequence[Encoded], directions: int
) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """The same, one example at a time with autograd."""
    parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    basis = random_basis(model, directions)
    names = [
        n.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".default.weight")
        for n in parameters
    ]
    stacked = torch.empty(
        directions,
        sum(p.numel() for p in parameters.values()),
        dtype=basis[names[0]].dtype,
        device=model.device,
    )
    start = 0
    for name in names:
        block = basis.pop(name)
        stacked[:, start : (start := start + block.shape[1])] = block
    coordinates = []

    def measure(example: Encoded) -> torch.Tensor:
        ids = torch.from_numpy(example.input_ids).long()[None].to(model.device)
        labels = ids.clone()
        labels[0, ~torch.from_numpy(example.supervised).to(model.device)] = -100
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return (stacked @ torch.cat([g.flatten() for g in gradients])).float().cpu()

    for example in examples[:3]:
        measure(example)
    started = time.perf_counter()
    coordinates = torch.stack([measure(example) for example in examples])
    return coordinates, time.perf_counter() - started, {}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the most floating-point operations per second of a square matrix product here."""
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        for _ in range(5):
            for _ in range(2):
                a @ b
            _wait(device)
            started = time.perf_counter()
            for _ in range(3):
                a @ b
            _wait(device)
            best = max(best, 3 * 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _one_side(side: str, shape: str, rank: int, directions: int, count: int, folder: Path) -> None:
    """Run one side in this process and leave coordinates and figures in the folder."""
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = matmul_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = build_model(shape, rank, device)
    examples = draw_examples(count, model.get_input_embeddings().num_embeddings)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_memory()
    run = run_ours if side == "ours" else run_plain
    coordinates, seconds, facts = run(model, examples, directions)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    tokens = int(lengths_of(examples).sum())
    np.save(folder / f"{side}.npy", coordinates.numpy())
    figures = facts | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "directions": directions,
        "examples_per_second": count / seconds,
        "tokens_per_second": tokens / seconds,
        "share_of_peak": useful_operations(model, examples) / seconds / peak,
        "peak_flops": peak,
        "memory": memory,
        "memory_over_model": memory - before,
    }
    (folder / f"{side}.json").write_text(json.dumps(figures))


def main(  # noqa: PLR0913, PLR0917
    shape: Annotated[list[str], typer.Option(help=f"base, {', '.join(SHAPES)}")] = ["base"],  # noqa: B006
    rank: Annotated[int, typer.Option(help="of the LoRA matrices")] = 128,
    directions: Annotated[list[int], typer.Option(help="of the basis")] = [64, 150],  # noqa: B006
    count: Annotated[int, typer.Option(help="examples for ours")] = 512,
    plain_count: Annotated[int, typer.Option(help="how many of them for the plain loop")] = 64,
    results: Annotated[Path | None, typer.Option(help="JSON Lines, appended as found")] = None,
    side: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Print examples/s, tokens/s, their ratio, the share of the peak, and memory of both."""
    if side:
        _one_side(side, shape[0], rank, directions[0], count, folder)
        return
    table = Table(
        "shape", "k", "side", "ex/s", "tok/s", "of peak", "GiB over model", "ratio", "agree"
    )
    for name in shape:
        for k in directions:
            counts = {"plain": plain_count, "ours": count}
            for row in _compare(name, rank, k, counts, results):
                table.add_row(name, str(k), *row)
    Console(width=120).print(table)


def _compare(
    shape: str, rank: int, k: int, counts: dict[str, int], results: Path | None
) -> list[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as scratch:
        for side, count in counts.items():
            subprocess.run(
                [
                    *(sys.executable, __file__, "--side", side, "--shape", shape),
                    *("--rank", str(rank), "--directions", str(k)),
                    *("--count", str(count), "--folder", scratch),
                ],
                check=True,
            )
            found_here = json.loads((Path(scratch) / f"{side}.json").read_text())
            _write_down(results, shape=shape, rank=rank, side=side, **found_here)
        figures = {s: json.loads((Path(scratch) / f"{s}.json").read_text()) for s in counts}
        found = {s: np.load(Path(scratch) / f"{s}.npy") for s in counts}
    common = min(counts.values())
    plain, ours = found["plain"][:common], found["ours"][:common]
    error = np.abs(plain - ours).max() / np.abs(plain).max()
    cosine = (plain * ours).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(ours, axis=1)
    ratio = figures["ours"]["tokens_per_second"] / figures["plain"]["tokens_per_second"]
    agree = {"error": float(error), "cosine": float(cosine.min())}
    _write_down(results, shape=shape, rank=rank, directions=k, ratio=ratio, **agree)
    assert error < (1e-3 if figures["ours"]["device"] == "cpu" else 0.1), error
    return [
        (
            side,
            f"{f['examples_per_second']:.3g}",
            f"{f['tokens_per_second']:,.0f}",
            f"{f['share_of_peak']:.0%}",
            f"{f['memory_over_model'] / 2**30:.2f}",
            f"{ratio:.1f}×" if side == "ours" else "",
            f"max {error:.0e}, cosine ≥ {cosine.min():.5f}" if side == "ours" else "",
        )
        for side, f in figures.items()
    ]


def _write_down(results: Path | None, **entry: object) -> None:
    if results:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"benchmark": "pool_pass", **entry}) + "\n")


if __name__ == "__main__":
    typer.run(main)
