"""Show on made-up skills that GIST picks the right examples and that they help.

Nothing is downloaded: a small Llama is trained on all skills until it half knows them, then the
real pipeline picks for one of them, and equal fine-tunings on its picks, on random picks and on
nothing are compared by the loss on held-out examples of that skill.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.config import Config, WarmupConfig
from gradsift.data import Encoded
from gradsift.demo import skills
from gradsift.demo.skills import SKILLS, make_examples
from gradsift.evaluation import Evaluation, evaluate
from gradsift.pipeline import run
from gradsift.types import RunResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TARGET = "sql"
_PER_SKILL = {"base": 600, "pool": 400, "target": 32, "held-out": 200}
_SEEDS = 3
_BASE: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_BASE_TRAINING = WarmupConfig(epochs=4, learning_rate=3e-3, batch_size=64, micro_batch_size=64)
_FINE_TUNING = {"learning_rate": 3e-3, "batch_size": 16, "micro_batch_size": 16}
_FINE_TUNING_EPOCHS = 8
_SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]


def run_demo(directory: Path, scale: float = 1.0) -> str:
    """Run the whole demonstration in a folder and return its closing table.

    `scale` shrinks the numbers of examples, for tests.
    """
    count = {name: max(8, int(number * scale)) for name, number in _PER_SKILL.items()}
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    base = _cached_base(count["base"])
    pool = [e for skill in SKILLS for e in make_examples(skill, count["pool"], seed=1)]
    np.random.default_rng(0).shuffle(pool)  # type: ignore[arg-type]
    files = {
        "pool": pool,
        "target": make_examples(TARGET, count["target"], seed=2),
        "held-out": make_examples(TARGET, count["held-out"], seed=3),
    }
    known = [example["messages"] for example in pool + files["target"]]
    files["held-out"] = [e for e in files["held-out"] if e["messages"] not in known]
    for name, examples in files.items():
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    config = Config.build(
        {
            "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
            "data": {
                "pool": str(data / "pool.jsonl"),
                "targets": {TARGET: str(data / "target.jsonl")},
            },
            "lora": {"rank": 16, "alpha": 32},
            "warmup": {"learning_rate": 1e-3, "batch_size": 32, "micro_batch_size": 32},
        }
    )
    result = run(config, directory / "run", overwrite=True)
    picks = len(result.selections[TARGET].picks)
    batch_size = _FINE_TUNING["batch_size"]
    found = evaluate(
        result.path,
        tests={TARGET: str(data / "held-out.jsonl")},
        methods=["gist"],
        seeds=_SEEDS,
        fine_tuning={**_FINE_TUNING, "steps": -(-picks // batch_size) * _FINE_TUNING_EPOCHS},
    )
    return _table(result, found)


def _cached_base(per_skill: int) -> Path:
    """Return the folder of the base model, trained on the first use and kept."""
    recipe = f"{_BASE} {_BASE_TRAINING} {_SPECIAL} {per_skill} {inspect.getsource(skills)}"
    name = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("GRADSIFT_CACHE", "~/.cache/gradsift")).expanduser()
    path = cache / f"demo-base-{name}"
    if path.exists():
        logger.info("base model: %s, trained before", path)
        return path
    logger.info("training a small base model on %d skills, kept in %s", len(SKILLS), path)
    examples = [e for skill in SKILLS for e in make_examples(skill, per_skill, seed=0)]
    partial = cache / f"{path.name}.{os.getpid()}"
    tokenizer = _train_tokenizer(examples)
    tokenizer.save_pretrained(str(partial))
    _train_base(tokenizer, examples).save_pretrained(str(partial))
    if path.exists():  # another process was quicker
        shutil.rmtree(partial)
    else:
        partial.rename(path)
    return path


def _train_tokenizer(examples: Sequence[dict[str, Any]]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=_BASE["vocab_size"],
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (m["content"] for example in examples for m in example["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_SPECIAL[0], pad_token=_SPECIAL[1]
    )


def _train_base(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]]
) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradsift.data import Encoder
    from gradsift.training import steps_per_epoch, train

    torch.manual_seed(0)
    ends: dict[str, Any] = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**_BASE, **ends, tie_word_embeddings=True))
    encoded = Encoder(tokenizer, _BASE["max_position_embeddings"], "tulu").encode(
        [example["messages"] for example in examples]
    )
    usable = [example for example in encoded if isinstance(example, Encoded)]
    assert len(usable) == len(examples), "the demonstration makes usable examples only"
    steps = steps_per_epoch(len(usable), _BASE_TRAINING) * _BASE_TRAINING.epochs
    train(model, usable, _BASE_TRAINING, steps=steps, seed=0, label="base model")
    return model


def _table(result: RunResult, found: Evaluation) -> str:
    everything = result.scores(["source"])["source"].to_pylist()
    picked = result.selections[TARGET].picks["source"].to_pylist()
    shares = {
        name: f"{sources.count(TARGET) / len(sources):.1%}"
        for name, sources in (("gist", picked), ("random", everything))
    }
    lines = [
        f"{len(picked)} picks for {TARGET!r} out of {len(everything)} examples of {len(SKILLS)} "
        f"skills, and the same fine-tuning on each choice ({_SEEDS} seeds)",
        "",
        f"{'fine-tuned on':<16}{f'share of {TARGET!r}':>16}{'held-out loss':>18}",
    ]
    rows = {row.method: row for row in found.rows}
    for name, label in {
        "gist": "GIST's picks",
        "random": "random picks",
        "base": "nothing",
    }.items():
        loss = f"{rows[name].loss:.3f}"
        if rows[name].seeds > 1:
            loss += f" ± {rows[name].loss_std:.3f}"
        share = shares.get(name, "") + (" (pool)" if name == "random" else "")
        lines.append(f"{label:<16}{share:>16}{loss:>18}")
    return "\n".join([*lines, "", *found.verdicts])
