"""Sentence embeddings, with an encoder built in code; needs the optional sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from conftest import Write, configure
from gradsift.errors import ModelError
from gradsift.pipeline import run

Rows = list[dict[str, Any]]
sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="the optional sentence-transformers is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    BertModel(
        BertConfig(vocab_size=300, num_attention_heads=4, initializer_range=0.3, **shape)
    ).save_pretrained(str(tmp_path / "bert"))
    tiny_models.tokenizer().save_pretrained(str(tmp_path / "bert"))
    inner = Transformer(str(tmp_path / "bert"), max_seq_length=64)
    SentenceTransformer(modules=[inner, Pooling(32)], device="cpu").save(str(tmp_path / "encoder"))
    return tmp_path / "encoder"


def test_scores_are_the_largest_cosines_of_the_encoder(
    base: Path, encoder: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> None:
    config = configure(
        base, write("pool.jsonl", pool_rows[:40]), {"t": write("t.jsonl", target_rows)},
        method="embed", embed={"model": str(encoder)},
    )  # fmt: skip
    result = run(config, tmp_path / "run")
    model = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    pool, target = (
        model.encode(["\n".join(m["content"] for m in row["messages"]) for row in rows])
        for rows in (pool_rows[:40], target_rows)
    )
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (pool, target)]
    expected = (unit[0] @ unit[1].T).max(axis=1)
    np.testing.assert_allclose(result.scores()["t/score"].to_numpy(), expected, atol=1e-5)
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/embed/pool").iterdir()}
    assert len(shards) == 2
    run(config.model_copy(update={"method": "length"}), tmp_path / "run")
    run(config, tmp_path / "run")
    assert shards == {p: p.stat().st_mtime_ns for p in shards}


def test_a_folder_that_is_no_encoder_is_named(
    base: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    config = configure(
        base, write("pool.jsonl", pool_rows[:20]), {"t": write("t.jsonl", pool_rows[:2])},
        method="embed", embed={"model": str(tmp_path / "empty")},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"cannot load the encoder '.*empty'"):
        run(config, tmp_path / "run")


def test_an_encoder_with_code_or_pickles_is_refused(
    base: Path, encoder: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    config = configure(
        base, write("pool.jsonl", pool_rows[:20]), {"t": write("t.jsonl", pool_rows[:2])},
        method="embed", embed={"model": str(encoder)},
    )  # fmt: skip
    parts = json.loads((encoder / "modules.json").read_text())
    mark = tmp_path / "mark"
    (encoder / "theirs.py").write_text(
        f"open({str(mark)!r}, 'w').write('it ran')\n"
        "from sentence_transformers.models import Pooling as Theirs\n"
    )
    theirs = [parts[0], parts[1] | {"type": "theirs.Theirs"}, *parts[2:]]
    (encoder / "modules.json").write_text(json.dumps(theirs))
    with pytest.raises(ModelError, match=r"the encoder .* code of its own, which is not run"):
        run(config, tmp_path / "run")
    assert not mark.exists()
    (encoder / "modules.json").write_text(json.dumps(parts))
    weights = next(path for path in encoder.rglob("*.safetensors"))
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"the encoder .* are pickled"):
        run(config, tmp_path / "run")
