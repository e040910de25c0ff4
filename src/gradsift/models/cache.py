"""The base model, loaded once for all that a process does with it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft

from gradsift.config import LoraConfig, ModelConfig
from gradsift.determinism import use_deterministic_kernels
from gradsift.models.adapters import load_adapter
from gradsift.models.loading import load_base
from gradsift.models.lora import attach_lora

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


class ModelCache:
    """The base model, loaded once when first asked for, alone or with one stored adapter.

    What was returned before is not to be used any more.
    """

    def __init__(self, config: ModelConfig, deterministic: bool = False) -> None:
        """Remember which model, and whether only deterministic GPU kernels are to be used on it."""
        self._config, self._deterministic = config, deterministic
        self._model: PreTrainedModel | peft.PeftModel | None = None
        self._path: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # on another machine it is loaded there
        return ModelCache, (self._config, self._deterministic)

    def base(self) -> PreTrainedModel:
        """Return the model without an adapter.

        Raises:
            ModelError: As `load_base`.
            ConfigError: As `use_deterministic_kernels`.
        """
        if self._model is None:
            if self._deterministic:
                use_deterministic_kernels()  # before the device computes anything
            self._model = load_base(self._config)
        elif isinstance(self._model, peft.PeftModel):
            self._model = self._model.unload()  # type: ignore[assignment]
        self._path = None
        return self._model  # type: ignore[return-value]

    def with_adapter(self, path: Path) -> peft.PeftModel:
        """Return the model with this adapter.

        Raises:
            ModelError: As `load_base` and `load_adapter`.
        """
        if path != self._path:
            self._model, self._path = load_adapter(self.base(), path), path
        return self._model  # type: ignore[return-value]

    def release(self) -> None:
        """Let go of the model, so that another has room; it is loaded anew when asked for."""
        self._model = self._path = None

    @contextmanager
    def with_fresh_adapter(self, config: LoraConfig, seed: int) -> Iterator[peft.PeftModel]:
        """Yield the model with a fresh, trainable adapter, and take it off again.

        Raises:
            ModelError: As `load_base` and `attach_lora`.
        """
        model = attach_lora(self.base(), config, seed)
        try:
            yield model
        finally:
            model.unload().eval()  # type: ignore[operator]
