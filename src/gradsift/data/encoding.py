"""Conversations to token ids and the mask of supervised tokens, by the model's own chat template.

The template is rendered once, the characters of the assistant turns are marked, and the text is
tokenized once; a token is supervised where it overlaps a marked span.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from gradsift.data.conversations import Message, UnusableRowError
from gradsift.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TULU = (
    "{{ start }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + end }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it; `supervised` marks the tokens whose loss counts."""

    input_ids: Int[np.ndarray, " token"]
    supervised: Bool[np.ndarray, " token"]
    truncated: bool = False


class Encoder:
    """The one way from a conversation to tokens, for pool, targets and training alike."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, template: str | None = None
    ) -> None:
        """Prepare the template: the tokenizer's own, Tulu's, or that of a file.

        Raises:
            ModelError: If the tokenizer cannot tell which characters a token covers.
            DataError: If the template file cannot be read.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"{tokenizer.name_or_path}: {type(tokenizer).__name__} gives no character offsets; "
                "gradsift needs a fast tokenizer (a tokenizer.json beside the model)"
            )
        self.template = _template(tokenizer, template)
        self.max_length = max_length
        self._marked = _GENERATION.search(self.template) is not None
        # without its post-processor, which adds no token here but trims white space off offsets
        self._tokenizer: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)  # type: ignore[assignment]
        self._tokenizer.post_processor = None  # type: ignore[assignment]
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._variables = {
            **tokenizer.special_tokens_map,
            "start": _first_token(tokenizer),
            "end": tokenizer.eos_token or "",
        }

    def encode(self, conversations: Sequence[list[Message]]) -> list[Encoded | UnusableRowError]:
        """Return one encoded example, or the reason why not, per conversation.

        Raises:
            DataError: If the template renders earlier turns differently once later ones follow.
        """
        rendered = [self._render(messages) for messages in conversations]
        texts = [item[0] for item in rendered if not isinstance(item, UnusableRowError)]
        tokens = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        return [
            item if isinstance(item, UnusableRowError) else self._mask(next(tokens), item[1])
            for item in rendered
        ]

    def _mask(self, tokens: Any, spans: list[tuple[int, int]]) -> Encoded | UnusableRowError:
        offsets = np.array(tokens.offsets, dtype=np.int64).reshape(-1, 2)
        supervised = np.zeros(len(offsets), dtype=bool)
        for start, end in spans:
            supervised |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        supervised[:1] = False  # nothing stands before the first token to predict it from
        ids = np.array(tokens.ids, dtype=np.int32)
        if not supervised.any():
            return UnusableRowError("no supervised token: the template renders no assistant text")
        if not supervised[: self.max_length].any():
            return UnusableRowError(
                f"nothing supervised is left after truncation to {self.max_length} tokens "
                f"(the first assistant token is number {int(supervised.argmax()) + 1})"
            )
        return Encoded(
            ids[: self.max_length], supervised[: self.max_length], len(ids) > self.max_length
        )

    def _render(
        self, messages: list[Message]
    ) -> tuple[str, list[tuple[int, int]]] | UnusableRowError:
        from jinja2 import TemplateError

        try:
            if self._marked:
                return self._apply(messages, marked=True)
            return self._by_prefixes(messages)
        except (TemplateError, TypeError) as error:
            return UnusableRowError(f"the chat template refuses it: {error}")

    def _by_prefixes(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Mark each assistant turn as what it adds to the text of the turns before it."""
        text, _ = self._apply(messages)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._apply(messages[:turn], add_generation_prompt=True)
            through, _ = self._apply(messages[: turn + 1])
            if not (through.startswith(before) and text.startswith(through)):
                raise DataError(
                    "the chat template rewrites earlier turns: the text of the first "
                    f"{turn + 1} turns is not how the whole conversation of {len(messages)} turns "
                    "begins, so its assistant tokens cannot be told apart. Give a template with "
                    "{% generation %} markers (--set data.template=FILE.jinja) or use "
                    "--set data.template=tulu"
                )
            spans.append((len(before), _end_of_turn(through, len(before), message["content"])))
        return text, spans

    def _apply(
        self, messages: list[Message], marked: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],  # type: ignore[arg-type]
            chat_template=self.template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if marked else []


def _end_of_turn(text: str, start: int, content: str) -> int:
    """Return where an assistant turn ends: after its end-of-turn token, before the layout after it.

    Where a template ends a turn by white space alone, that white space is the end-of-turn mark.
    """
    turn = text[start:]
    _, _, tail = turn.partition(content.strip() or "\0")
    return start + len(turn.rstrip() if tail.strip() or not content.strip() else turn)


def _template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    if template == "tulu":
        return TULU
    if template is not None:
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the chat template {template!r}: {error}") from None
    if tokenizer.chat_template is None:
        logger.warning(
            "%s has no chat template; using the Tulu format (<|user|> … <|assistant|> …)",
            tokenizer.name_or_path,
        )
        return TULU
    return str(tokenizer.get_chat_template())


def _first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the beginning-of-sequence token where the tokenizer itself would put one."""
    first = tokenizer("a").input_ids[0]
    return str(tokenizer.bos_token) if first == tokenizer.bos_token_id else ""
