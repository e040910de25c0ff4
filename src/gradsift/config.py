"""Every setting of a run: small frozen models, one per section, unknown keys refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    ByteSize,
    Field,
    field_validator,
    model_validator,
)

from gradsift.errors import shorten, suggest
from gradsift.sections import (
    MAX_COUNT,
    Count,
    Section,
    Seed,
    Share,
    Sources,
    merge,
    parse_share,
)
from gradsift.types import Budget, MethodName

LayerNames = Annotated[tuple[str, ...], Field(min_length=1)]
_LONGEST_NAME = 100  # of a target: file names are made of it
_FIELDS = ("messages", "prompt", "completion", "system", "tools", "id", "source", "task")


class ModelConfig(Section):
    """The base model, its precision and its place."""

    name: str = Field(description="a local folder or a Hugging Face Hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    attention: str = "auto"
    quantization: Literal["none", "4bit", "8bit"] = Field(
        default="none", description="of the base model, by bitsandbytes"
    )
    trust_remote_code: bool = Field(
        default=False, description="run the code that comes with a model, tokenizer or encoder"
    )


class DataConfig(Section):
    """Pool and targets, and how their rows become token sequences."""

    pool: Sources
    targets: dict[str, Sources] = Field(min_length=1)
    max_length: int = Field(default=2048, ge=2, le=MAX_COUNT)
    columns: dict[str, str] = Field(default={}, description="field to column, where no schema fits")
    template: str | None = Field(
        default=None, description="'tulu' or the path of a Jinja chat template"
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

    @field_validator("targets")
    @classmethod
    def _names_are_file_names(cls, targets: dict[str, Sources]) -> dict[str, Sources]:
        for name in targets:
            if not re.fullmatch(r"\w[\w-]*", name) or len(name.encode()) > _LONGEST_NAME:
                raise ValueError(
                    f"a target's name becomes a file name: expected letters, digits, '_' and '-', "
                    f"{_LONGEST_NAME} bytes at most, found {shorten(repr(name))}"
                )
        return targets


class LoraConfig(Section):
    """The adapter whose gradients are measured."""

    rank: Count = 128
    alpha: float = Field(default=512, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    target_modules: Literal["attention", "all-linear"] | LayerNames = "attention"


class WarmupConfig(Section):
    """Short LoRA training on a random part of the pool, before gradients mean anything."""

    mode: Literal["train", "none"] = "train"
    adapter: str | None = Field(
        default=None, description="an existing PEFT LoRA adapter, used as it is"
    )
    fraction: Share = 0.05
    epochs: Count = 1
    checkpoints: Count = Field(default=1, description="how many of the last epochs are measured")
    learning_rate: float = Field(default=2e-5, gt=0)
    batch_size: Count = Field(default=128, description="examples per optimizer step")
    micro_batch_size: Count = Field(default=8, description="examples per forward pass")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    keep_optimizer: bool = False
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> WarmupConfig:
        if self.adapter is not None and self.mode == "none":
            raise ValueError("give an adapter or mode 'none', not both")
        if self.checkpoints > self.epochs:
            raise ValueError(
                f"{self.checkpoints} checkpoints need as many epochs, found {self.epochs}"
            )
        if self.batch_size % self.micro_batch_size and self.batch_size > self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        return self


class GistConfig(Section):
    """The subspace and the score (Min et al., 2026, arXiv 2602.18584)."""

    rank: int | str = Field(
        default="auto", description="'auto', 'full', a share such as '95%', or a count"
    )
    directions: Literal["leading", "tail"] = Field(
        default="leading", description="'tail': those that the rank leaves out, instead"
    )
    aggregation: Literal["max", "task-mean", "mean-cosine"] = "max"
    norm_power: float = Field(default=0.0, ge=0)

    @field_validator("rank")
    @classmethod
    def _known_rank(cls, rank: int | str) -> int | str:
        if isinstance(rank, str) and rank.isdecimal():
            rank = int(rank)
        if isinstance(rank, int):
            if rank < 1:
                raise ValueError(f"expected at least 1, found {rank}")
        elif rank not in ("auto", "full"):
            parse_share(rank)
        return rank


class LessConfig(Section):
    """LESS (Xia et al., 2024, arXiv 2402.04333): one checkpoint per epoch of a longer warm-up."""

    checkpoints: Count = 4
    dimension: int = Field(default=8192, ge=64, le=MAX_COUNT, multiple_of=64)
    seed: Seed = Field(default=0, description="of the projection")


class EmbedConfig(Section):
    """The sentence encoder of the method `embed`."""

    model: str = Field(
        default="sentence-transformers/gtr-t5-base",
        description="a sentence-transformers folder or Hub id",
    )


class RandomConfig(Section):
    """The order of the method `random`."""

    seed: Seed = 0


class PolicyConfig(Section):
    """From scores to picks."""

    budget: str = "5%"
    strategy: Literal["top", "round-robin"] = "top"
    per: Literal["example", "task"] = Field(
        default="example", description="whose turn round-robin takes"
    )
    source_cap: str | dict[str, str] | None = Field(
        default=None, description="largest share from one source: '20%' or {dolly: 10%}"
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="exact", description="what is removed"
    )
    decontaminate: Literal["none", "exact", "near"] = "near"
    similarity: Share = Field(
        default=0.8, description="Jaccard similarity from which texts are near"
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, budget: Any) -> str:
        return str(Budget.parse(str(budget)))

    @field_validator("source_cap")
    @classmethod
    def _source_cap(cls, cap: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for share in cap.values() if isinstance(cap, dict) else filter(None, [cap]):
            parse_share(share)
        return cap


class EngineConfig(Section):
    """How the work is cut and where it runs; no setting here changes a score beyond rounding.

    Only `window` and `batch_tokens` change even the rounding: batches are formed within windows.
    """

    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = Field(
        default=None, description="of a Ray cluster, or 'auto'; none: one is started here"
    )
    workers: Literal["auto"] | Count = Field(
        default="auto", description="of the pool pass on Ray: one per GPU, else one per machine"
    )
    train_workers: Count = Field(default=1, description="processes that share each training on Ray")
    batch_tokens: Literal["auto"] | Count = Field(
        default="auto", description="padded tokens per forward pass"
    )
    memory: Literal["auto"] | Annotated[ByteSize, Field(gt=0)] = Field(
        default="auto", description="bytes for target gradients and bases on the device"
    )
    window: Count = Field(
        default=1024, description="consecutive examples among which batches are formed"
    )
    shard_size: Count = Field(default=1024, description="examples per stored shard: whole windows")

    @model_validator(mode="after")
    def _whole_windows(self) -> EngineConfig:
        if self.shard_size % self.window:
            raise ValueError(
                f"expected engine.shard_size to be a multiple of engine.window, found "
                f"{self.shard_size} and {self.window}; raise shard_size or lower window"
            )
        return self


class Config(Section):
    """A whole run, as it stands in `config.yaml`.

    >>> config = Config.build({"model": {"name": "m"},
    ...                        "data": {"pool": "pool.jsonl", "targets": {"t": "t.jsonl"}}})
    >>> config.policy.budget, config.data.pool
    ('5%', ('pool.jsonl',))
    """

    method: MethodName = "gist"
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    warmup: WarmupConfig = WarmupConfig()
    gist: GistConfig = GistConfig()
    less: LessConfig = LessConfig()
    embed: EmbedConfig = EmbedConfig()
    random: RandomConfig = RandomConfig()
    policy: PolicyConfig = PolicyConfig()
    engine: EngineConfig = EngineConfig()


def with_engine(config: Config, engine: Mapping[str, Any]) -> Config:
    """Return the settings of a run that goes on elsewhere: with other settings of the engine.

    Raises:
        ConfigError: If one is unknown or not allowed.
    """
    return Config.build(merge(config.model_dump(), {"engine": dict(engine)}))
