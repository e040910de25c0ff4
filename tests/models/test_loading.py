"""Adapters that can be measured exactly, and the refusal of all others."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models
from gradsift.config import LoraConfig, ModelConfig, WarmupConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.errors import ModelError
from gradsift.gradients.per_example import PerExampleGradients
from gradsift.models import loading
from gradsift.models.adapters import load_adapter
from gradsift.models.batches import Batch
from gradsift.models.cache import ModelCache
from gradsift.models.loading import check_causal, load_base, resolve_dtype
from gradsift.models.lora import attach_lora, lora_pairs
from gradsift.models.warmup import warm_up


def on(base: Path) -> ModelConfig:
    return ModelConfig(name=str(base), device="cpu")


def test_an_adapter_comes_back_as_it_was(base: Path, adapter: Path) -> None:
    ours = load_adapter(load_base(on(base)), adapter)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(base)), str(adapter)
    ).eval()
    ids = torch.arange(40)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert [*lora_pairs(ours)] == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ]


def test_an_adapter_that_is_given_is_kept_as_it_came(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    models = ModelCache(ModelConfig(name=str(base), device="cpu", dtype="bfloat16"))
    given = WarmupConfig(adapter=str(adapter))
    warm_up(given, LoraConfig(), models, EncodedSet(tmp_path / "not read"), tmp_path)
    kept, weights = tmp_path / "adapter", "adapter_model.safetensors"
    assert (kept / weights).read_bytes() == (adapter / weights).read_bytes()  # in float32
    assert next(iter(load_file(kept / weights).values())).dtype == torch.float32
    model = models.with_adapter(kept)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"more than plain LoRA matrices: DoRA \(use_dora\)"),
        ({"modules_to_save": ["lm_head"]}, "fully trained modules"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
        ({"target_modules": ["embed_tokens", "q_proj"]},
         r"cannot measure LoRA on model.embed_tokens \(Embedding\); adapt linear layers only"),
        ({"lora_bias": True}, r"cannot measure model.layers.0.self_attn.q_proj: .*have biases"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_plain_lora_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    adapter = tiny_models.save_adapter(base, tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=message):
        lora_pairs(load_adapter(load_base(on(base)), adapter))


def test_an_adapter_that_is_no_lora_is_refused(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(base))
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]
    )
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=r"is a .*IA3 adapter; gradsift measures LoRA only"):
        load_adapter(load_base(on(base)), tmp_path)


def test_an_adapter_of_another_base_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    wider = tiny_models.save_base(tmp_path / "wider", hidden_size=64)
    with pytest.raises(
        ModelError, match=r"belongs to another base model: .*lora_A.* is \[4, 32\] th"
    ):
        load_adapter(load_base(on(wider)), adapter)
    tiny_models.build("gpt2").save_pretrained(str(tmp_path / "gpt2"))
    with pytest.raises(ModelError, match=r"does not fit .*gpt2"):
        load_adapter(load_base(on(tmp_path / "gpt2")), adapter)


def test_a_model_of_another_name_but_equal_shapes_is_told(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_adapter(load_base(on(tiny_models.save_base(tmp_path / "copy"))), adapter)
    assert "says it was trained on" in caplog.text


def test_half_precision_leaves_rotary_frequencies_alone(base: Path, adapter: Path) -> None:
    model = load_adapter(
        load_base(ModelConfig(name=str(base), device="cpu", dtype="bfloat16")), adapter
    )
    buffers = dict(model.named_buffers())
    assert buffers
    assert {b.dtype for name, b in buffers.items() if "inv_freq" in name} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("length", [50, 1500])
def test_gradients_in_half_precision_point_the_same_way(tmp_path: Path, length: int) -> None:
    base = tiny_models.save_base(tmp_path / "long", max_position_embeddings=2048)
    adapter = tiny_models.save_adapter(base, tmp_path / "adapter")
    rng = np.random.default_rng(0)
    supervised = np.arange(length) >= length - 20
    example = Encoded(rng.integers(4, 290, size=length).astype(np.int32), supervised)
    rows = {}
    for dtype in ("float32", "bfloat16"):
        model = load_adapter(
            load_base(ModelConfig(name=str(base), device="cpu", dtype=dtype)), adapter
        )
        parts = {}
        with PerExampleGradients(model) as gradients:
            batch = Batch.of([example], torch.device("cpu"))
            gradients(batch, lambda name, g, parts=parts: parts.update({name: g.float().flatten()}))
        rows[dtype] = torch.cat([parts[name] for name in sorted(parts)])
    assert torch.cosine_similarity(rows["float32"], rows["bfloat16"], dim=0) > 0.98


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("nonsense",), "names 'nonsense', which the model lacks"),
        (("embed_tokens",), "cannot measure LoRA on model.embed_tokens"),
        (("lm_head", "q_proj"), "cannot measure LoRA on the output head lm_head"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_cannot_be_adapted_are_refused_before_training(
    base: Path, modules: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        attach_lora(load_base(on(base)), LoraConfig(rank=2, target_modules=modules), seed=0)


def test_broken_weights_are_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    for folder, weights in ((base, "model"), (adapter, "adapter_model")):
        copy = tmp_path / weights
        shutil.copytree(folder, copy)
        path = copy / f"{weights}.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ModelError, match=r"cannot (load|read)"):
            load_adapter(load_base(on(copy if folder == base else base)), copy)


def test_no_adapter_at_all(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter in .*: expected a PEFT folder"):
        load_adapter(load_base(on(base)), tmp_path)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt2", {"c_attn", "c_proj"}),
    ],
)
def test_attention_means_its_projections_alone(family: str, layers: set[str]) -> None:
    pairs = lora_pairs(attach_lora(tiny_models.build(family), LoraConfig(rank=2), seed=0))
    assert {name.rpartition(".")[2] for name in pairs} == layers
    assert all("attn" in name for name in pairs)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_fresh_adapter_is_the_same_for_the_same_seed() -> None:
    states = [
        peft.get_peft_model_state_dict(
            attach_lora(tiny_models.build("llama"), LoraConfig(rank=2), seed)
        )
        for seed in (3, 3, 4)
    ]
    name = next(key for key in states[0] if "lora_A" in key)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_unknown_attention_and_layers(base: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load the model"):
        load_base(ModelConfig(name=str(base), device="cpu", attention="nonsense"))


def test_a_model_that_is_not_causal_is_refused() -> None:
    config = tf.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, is_decoder=False, initializer_range=0.2,
    )  # fmt: skip
    model = tf.BertLMHeadModel(config).eval()
    with pytest.raises(ModelError, match=r"'bert' \(BertLMHeadModel\) is not causal: what follows"):
        check_causal(model, "bert")


def test_gradient_checkpointing_is_refused() -> None:
    model = tiny_models.adapted("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing is on"):
        PerExampleGradients(model)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_one_base_model_serves_one_adapter_after_the_other(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[ModelConfig] = []
    monkeypatch.setattr(
        "gradsift.models.cache.load_base", lambda config: loads.append(config) or load_base(config)
    )
    other = tiny_models.save_adapter(
        base, tmp_path / "other", r=2, target_modules=["o_proj", "down_proj"]
    )
    switch, ids = ModelCache(on(base)), torch.arange(40)[None]
    for path in (adapter, other, other, adapter):
        expected = load_adapter(load_base(on(base)), path)
        found = switch.with_adapter(path)
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
        assert [*lora_pairs(found)] == [*lora_pairs(expected)]
    assert len(loads) == 1


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_lora_on_experts_is_refused() -> None:
    for dropout, message in ((0.0, "experts' parameters model.layers.0"), (0.1, "cannot adapt")):
        config = LoraConfig(rank=2, dropout=dropout, target_modules="all-linear")
        with pytest.raises(ModelError, match=message):
            attach_lora(tiny_models.build("qwen3_moe"), config, seed=0)


def test_a_layer_that_is_used_twice_is_refused() -> None:
    model = tiny_models.adapted("llama")
    layers = model.get_base_model().model.layers
    layers[1] = layers[0]
    batch = Batch.of(tiny_models.examples(2), torch.device("cpu"))
    with PerExampleGradients(model) as gradients, pytest.raises(ModelError, match="more than once"):
        gradients(batch, lambda name, gradient: None)


def test_the_precision_is_one_that_the_device_is_quick_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype(ModelConfig(name="m", device="cpu")) == torch.float32
    monkeypatch.setattr(loading, "resolve_device", lambda config: torch.device("cuda:0"))
    for capability, dtype in (((9, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve_dtype(ModelConfig(name="m")) == dtype
        assert resolve_dtype(ModelConfig(name="m", dtype="float32")) == torch.float32
