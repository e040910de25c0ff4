"""Show on made-up skills that GIST picks the right examples and that they help.

Nothing is downloaded: a small Llama is trained on all skills until it half knows them, then the
real pipeline picks for one of them, and equal fine-tunings on its picks, on random picks and on
nothing are compared by the loss on held-out examples of that skill.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gradsift.config import Config
from gradsift.demo.base_model import cached_base
from gradsift.demo.skills import SKILLS, make_examples
from gradsift.evaluation.evaluate import evaluate
from gradsift.evaluation.results import Evaluation
from gradsift.pipeline import RunResult, run

TARGET = "sql"
_PER_SKILL = {"base": 600, "pool": 400, "target": 32, "held-out": 200}
_SEEDS = 3
_FINE_TUNING = {"learning_rate": 3e-3, "batch_size": 16, "micro_batch_size": 16}
_FINE_TUNING_EPOCHS = 8


def run_demo(directory: Path, scale: float = 1.0) -> str:
    """Run the whole demonstration in a folder and return its closing table.

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
