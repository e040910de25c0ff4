"""Conversations to token ids and the mask of supervised tokens, by the model's own chat template.

The template is rendered once, the characters of the assistant turns are marked, and the text is
tokenized once; a token is supervised where it overlaps a marked span.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
_OTHER_PARTS = {
    "reasoning": ("reasoning_content", "reasoning", "thinking"),
    "function_call": ("function_call",),
}
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it; `supervised` marks the tokens whose loss counts."""

    input_ids: Int[np.ndarray, " token"]
    supervised: Bool[np.ndarray, " token"]
    truncated: bool = False


class Encoder:
    """The one way from a conversation to tokens, for pool, targets and training alike."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        template: str | None = None,
        num_embeddings: int | None = None,
    ) -> None:
        """Choose the template: the tokenizer's own, Tulu's, or that of a file.

        `num_embeddings`: how many tokens the model knows.

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
        self._num_embeddings = num_embeddings
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

    def encode(
        self, conversations: Sequence[list[Message]], tools: Sequence[Tools] | None = None
    ) -> list[Encoded | UnusableRowError]:
        """Return one encoded example, or the reason why not, per conversation.

        `tools`: those of each conversation, if any has some.

        Raises:
            DataError: If the template renders earlier turns differently once later ones follow.
        """
        pairs = zip(conversations, tools or [None] * len(conversations), strict=True)
        rendered = [self._render(messages, own) for messages, own in pairs]
        texts = [item[0] for item in rendered if not isinstance(item, UnusableRowError)]
        tokens = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        return [
            item if isinstance(item, UnusableRowError) else self._mask(next(tokens), item[1])
            for item in rendered
        ]

    def _mask(self, tokens: Any, spans: list[tuple[int, int]]) -> Encoded | UnusableRowError:
        ends = chain.from_iterable(tokens.offsets)  # much faster than an array of pairs
        offsets = np.fromiter(ends, np.int64, 2 * len(tokens)).reshape(-1, 2)
        supervised = np.zeros(len(offsets), dtype=bool)
        for start, end in spans:
            supervised |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        supervised[:1] = False  # nothing stands before the first token to predict it from
        ids = np.array(tokens.ids, dtype=np.int32)
        if self._num_embeddings and ids.max(initial=0) >= self._num_embeddings:
            place = int((ids >= self._num_embeddings).argmax())
            return UnusableRowError(
                f"token {ids[place]} ({tokens.tokens[place]!r}) is beyond the model's "
                f"{self._num_embeddings} embeddings: is this the model's own tokenizer?"
            )
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
        self, messages: list[Message], tools: Tools
    ) -> tuple[str, list[tuple[int, int]]] | UnusableRowError:
        """Return the text and the spans of the assistant turns, or what the template cannot do."""
        render = self._by_markers if self._marked else self._by_prefixes
        try:
            text, spans = render(messages, tools)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 (a template may raise whatever it likes)
            return UnusableRowError(f"the chat template refuses it: {error}")
        lost = next(self._left_out(messages, tools, text), None)
        if lost is not None:
            return UnusableRowError(f"the chat template does not render {lost}")
        return text, spans

    def _left_out(self, messages: list[Message], tools: Tools, text: str) -> Iterator[str]:
        """Yield what is not in the text that the template makes of a conversation.

        Texts are looked for; of tools, calls and reasoning it is tried whether the text is the same
        without them.
        """
        for number in _turns_not_in(messages, text):
            yield f"the content of turn {number + 1} ({messages[number]['role']})"
        if tools and self._same(messages, None, text):
            yield "the row's tools"
        for turn, message in enumerate(messages):
            calls = message.get("tool_calls", [])
            for number in range(len(calls)):
                others = [call for i, call in enumerate(calls) if i != number]
                fewer = message | {"tool_calls": others}
                if not others:
                    del fewer["tool_calls"]
                if self._same([*messages[:turn], fewer, *messages[turn + 1 :]], tools, text):
                    yield f"tool call {number + 1} of turn {turn + 1}"
            for what, keys in _OTHER_PARTS.items():
                if any(message.get(key) for key in keys):
                    less = {key: value for key, value in message.items() if key not in keys}
                    if self._same([*messages[:turn], less, *messages[turn + 1 :]], tools, text):
                        yield f"the {what} of turn {turn + 1}"

    def _same(self, messages: list[Message], tools: Tools, text: str) -> bool:
        """Return whether this conversation has the same text; not if the template refuses it."""
        try:
            return self._apply(messages, tools, marked=self._marked)[0] == text
        except Exception:  # noqa: BLE001 (it may need the part that was removed)
            return False

    def _by_markers(
        self, messages: list[Message], tools: Tools
    ) -> tuple[str, list[tuple[int, int]]]:
        return self._apply(messages, tools, marked=True)

    def _by_prefixes(
        self, messages: list[Message], tools: Tools
    ) -> tuple[str, list[tuple[int, int]]]:
        """Mark each assistant turn as what it adds to the text of the turns before it."""
        text, _ = self._apply(messages, tools)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._apply(messages[:turn], tools, add_generation_prompt=True)
            through, _ = self._apply(messages[: turn + 1], tools)
            if not (through.startswith(before) and text.startswith(through)):
                raise DataError(
                    "the chat template rewrites earlier turns: the text of the first "
                    f"{turn + 1} turns is not how the whole conversation of {len(messages)} turns "
                    "begins, so its assistant tokens cannot be told apart. Give a template with "
                    "{% generation %} markers (--set data.template=FILE.jinja) or use "
                    "--set data.template=tulu"
                )
            end = _end_of_turn(through, len(before), message["content"])
            spans.append((len(before), end))
        return text, spans

    def _apply(
        self,
        messages: list[Message],
        tools: Tools,
        marked: bool = False,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],  # type: ignore[arg-type]
            tools=tools,  # type: ignore[arg-type]
            chat_template=self.template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if marked else []


def _turns_not_in(messages: Sequence[Message], text: str) -> list[int]:
    """Return the turns whose texts do not stand in a text: as they are, or as JSON.

    Those of the system anywhere, the others one after the other: a short one that was left out may
    well stand in a later one. If not all do, white space is left out of account.
    """
    lost: list[int] = []
    for squeeze in (str.strip, lambda part: "".join(part.split())):
        whole, start, lost = squeeze(text), 0, []
        for turn, message in enumerate(messages):
            content = message["content"] or ""
            in_order = message["role"] not in ("system", "developer")
            if isinstance(content, list) and repr(content) in text:
                lost.append(turn)  # the template printed the list with Python's repr
                continue
            for part in [content] if isinstance(content, str) else [p["text"] for p in content]:
                forms = squeeze(part), squeeze(json.dumps(part, ensure_ascii=False))
                places = [(whole.find(form, start if in_order else 0), form) for form in forms]
                ends = [place + len(form) for place, form in places if place >= 0]
                if not ends:
                    lost.append(turn)
                elif in_order:
                    start = min(ends)
        if not lost:
            break
    return lost


def _end_of_turn(text: str, start: int, content: Any) -> int:
    """Return where an assistant turn ends: after its end-of-turn token, before the layout after it.

    Where a template ends a turn by white space alone, that white space is the end-of-turn mark.
    """
    turn = text[start:]
    written = content.strip() if isinstance(content, str) else ""
    _, _, tail = turn.partition(written or "\0")
    return start + len(turn.rstrip() if tail.strip() or not written else turn)


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
    found = tokenizer("a").input_ids
    begins = bool(found) and found[0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if begins else ""
