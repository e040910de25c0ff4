"""Base models, tokenizers and LoRA adapters, loaded through transformers and PEFT and checked.

What gradsift cannot measure exactly (DoRA, LoRA on embeddings or experts, trained biases and
modules) is refused here, with the name of the layer. Code that comes with a model is not run, nor
asked about, unless `model.trust_remote_code` says so; pickled weights are not read.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import peft
import torch
from accelerate.utils.memory import clear_device_cache
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from gradsift.config import LoraConfig, ModelConfig
from gradsift.errors import GradsiftError, ModelError, shorten
from gradsift.store import room_for, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ADAPTER = "default"
_PROBE_TOKENS = 8


_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # those that leave the base as it is


class LoraPair(NamedTuple):
    """The two matrices of one adapted layer."""

    a: nn.Linear
    b: nn.Linear


def resolve_device(config: ModelConfig) -> torch.device:
    """Return the device asked for; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ModelError: If there is no such device here.
    """
    if config.device == "auto":
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # of the processes that train together
        return torch.device(own if torch.cuda.is_available() else "cpu")
    if config.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ModelError(f"cannot use the device {config.device!r}: expected auto, cpu or cuda")
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"cannot use the device {config.device!r}: {reason}") from None


def resolve_dtype(config: ModelConfig) -> torch.dtype:
    """Return the precision asked for; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if config.dtype == "auto":
        return torch.bfloat16 if resolve_device(config).type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ModelError: If there is none.
    """
    with foreign_faults_told(f"the tokenizer of {config.name!r}"):
        return AutoTokenizer.from_pretrained(
            config.name, trust_remote_code=config.trust_remote_code
        )


@contextmanager
def foreign_faults_told(what: str) -> Iterator[None]:
    """Turn whatever the files of somebody else make a library raise into an error that names them.

    Raises:
        ModelError: In place of any other error.
    """
    try:
        yield
    except GradsiftError:
        raise
    except Exception as error:  # files can be wrong in any way
        reason = f"{type(error).__name__}: {error}"
        if "trust_remote_code" in reason:
            reason = (
                "it comes with code of its own, which is not run; if you have read that code and "
                "trust it, say --set model.trust_remote_code=true"
            )
        raise ModelError(f"cannot load {what}: {shorten(reason, 2000)}") from error


def load_base(config: ModelConfig) -> PreTrainedModel:
    """Load the base model, frozen and in evaluation mode, on its device and in its precision.

    Raises:
        ModelError: If it cannot be loaded, lacks weights, has no output head, or lets a token see
            later ones.
    """
    clear_device_cache(garbage_collection=True)  # what a training left goes before more comes
    check_model_files(config)
    with foreign_faults_told(f"the model {config.name!r}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.name,
            dtype=resolve_dtype(config),
            attn_implementation=None if config.attention == "auto" else config.attention,
            device_map={"": str(resolve_device(config))},
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **_quantized(config),
        )
        model, report = loaded
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(
            f"the model {config.name!r} lacks {len(names)} of its weights, which would be random "
            f"numbers: {shorten(', '.join(names))}; is it an adapter, or of another architecture "
            "than its config.json says?"
        )
    for module in model.modules():
        # on some CPUs bitsandbytes would repack weights into a form that has no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model = model.requires_grad_(False).eval()
    with foreign_faults_told(f"the model {config.name!r}"):
        check_servable(model, config.name)
    return model


def refuse_pickled_weights(folder: Path, what: str) -> None:
    """Make sure that a folder's weights are no pickle, which could run code.

    Raises:
        ModelError: If it has no others.
    """
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled and not [*folder.glob("*.safetensors")]:
        raise ModelError(
            f"the weights of {what} are pickled ({folder / pickled[0]}), which can run code; they "
            "are not read. Convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(FOLDER)"
        )


def check_model_files(config: ModelConfig) -> None:
    """Make sure that loading the model reads no pickle and fetches no code.

    Raises:
        ModelError: If its folder has pickled weights alone, or its attention is to come from the
            Hub without `trust_remote_code`.
    """
    folder = Path(config.name)
    refuse_pickled_weights(folder, repr(config.name))
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{config.name!r} holds an adapter; name its base model with --model, and this folder "
            "with --adapter"
        )
    if config.trust_remote_code:
        return
    named = str(getattr(_config_of(config), "_attn_implementation", None) or "")
    for attention in (config.attention, named):
        if "/" in attention:
            raise ModelError(
                f"the attention {attention!r} of {config.name!r} is code from the Hub, which is "
                "not run; if you trust it, say --set model.trust_remote_code=true"
            )


def check_servable(model: PreTrainedModel, name: str) -> None:
    """Make sure that right padding without a mask changes nothing for the tokens before it.

    Raises:
        ModelError: If there is no output head, or what follows a token changes its logits.
    """
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name!r} ({type(model).__name__}) has no output embeddings")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        ids = torch.randint(embedding.num_embeddings, (1, 2 * _PROBE_TOKENS)).repeat(2, 1)
        ids[1, _PROBE_TOKENS:] = 0
        alone = ids[:1, :_PROBE_TOKENS]
        one, other, third = (
            logits[:_PROBE_TOKENS].float()
            for tokens in (ids, alone)
            for logits in model(input_ids=tokens.to(model.device), use_cache=False).logits
        )
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    tolerance = (1e-4 if exact else 0.05) * one.abs().max()
    if max((one - other).abs().max(), (one - third).abs().max()) > tolerance:
        raise ModelError(
            f"{name!r} ({type(model).__name__}) is not causal: what follows a token changes its "
            "logits, so that padding would change gradients; use a decoder-only language model"
        )


def _quantized(config: ModelConfig) -> dict[str, BitsAndBytesConfig]:
    """Return the argument that has transformers quantize the model, if it is to be."""
    # it would tell of casts for every layer of every pass
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if config.quantization == "none":
        return {}
    if getattr(_config_of(config), "quantization_config", None) is not None:
        raise ModelError(f"{config.name!r} is already quantized; leave model.quantization out")
    if config.quantization == "8bit":
        # no columns set apart: they are chosen per batch, and gradients would depend on its mates
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=resolve_dtype(config),
        )
    return {"quantization_config": settings}


class Sizes(NamedTuple):
    """How many positions and tokens a model knows; none where its configuration does not say."""

    positions: int | None
    embeddings: int | None


def known_sizes(config: ModelConfig) -> Sizes:
    """Return how many positions and tokens the model knows.

    Raises:
        ModelError: If there is no configuration, or they are not whole numbers above 1.
    """
    text = _config_of(config).get_text_config()
    found = []
    for name in ("max_position_embeddings", "vocab_size"):
        value = getattr(text, name, None)
        if value is not None and (not isinstance(value, int) or value < 2):
            raise ModelError(
                f"cannot load the model {config.name!r}: {name} of its config.json is {value!r}, "
                "expected a whole number above 1"
            )
        found.append(value)
    return Sizes(*found)


def _config_of(config: ModelConfig) -> PreTrainedConfig:
    folder = Path(config.name)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(f"cannot load the model {config.name!r}: the folder has no config.json")
    with foreign_faults_told(f"the model {config.name!r}"):
        return AutoConfig.from_pretrained(config.name, trust_remote_code=config.trust_remote_code)


def attach_lora(base: PreTrainedModel, config: LoraConfig, seed: int) -> peft.PeftModel:
    """Return the base model with a fresh, trainable adapter; same seed, same weights.

    Raises:
        ModelError: If there are no such layers, or one cannot be measured exactly.
    """
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=_target_modules(base, config.target_modules),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(base, adapter)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"cannot adapt lora.target_modules={config.target_modules!r} of "
                f"{type(base).__name__}: {error}"
            ) from error
    assert isinstance(model, peft.PeftModel)
    lora_pairs(model)
    return model


def load_adapter(base: PreTrainedModel, path: Path) -> peft.PeftModel:
    """Return the base model with a stored LoRA adapter, frozen, in the base model's precision.

    Raises:
        ModelError: If the folder holds no LoRA adapter, one that cannot be measured exactly, or one
            whose layers are not those of this model.
    """
    config, name = _read_adapter_config(path), str(base.name_or_path)
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, name
    with foreign_faults_told(f"the adapter {path}: it does not fit {name!r}"):
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    assert isinstance(model, peft.PeftModel)
    _check_fit(path, peft.get_peft_model_state_dict(model), name)
    if isinstance(trained_on, str) and Path(trained_on).name != Path(name).name:
        logger.warning(
            "the adapter %s says it was trained on %r and is used on %r; their shapes agree",
            path,
            trained_on,
            name,
        )
    with foreign_faults_told(f"the adapter {path}"):
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(path), device="cpu"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # the adapter alone: rotary frequencies, for one, must stay float32
            parameter.data = parameter.data.to(base.dtype)
    lora_pairs(model)
    return model.requires_grad_(False).eval()


class Models:
    """The base model, loaded once when first asked for, alone or with one stored adapter.

    What was returned before is not to be used any more.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._model: PreTrainedModel | peft.PeftModel | None = None
        self._path: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Models, (self._config,)  # on another machine it is loaded there

    def base(self) -> PreTrainedModel:
        """Return the model without an adapter.

        Raises:
            ModelError: As `load_base`.
        """
        if self._model is None:
            self._model = load_base(self._config)
        elif isinstance(self._model, peft.PeftModel):
            self._model = self._model.unload()  # type: ignore[assignment]
        self._path = None
        return self._model  # type: ignore[return-value]

    def at(self, path: Path) -> peft.PeftModel:
        """Return the model with this adapter.

        Raises:
            ModelError: As `load_base` and `load_adapter`.
        """
        if path != self._path:
            self._model, self._path = load_adapter(self.base(), path), path
        return self._model  # type: ignore[return-value]

    @contextmanager
    def fresh(self, config: LoraConfig, seed: int) -> Iterator[peft.PeftModel]:
        """Yield the model with a fresh, trainable adapter, and take it off again.

        Raises:
            ModelError: As `load_base` and `attach_lora`.
        """
        model = attach_lora(self.base(), config, seed)
        try:
            yield model
        finally:
            model.unload().eval()  # type: ignore[operator]


