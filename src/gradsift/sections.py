"""How settings are read, merged and checked, whatever they are about."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from gradsift.errors import ConfigError, shorten, suggest_share
from gradsift.wrong_settings import describe_errors


def as_texts(value: Any) -> Any:
    """Return one or several texts or paths as a list of texts, anything else as it is."""
    values = (value,) if isinstance(value, str | Path) else value
    if not isinstance(values, list | tuple):
        return values  # the model says what it expected
    return [str(v) if isinstance(v, Path) else v for v in values]


Source = Annotated[str, Field(min_length=1)]
Sources = Annotated[tuple[Source, ...], BeforeValidator(as_texts), Field(min_length=1)]
Share = Annotated[float, Field(gt=0, le=1)]
MAX_COUNT = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def parse_share(text: str) -> Decimal:
    """Return `"5%"` as `Decimal("0.05")`.

    Raises:
        ValueError: If the text is not a percentage above 0 and up to 100.
    """
    try:
        share = Decimal(text.removesuffix("%").strip()) / 100
    except ArithmeticError:
        share = Decimal(0)
    if not text.endswith("%") or not share.is_finite() or not 0 < share <= 1:
        found = f"{shorten(repr(text))}{suggest_share(text)}"
        raise ValueError(f"expected a share above 0% and up to 100% such as 5%, found {found}")
    return share


S = TypeVar("S", bound="Section")


def setting(default: Any, description: str, paper: str | None = None, **limits: Any) -> Any:
    """Return a field of a section: what it does, and the value of the method's own paper, if any.

    `limits` are those of pydantic's `Field`, such as `ge`. `...` as the default: it has none.
    """
    return Field(default, description=description, json_schema_extra={"paper": paper}, **limits)


@dataclass(frozen=True)
class Setting:
    """A key of the configuration: its default as YAML, what it does, the paper's value if any."""

    key: str
    default: str
    description: str
    paper: str | None


class Section(BaseModel):
    """Frozen settings under one name; unknown keys are refused with the nearest match."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def build(cls: type[S], values: Mapping[str, Any]) -> S:
        """Return the validated settings of a nested mapping.

        Raises:
            ConfigError: Naming each unknown key with its nearest match, and each wrong value.
        """
        try:
            built = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(describe_errors(error, cls, values))) from None
        if "\0" in built.model_dump_json().replace("\\u0000", "\0"):
            raise ConfigError("a setting has a NUL character in it, which no name or path can have")
        return built

    def to_yaml(self) -> str:
        """Return the settings as YAML that `read_yaml` and `build` take back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def describe(section: type[Section], prefix: str = "") -> list[Setting]:
    """Return every key of a section and of those in it, in their order."""
    found = []
    for name, field in section.model_fields.items():
        inner, key = field.annotation, f"{prefix}{name}"
        if isinstance(inner, type) and issubclass(inner, Section):
            found += describe(inner, f"{key}.")
            continue
        default = "(required)" if field.is_required() else _as_yaml(field.default)
        assert isinstance(field.json_schema_extra, dict), f"made by `setting`: {key}"
        paper = field.json_schema_extra["paper"]
        found.append(
            Setting(key, default, field.description or "", None if paper is None else str(paper))
        )
    return found


def _as_yaml(value: Any) -> str:
    """Return a default as it would stand in a file."""
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if isinstance(value, str | dict):
        return str(value)
    return json.dumps(value)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ConfigError: If the file is missing or holds no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ConfigError(f"cannot read the configuration {path}: nested too deep") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    if not isinstance(values, dict):
        found = shorten(repr(values))
        raise ConfigError(f"expected sections such as 'warmup:' in {path}, found {found}")
    return values


def merge(
    base: Mapping[str, Any], *overlays: Mapping[str, Any], replaced: Iterable[str] = ("targets",)
) -> dict[str, Any]:
    """Return `base` with the overlays laid over it, section by section, the last one winning.

    Mappings under a key in `replaced` are taken whole instead of being mixed.

    >>> merge({"lora": {"rank": 8, "alpha": 16}}, {"lora": {"rank": 4}})
    {'lora': {'rank': 4, 'alpha': 16}}

    Raises:
        ConfigError: If an overlay is no mapping.
    """
    result = dict(base)
    for overlay in overlays:
        if not isinstance(overlay, Mapping):
            found = shorten(repr(overlay))
            raise ConfigError(
                f"expected settings such as {{'lora': {{'rank': 16}}}}, found {found}"
            )
        for key, value in overlay.items():
            old = result.get(key)
            mixed = isinstance(old, dict) and isinstance(value, Mapping) and key not in replaced
            result[key] = merge(old or {}, value, replaced=replaced) if mixed else value
    return result


def parse_assignment(text: str) -> dict[str, Any]:
    """Return `"lora.rank=8"` as `{"lora": {"rank": 8}}`, the value read as YAML.

    Raises:
        ConfigError: If the text has no `=` or the key no section.
    """
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not section or bool(dot) != bool(name):
        raise ConfigError(f"expected SECTION.KEY=VALUE such as lora.rank=16, found {text!r}")
    try:
        result: Any = yaml.safe_load(value)
    except RecursionError:
        raise ConfigError(f"cannot read the value of {key!r}: nested too deep") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the value of {shorten(repr(text))}: {error}") from None
    for part in reversed([section, *filter(None, name.split("."))]):
        result = {part: result}
    return result
