"""Model and adapter folders of somebody else: code that must not run, and all that can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from conftest import Write, configure
from gradsift.config import Config, ModelConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import DataError, ModelError
from gradsift.models.adapters import load_adapter
from gradsift.models.cache import ModelCache
from gradsift.models.files import known_sizes, load_tokenizer
from gradsift.models.loading import load_base
from gradsift.pipeline import run

Rows = list[dict[str, Any]]
CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "of_its_own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokens(PreTrainedTokenizerFast):
    pass
"""


def on(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), device="cpu", **settings)


def edit(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def with_code(copy: Path, tmp_path: Path) -> Path:
    """A model whose configuration, model and tokenizer name classes of a file beside them."""
    (copy / "theirs.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    edit(copy / "config.json", auto_map=classes, model_type="of_its_own", architectures=["Model"])
    tokens = {"AutoTokenizer": ["theirs.Tokens", "theirs.Tokens"]}
    edit(copy / "tokenizer_config.json", auto_map=tokens, tokenizer_class="Tokens")
    return copy


@pytest.mark.parametrize("load", [load_tokenizer, known_sizes, load_base])
def test_code_that_comes_with_a_model_is_not_run(
    with_code: Path, tmp_path: Path, load: Callable[[ModelConfig], object]
) -> None:
    with pytest.raises(ModelError, match=r"code of its own, which is not run; .*trust_remote_code"):
        load(on(with_code))
    assert not (tmp_path / "mark").exists()


def test_it_runs_where_the_user_says_so(with_code: Path, tmp_path: Path) -> None:
    assert load_base(on(with_code, trust_remote_code=True)).config.model_type == "of_its_own"
    assert (tmp_path / "mark").exists()


@pytest.mark.slow
def test_yes_on_standard_input_runs_nothing(
    with_code: Path, tmp_path: Path, write: Write, pool_rows: Rows
) -> None:
    pool, target = write("pool.jsonl", pool_rows[:10]), write("t.jsonl", pool_rows[:3])
    command = [sys.executable, "-m", "gradsift", "select", "--model", str(with_code)]
    command += ["--pool", str(pool), "--target", str(target), "--output-dir", str(tmp_path / "run")]
    found = subprocess.run(command, input="yes\n" * 99, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "code of its own, which is not run" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "mark").exists()


def test_attention_from_the_hub_is_not_fetched(copy: Path) -> None:
    with pytest.raises(ModelError, match=r"'somebody/kernel' .* is code from the Hub, which is"):
        load_base(on(copy, attention="somebody/kernel"))
    edit(copy / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(ModelError, match=r"'somebody/kernel' .* is code from the Hub, which is"):
        load_base(on(copy))


def test_trust_stands_in_the_configuration_and_the_report(
    base: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    config = configure(
        base, write("pool.jsonl", pool_rows[:20]), {"t": write("t.jsonl", pool_rows[:3])},
        model={"trust_remote_code": True}, method="length",
    )  # fmt: skip
    run(config, tmp_path / "run")
    assert "trust_remote_code: true" in (tmp_path / "run/config.yaml").read_text()
    report = (tmp_path / "run/report.html").read_text()
    assert "model.trust_remote_code=true: code that came with the model was run" in report
    run(config.model_copy(update={"model": on(base)}), tmp_path / "other")
    assert "trust_remote_code=true" not in (tmp_path / "other/report.html").read_text()


def test_pickled_weights_are_not_read(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled \(.*/pytorch_model.bin\), which can run code"):
        load_base(on(copy))


def test_missing_weights_are_named(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    del weights[gone]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"lacks 1 of its weights, .*random numbers: {gone}"):
        load_base(on(copy))


def _shape(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=48, head_dim=12)


def _kind(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers="two")


def _negative(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=-32)


def _list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def _nested(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)


def _not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{\x00")


def _positions(folder: Path) -> None:
    edit(folder / "config.json", max_position_embeddings=-5)


def _type(folder: Path) -> None:
    edit(folder / "config.json", model_type=7)


def _tokens(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


def _token_settings(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('"text"')


def _no_tokens(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def _a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@pytest.mark.parametrize(
    "damage",
    [_shape, _kind, _negative, _list, _nested, _not_text, _positions, _type, _tokens,
     _token_settings, _no_tokens, _weights, _a_folder],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_wrong_with_a_model_folder_is_told(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=r"cannot load the (model|tokenizer of) '.*model'"):
        for load in (load_tokenizer, known_sizes, load_base):
            load(on(copy))


def test_a_model_folder_with_an_adapter_in_it_is_refused(copy: Path, adapter: Path) -> None:
    for path in adapter.iterdir():  # transformers would load the base model that it names
        shutil.copyfile(path, copy / path.name)
    with pytest.raises(ModelError, match=r"holds an adapter; name its base model with --model, an"):
        load_base(on(copy))


@pytest.mark.parametrize(
    "change",
    [{"chat_template": [{"name": "rag", "template": "x"}]}, {"model_max_length": "x"}],
    ids=str,
)
def test_tokenizer_settings_of_the_wrong_kind_are_told(
    copy: Path, write: Write, pool_rows: Rows, tmp_path: Path, change: dict[str, Any]
) -> None:
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    edit(copy / "tokenizer_config.json", **change)
    pool, target = write("pool.jsonl", pool_rows[:20]), write("t.jsonl", pool_rows[:3])
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of '.*model'"):
        run(configure(copy, pool, {"t": target}, method="length"), tmp_path / "run")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_change_the_base_are_refused(
    base: Path, adapter: Path, tmp_path: Path, start: str
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    loftq = {"loftq_config": {"loftq_bits": 4}} if start == "loftq" else {}
    edit(copy / "adapter_config.json", init_lora_weights=start, **loftq)
    with pytest.raises(ModelError, match=rf"init_lora_weights='{start}', which changes the weigh"):
        load_adapter(load_base(on(base)), copy)


@pytest.mark.parametrize(
    "changes",
    [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
     {"init_lora_weights": False}, {"use_rslora": True}, {"r": 2, "lora_alpha": 64},
     {"rank_pattern": {"q_proj": 2}}, {"target_modules": "all-linear"}],
    ids=str,
)  # fmt: skip
def test_the_base_is_bit_for_bit_what_it_was_after_any_adapter(
    base: Path, adapter: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    path = tiny_models.save_adapter(base, tmp_path / "adapter", **changes)
    switch = ModelCache(on(base))
    before = {name: value.clone() for name, value in switch.base().state_dict().items()}
    for step in (path, adapter, path):
        switch.with_adapter(step)
        after = switch.base().state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "four"}, "cannot load the adapter"),
        ({"r": -1}, "cannot load the adapter"),
        ({"r": 5}, "belongs to another base model"),
        ({"lora_alpha": None}, "cannot load the adapter"),
        ({"target_modules": 7}, "cannot load the adapter"),
        ({"target_modules": ["nothing"]}, "does not fit"),
        ({"peft_type": "NONSENSE"}, "cannot load the adapter"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeated layers"),
        ({"base_model_name_or_path": 5, "r": 7}, "belongs to another base model"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_wrong_with_an_adapter_is_told(
    base: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit(copy / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_adapter(load_base(on(base)), copy)


def test_an_adapter_of_other_json_is_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    for text in ("[]", '"text"', "{", '{"a":' * 5000 + "1" + "}" * 5000):
        (copy / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match="cannot load the adapter"):
            load_adapter(load_base(on(base)), copy)


@pytest.mark.slow
def test_adapters_are_kept_the_same_bytes_whatever_the_hashes(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from gradsift.config import ModelConfig\n"
        "from gradsift.models.adapters import load_adapter, save_adapter\n"
        "from gradsift.models.loading import load_base\n"
        "base, adapter, into = map(Path, sys.argv[1:])\n"
        "model = load_adapter(load_base(ModelConfig(name=str(base), device='cpu')), adapter)\n"
        "save_adapter(model, into)\n"
    )
    wide = tiny_models.save_adapter(base, tmp_path / "wide", target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"])  # fmt: skip
    found = []
    for seed in ("1", "2"):
        into = tmp_path / seed
        arguments = [sys.executable, "-c", code, str(base), str(wide), str(into)]
        subprocess.run(arguments, check=True, capture_output=True, env={"PYTHONHASHSEED": seed})
        found.append({path.name: path.read_bytes() for path in into.iterdir()})
    assert found[0] == found[1]
    assert found[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert isinstance(peft.PeftConfig.from_pretrained(str(tmp_path / "1")), peft.LoraConfig)


def test_tokens_beyond_the_embeddings_cost_their_row(
    copy: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens([f"<|more {i}|>" for i in range(300 - len(tokenizer))] + ["<|beyond|>"])
    tokenizer.save_pretrained(str(copy))
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<|beyond|>"}]
    pool = write("pool.jsonl", [*pool_rows[:20], {"messages": said}])
    target = write("t.jsonl", pool_rows[:3])
    run(configure(copy, pool, {"t": target}, method="length"), tmp_path / "run")
    [reason] = map(json.loads, (tmp_path / "run/rejected.jsonl").read_text().splitlines())
    assert reason["line"] == 21
    assert reason["reason"].startswith("token 300 ('<|beyond|>') is beyond the model's 300 embedd")
    assert len(EncodedSet(tmp_path / "run/data/pool.parquet")) == 20
    with pytest.raises(DataError, match=r"no usable row .* beyond the model's 300 embeddings"):
        only = write("only.jsonl", [{"messages": said}])
        run(configure(copy, only, {"t": target}, method="length"), tmp_path / "other")


def test_a_model_of_the_hub_is_known_by_its_commit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies in the cache of the Hub: no code is run, nothing but config.json is read."""
    from gradsift.models.identity import identity

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub/models--org--name"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    shutil.copyfile(base / "config.json", folder / "snapshots" / commit / "config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert identity("org/name") == commit
    assert Config.model_fields["model"].is_required()
