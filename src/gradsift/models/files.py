"""A model's files before it is loaded: tokenizer, configuration, and what must not be run or read.

Code that comes with a model is not run, nor asked about, unless `model.trust_remote_code` says so;
pickled weights are not read.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from gradsift.config import ModelConfig
from gradsift.errors import GradsiftError, ModelError, shorten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ModelError: If there is none.
    """
    with translate_load_errors(f"the tokenizer of {config.name!r}"):
        return AutoTokenizer.from_pretrained(
            config.name, trust_remote_code=config.trust_remote_code
        )


@contextmanager
def translate_load_errors(what: str) -> Iterator[None]:
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
    named = str(getattr(config_of(config), "_attn_implementation", None) or "")
    for attention in (config.attention, named):
        if "/" in attention:
            raise ModelError(
                f"the attention {attention!r} of {config.name!r} is code from the Hub, which is "
                "not run; if you trust it, say --set model.trust_remote_code=true"
            )


class Sizes(NamedTuple):
    """How many positions and tokens a model knows; none where its configuration does not say."""

    positions: int | None
    embeddings: int | None


def known_sizes(config: ModelConfig) -> Sizes:
    """Return how many positions and tokens the model knows.

    Raises:
        ModelError: If there is no configuration, or they are not whole numbers above 1.
    """
    text = config_of(config).get_text_config()
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


def config_of(config: ModelConfig) -> PreTrainedConfig:
    """Return what the model's `config.json` says.

    Raises:
        ModelError: If there is none, or it cannot be read.
    """
    folder = Path(config.name)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(f"cannot load the model {config.name!r}: the folder has no config.json")
    with translate_load_errors(f"the model {config.name!r}"):
        return AutoConfig.from_pretrained(config.name, trust_remote_code=config.trust_remote_code)