def lora_pairs(model: nn.Module) -> dict[str, LoraPair]:
    """Return the A and B matrices of every adapted layer, by the layer's name in the base model.

    Raises:
        ModelError: Naming the first layer whose gradient cannot be measured exactly.
    """
    pairs, head = {}, model.get_output_embeddings()  # type: ignore[operator]
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        short = name.removeprefix("base_model.model.")
        if layer is head:
            raise ModelError(f"cannot measure LoRA on the output head {short}; leave it out")
        if isinstance(layer, ParamWrapper):
            raise ModelError(
                f"cannot measure LoRA on the experts' parameters {short}; name attention layers"
            )
        a, b = (_matrix(matrices) for matrices in (layer.lora_A, layer.lora_B))
        if a is None or b is None:
            base = type(layer.get_base_layer()).__name__
            raise ModelError(f"cannot measure LoRA on {short} ({base}); adapt linear layers only")
        if _ADAPTER in layer.lora_variant:
            variant = type(layer.lora_variant[_ADAPTER]).__name__.removesuffix("Variant")
            raise ModelError(f"cannot measure {short}: its adapter is {variant}, not plain LoRA")
        if a.bias is not None or b.bias is not None:
            raise ModelError(f"cannot measure {short}: its LoRA matrices have biases (lora_bias)")
        pairs[short] = LoraPair(a, b)
    if not pairs:
        raise ModelError("the model has no LoRA layer")
    return pairs


