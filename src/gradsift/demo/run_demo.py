"""Show on made-up skills that the right examples are picked and that they help.

Nothing is downloaded: a small Llama is trained on all skills until it half knows them, then the
real pipeline picks for one of them, by GIST and by two rivals, and equal fine-tunings on their
picks, on random picks and on nothing are compared by the loss on held-out examples of that skill.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from gradsift.config import Config
from gradsift.demo.base_model import cached_base
from gradsift.demo.skills import SKILLS, make_examples
from gradsift.evaluation.evaluate import evaluate
from gradsift.pipeline import run

logger = logging.getLogger(__name__)

TARGET = "sql"
_PER_SKILL = {"base": 600, "pool": 400, "target": 32, "held-out": 200}
_SEEDS = 3
_FINE_TUNING = {"learning_rate": 3e-3, "batch_size": 16}
_FINE_TUNING_EPOCHS = 8
_METHODS = ("gist", "influence", "bm25")


@dataclass(frozen=True)
class Found:
    """What the demonstration found: shares of the target's skill, and held-out losses.

    `fine_tunings`: by what was fine-tuned on (`random`: random picks, `base`: nothing), share of
    the skill (none if nothing), mean loss and its standard deviation over the seeds.
    """

    run: Path
    first_pick: str
    num_picks: int
    num_pool: int
    fine_tunings: Mapping[str, tuple[float | None, float, float]]
    verdicts: Sequence[str]

    def text(self) -> str:
        """Return the closing table."""
        head = f"{'fine-tuned on':<18}{f'share of {TARGET!r}':>16}{'held-out loss':>18}"
        lines = []
        for name, (share, loss, deviation) in self.fine_tunings.items():
            label = {"random": "random picks", "base": "nothing"}.get(name, f"picks of {name}")
            of_skill = "" if share is None else f"{share:.1%}"
            in_pool = " (pool)" if name == "random" else ""
            noise = f" ± {deviation:.3f}" if deviation else ""
            lines.append(f"{label:<18}{of_skill + in_pool:>16}{f'{loss:.3f}{noise}':>18}")
        return "\n".join(
            [
                f"{self.num_picks} picks for {TARGET!r} out of {self.num_pool} examples of "
                f"{len(SKILLS)} skills, and the same fine-tuning on each choice, "
                f"{_SEEDS} times or more",
                "",
                head,
                *lines,
                "",
                *self.verdicts,
            ]
        )


def run_demo(directory: Path, scale: float = 1.0) -> Found:
    """Run the whole demonstration in a folder and return what it found.

    `scale` shrinks the numbers of examples, for tests.
    """
    count = {name: max(8, int(number * scale)) for name, number in _PER_SKILL.items()}
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    base = cached_base(count["base"])
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
            "warmup": {"learning_rate": 1e-3, "batch_size": 32, "micro_batch_tokens": 2048},
        }
    )
    logger.info(
        "now the main job: warm-up, gradients of %d examples of %r, and the best 5%% of %d picked",
        len(files["target"]), TARGET, len(pool),
    )  # fmt: skip
    result = run(config, directory / "run", overwrite=True)
    chosen, everything = result.selections[TARGET].picks, result.scores(["source"])
    shares = {"gist": _share(chosen)}
    for method in _METHODS[1:]:
        logger.info("the same by %s, kept beside it", method)
        policy = config.policy.model_copy(update={"name": method})
        rival = config.model_copy(update={"method": method, "policy": policy})
        shares[method] = _share(run(rival, result.path).selections[TARGET].picks)
    batch_size = _FINE_TUNING["batch_size"]
    logger.info("last: does it help? %d fine-tunings on each choice, and none", _SEEDS)
    found = evaluate(
        result.path,
        tests={TARGET: str(data / "held-out.jsonl")},
        methods=_METHODS,
        seeds=_SEEDS,
        fine_tuning={**_FINE_TUNING, "steps": -(-len(chosen) // batch_size) * _FINE_TUNING_EPOCHS},
    )
    rows = {row.method: row for row in found.rows}
    return Found(
        run=result.path,
        first_pick=chosen["id"][0].as_py(),
        num_picks=len(chosen),
        num_pool=len(everything),
        fine_tunings={
            name: (share, rows[name].loss, rows[name].loss_std)
            for name, share in (shares | {"random": _share(everything), "base": None}).items()
        },
        verdicts=found.verdicts,
    )


def _share(table: pa.Table) -> float:
    """Return how many of some examples are of the target's skill."""
    sources = table["source"].to_pylist()
    return sources.count(TARGET) / len(sources)
