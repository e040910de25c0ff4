"""Every setting of a run: small frozen models, one per section, unknown keys refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    field_validator,
    model_validator,
)

from gradsift.errors import suggest
from gradsift.method_config import (
    EmbedConfig,
    FuseConfig,
    GistConfig,
    InfluenceConfig,
    LessConfig,
    RandomConfig,
    TargetPathConfig,
)
from gradsift.policy_config import PolicyConfig, check_file_name
from gradsift.sections import (
    MAX_COUNT,
    Count,
    Section,
    Seed,
    Share,
    Sources,
    as_texts,
    merge,
    setting,
)
from gradsift.types import MethodName

LayerNames = Annotated[tuple[str, ...], Field(min_length=1)]
TrackerName = Literal["tensorboard", "wandb"]
TrackerNames = Annotated[tuple[TrackerName, ...], BeforeValidator(as_texts)]
LEAST_WINDOW = 1024  # examples, where none are set
_FIELDS = ("messages", "prompt", "completion", "system", "tools", "id", "source", "task")


def target_name(path: str) -> str:
    """Return the name of a target that is given by its file alone.

    >>> target_name("data/gsm8k.dev.jsonl")
    'gsm8k'
    """
    return Path(path).name.split(".")[0]


class ModelConfig(Section):
    """The base model, its precision and its place."""

    name: str = setting(..., "base model: a local folder or a Hub id")
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = setting(
        "auto",
        "auto: bfloat16 on CUDA (float16 if old), else float32; tf32: float32, multiplied in TF32",
    )
    device: str = setting(
        "auto", "where the model lies: cpu, cuda, cuda:1, …; auto: CUDA where there is one"
    )
    attention: str = setting("auto", "attention kernel; auto: what transformers takes")
    quantization: Literal["none", "4bit", "8bit"] = setting(
        "none", "how the base model is quantized, by bitsandbytes"
    )
    trust_remote_code: bool = setting(
        False, "run the code that comes with a model, tokenizer or encoder"
    )


class DataConfig(Section):
    """Pool and targets, and how their rows become token sequences."""

    pool: Sources = setting(..., "files, globs, folders or Hub ids of the candidates")
    targets: dict[str, Sources] = setting({}, "files by target name: examples of the task")
    max_length: int = setting(
        2048, "tokens of an example; the rest is cut off", "2048", ge=2, le=MAX_COUNT
    )
    columns: dict[str, str] = setting({}, "field to column, where no schema fits")
    template: str | None = setting(
        None, "chat template in place of the tokenizer's: 'tulu' or a Jinja file"
    )

    @field_validator("columns")
    @classmethod
    def _fields_are_known(cls, columns: dict[str, str]) -> dict[str, str]:
        for field in columns:
            if field not in _FIELDS:
                hint = suggest(field, _FIELDS)
                raise ValueError(
                    f"{field!r} is no field; expected one of {', '.join(_FIELDS)}{hint}"
                )
        return columns

    @field_validator("targets", mode="before")
    @classmethod
    def _named_by_its_file(cls, targets: Any) -> Any:
        alone = isinstance(targets, str | Path) and str(targets)
        return {target_name(str(targets)): targets} if alone else targets

    @field_validator("targets")
    @classmethod
    def _names_are_file_names(cls, targets: dict[str, Sources]) -> dict[str, Sources]:
        for name in targets:
            check_file_name(name, "target")
        return targets


class LoraConfig(Section):
    """The adapter whose gradients are measured."""

    rank: Count = setting(128, "rank of the adapter whose gradients are measured", "128")
    alpha: float = setting(
        512, "scale of the adapter, divided by its rank; it stays when you lower the rank", "512",
        gt=0,
    )  # fmt: skip
    dropout: float = setting(
        0.1, "dropout of the adapter in trainings; none while measuring", "0.1", ge=0, lt=1
    )
    target_modules: Literal["attention", "all-linear"] | LayerNames = setting(
        "attention", "layers with an adapter: attention, all-linear, or names", "attention"
    )


class WarmupConfig(Section):
    """Short LoRA training on a random part of the pool, before gradients mean anything."""

    mode: Literal["train", "none"] = setting(
        "train", "train an adapter first, or measure at a fresh one (--warmup none)", "train"
    )
    adapter: str | None = setting(None, "an existing PEFT LoRA adapter, measured as it is")
    fraction: Share = setting(0.05, "random part of the pool that is trained on", "0.05")
    epochs: Count = setting(1, "how often it is trained on", "1")
    checkpoints: Count = setting(
        1, "how many of the last epochs are measured, weighted by learning rate", "1"
    )
    learning_rate: float = setting(
        2e-5, "peak of AdamW's rate; a small pool has few steps and needs more", "2e-5", gt=0
    )
    batch_size: Count = setting(128, "examples per optimizer step", "128")
    micro_batch_tokens: Literal["auto"] | Count = setting(
        "auto", "padded tokens per forward pass; auto: 1,024 on a CPU, what fits on a GPU"
    )
    gradient_checkpointing: Literal["auto"] | bool = setting(
        "auto", "compute activations twice to keep fewer; auto: if one example does not fit"
    )
    warmup_ratio: float = setting(
        0.03, "share of the steps in which the rate rises", "0.03", ge=0, lt=1
    )
    weight_decay: float = setting(0.0, "weight decay of AdamW", ge=0)
    keep_optimizer: bool = setting(False, "store Adam's moments beside the adapter")
    seed: Seed = setting(0, "draws examples, their order, first weights, dropout (--seed)")

    @model_validator(mode="after")
    def _consistent(self) -> WarmupConfig:
        if self.adapter is not None and self.mode == "none":
            raise ValueError("give an adapter or mode 'none', not both")
        if self.checkpoints > self.epochs:
            raise ValueError(
                f"{self.checkpoints} checkpoints need as many epochs, found {self.epochs}"
            )
        return self


class EngineConfig(Section):
    """How the work is cut and where it runs; no setting here changes a score beyond rounding.

    Only `window` and `batch_tokens` change even the rounding: batches are formed within windows;
    and `shard_size`, on a GPU where `window` is not set.
    """

    executor: Literal["local", "ray"] = setting("local", "where work runs (--engine)")
    ray_address: str | None = setting(
        None, "address of a Ray cluster, or 'auto'; none: one is started here"
    )
    workers: Literal["auto"] | Count = setting(
        "auto", "workers of the pool pass on Ray; auto: one per GPU, else one per machine"
    )
    train_workers: Count = setting(1, "processes that share each training on Ray")
    batch_tokens: Literal["auto"] | Count = setting(
        "auto", "padded tokens per forward pass; auto: 2,048 on a CPU, what fits on a GPU"
    )
    memory: Literal["auto"] | Annotated[ByteSize, Field(gt=0)] = setting(
        "auto",
        "bytes for gradients and bases; auto: half of what is free; "
        "a GPU's basis: what a small batch leaves",
    )
    deterministic: bool = setting(
        False, "on a GPU only kernels that give the same bits again; on a CPU all do"
    )
    window: Literal["auto"] | Count = setting(
        "auto", "consecutive examples among which batches are formed; auto: 1,024, more on a GPU"
    )
    shard_size: Literal["auto"] | Count = setting(
        "auto", "examples per stored shard: whole windows; auto: 1,024 to 4,096, by the pool"
    )

    report_to: TrackerNames = setting(
        (), "where trainings are logged besides: tensorboard, wandb (the Trainer's `report_to`)"
    )

    @model_validator(mode="after")
    def _whole_windows(self) -> EngineConfig:
        if self.shard_size != "auto" and self.shard_size % self.least_window:
            raise ValueError(
                f"expected engine.shard_size to be a multiple of engine.window, found "
                f"{self.shard_size} and {self.least_window}; raise shard_size or lower window"
            )
        return self

    @property
    def least_window(self) -> int:
        """The examples of a window: as set, or the fewest."""
        return LEAST_WINDOW if self.window == "auto" else self.window


class IndexConfig(Section):
    """A short vector for each pool example, from which any target is scored without a pass."""

    path: str | None = setting(
        None, "folder that `gradsift index` made: no pass over the pool, scores are approximate"
    )
    dimension: Count = setting(8192, "numbers, a byte each, that stand for a gradient")
    samples: int = setting(
        512, "pool examples whose gradients give the directions", ge=2, le=MAX_COUNT
    )
    seed: Seed = setting(0, "draws these examples and the signs (--seed)")


class Config(Section):
    """A whole run, as it stands in `config.yaml`.

    >>> config = Config.build({"model": {"name": "m"},
    ...                        "data": {"pool": "pool.jsonl", "targets": {"t": "t.jsonl"}}})
    >>> config.policy.budget, config.data.pool
    ('5%', ('pool.jsonl',))
    """

    method: MethodName = setting("gist", "how the pool is scored (--method)", "gist")
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    warmup: WarmupConfig = WarmupConfig()
    gist: GistConfig = GistConfig()
    less: LessConfig = LessConfig()
    influence: InfluenceConfig = InfluenceConfig()
    embed: EmbedConfig = EmbedConfig()
    target_path: TargetPathConfig = TargetPathConfig()
    random: RandomConfig = RandomConfig()
    fuse: FuseConfig = FuseConfig()
    policy: PolicyConfig = PolicyConfig()
    engine: EngineConfig = EngineConfig()
    index: IndexConfig = IndexConfig()

    @model_validator(mode="before")
    @classmethod
    def _adapter_in_place_of_a_model(cls, values: Any) -> Any:
        """Take a PEFT folder that is given as the model for an adapter of the model it names."""
        model = values.get("model") if isinstance(values, Mapping) else None
        name = model.get("name") if isinstance(model, Mapping) else None
        warmup = values.get("warmup", {}) if model else {}
        if not isinstance(name, str) or not isinstance(warmup, Mapping) or warmup.get("adapter"):
            return values
        try:
            adapter = json.loads((Path(name) / "adapter_config.json").read_text())
            base = adapter["base_model_name_or_path"]
        except (OSError, ValueError, LookupError, TypeError):
            return values  # a model, or an adapter that does not say of what
        return merge(values, {"model": {"name": base}, "warmup": {"adapter": name}})

    @property
    def measuring(self) -> tuple[str, ...]:
        """The methods that measure the pool: that of the run, or those that it fuses."""
        return self.fuse.methods if self.method == "fuse" else (self.method,)


def with_engine(config: Config, engine: Mapping[str, Any]) -> Config:
    """Return the settings of a run that goes on elsewhere: with other settings of the engine.

    Raises:
        ConfigError: If one is unknown or not allowed.
    """
    return Config.build(merge(config.model_dump(), {"engine": dict(engine)}))