def _matrix(matrices: Mapping[str, nn.Module] | nn.ModuleDict) -> nn.Linear | None:
    matrix = dict(matrices.items()).get(_ADAPTER)
    return matrix if isinstance(matrix, nn.Linear) else None


def _read_adapter_config(path: Path) -> peft.LoraConfig:
    if not (path / "adapter_config.json").is_file():
        raise ModelError(f"no adapter in {path}: expected a PEFT folder with adapter_config.json")
    with foreign_faults_told(f"the adapter {path}"):
        config = peft.PeftConfig.from_pretrained(str(path))
    if not isinstance(config, peft.LoraConfig) or config.peft_type != peft.PeftType.LORA:
        raise ModelError(f"{path} is a {config.peft_type} adapter; gradsift measures LoRA only")
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise ModelError(
            f"the adapter {path} begins with init_lora_weights={config.init_lora_weights!r}, which "
            "changes the weights of the base model; convert it into a plain one where it was "
            "trained: save_pretrained(…, path_initial_model_for_weight_conversion=…) of PEFT (for "
            "LoftQ and EVA set init_lora_weights to true in its adapter_config.json and give the "
            "base model that it was trained on)"
        )
    extras = {
        "DoRA (use_dora)": config.use_dora,
        "fully trained modules (modules_to_save)": config.modules_to_save,
        "trained biases (bias)": config.bias != "none",
        "trained tokens (trainable_token_indices)": config.trainable_token_indices,
        "experts' parameters (target_parameters)": getattr(config, "target_parameters", None),
        "repeated layers (layer_replication)": config.layer_replication,
    }
    found = [name for name, value in extras.items() if value]
    if found:
        raise ModelError(
            f"the adapter {path} holds more than plain LoRA matrices: {', '.join(found)}; "
            "use a plain LoRA adapter, or leave --adapter out and let gradsift train one"
        )
    return config


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Keep an adapter in PEFT's format, the same bytes for the same adapter.

    Raises:
        RunError: If the disk is full.
    """
    with room_for(folder):
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # says nothing about this adapter
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, value in config.items():  # PEFT keeps names of modules as sets
            if isinstance(value, list) and all(isinstance(name, str) for name in value):
                config[key] = sorted(value)
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True).encode())


def _check_fit(path: Path, expected: Mapping[str, torch.Tensor], model_name: str) -> None:
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{path} has no adapter_model.safetensors (pickled weights are not read)")
    try:
        with safe_open(weights, "pt") as file:
            found = {k: list(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"cannot read {weights}: {error}") from error
    wanted = {key: list(value.shape) for key, value in expected.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise ModelError(
                f"the adapter {path} belongs to another base model: {key} is "
                f"{found.get(key, 'missing')} there and {wanted.get(key, 'missing')} in "
                f"{model_name!r}"
            )


def _target_modules(base: nn.Module, wanted: str | tuple[str, ...]) -> str | list[str]:
    """Return what PEFT is to adapt; `attention` is every projection inside an attention module."""
    if wanted == "all-linear":
        return "all-linear"
    if wanted != "attention":
        for module in wanted:
            if not any(f".{name}".endswith(f".{module}") for name, _ in base.named_modules()):
                raise ModelError(f"lora.target_modules names {module!r}, which the model lacks")
        return list(wanted)
    linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    attention = {name for name in linear if re.search(r"attn|attention", name)}
    if not attention:
        raise ModelError("found no attention projections; name them with lora.target_modules")
    leaves = {name.rpartition(".")[2] for name in attention}
    elsewhere = {name.rpartition(".")[2] for name in linear if name not in attention}
    return sorted(leaves if not leaves & elsewhere else attention)
