"""Errors that a user can cause; each message says how to mend it."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec

_SMALLEST_SHARE = Decimal("1e-6")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# all control characters but new line and tab, and those that turn the direction of writing
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class GradsiftError(Exception):
    """A fault that the user can mend; the command line prints its message and exits with 2.

    Examples:
        >>> import gradsift
        >>> try:
        ...     gradsift.Config.build({"modle": {"name": "m"}})
        ... except gradsift.GradsiftError as error:
        ...     print(error)
        missing setting 'model': give --model...
    """


class ConfigError(GradsiftError):
    """A setting is unknown, malformed, or contradicts another."""


class DataError(GradsiftError):
    """A pool or target file cannot be read or holds nothing usable."""


class ModelError(GradsiftError):
    """A model, tokenizer or adapter cannot be used for exact LoRA gradients."""


class NumericsError(GradsiftError):
    """A loss or gradient is not finite, or a target spans too few directions."""


class RunError(GradsiftError):
    """A run folder is in use, is not one of ours, or was made with other settings."""


class BusyError(RunError):
    """A run folder is in use by another process."""


def check_installed(package: str, what: str, extra: str) -> None:
    """Find out whether a package that only `what` needs is there.

    Raises:
        ConfigError: If it is not; it says what to install.
    """
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise ConfigError(
            f"{what} needs {name}: pip install 'gradsift[{extra}]' (in a clone: pip install -e "
            f"'.[{extra}]')"
        )


def visible(text: str) -> str:
    r"""Return the text as it can be sent to a terminal: control characters are shown, not obeyed.

    >>> print(visible("red\x1b[31m"))
    red\x1b[31m
    """
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def shorten(text: str, characters: int = 300) -> str:
    """Return the beginning of a text that may be of any length.

    >>> shorten("endless", 3)
    'end … (7 characters)'
    """
    if len(text) <= characters:
        return text
    return f"{text[:characters]} … ({len(text):,} characters)"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is nearest to one that is not, if any is near.

    >>> nearest("Promt", ["prompt", "completion"])
    'prompt'
    """
    by_case = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name[:200].casefold(), by_case, n=1)
    return by_case[near[0]] if near else None


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the nearest known name, nothing if none is near.

    >>> suggest("Promt", ["prompt", "completion"])
    "; did you mean 'prompt'?"
    """
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def suggest_share(value: object) -> str:
    """Return a hint at the percentage that was meant by a number between 0 and 1.

    >>> suggest_share("0.05")
    '; did you mean 5%?'
    """
    try:
        share = Decimal(str(value).strip())
    except InvalidOperation:
        return ""
    is_meant = share.is_finite() and _SMALLEST_SHARE <= share < 1
    return f"; did you mean {(share * 100).normalize():f}%?" if is_meant else ""


def is_disk_full(error: Exception) -> bool:
    """Return whether there was no room to write; safetensors tells it in words alone."""
    return getattr(error, "errno", None) in _FULL or "No space left" in str(error)


@contextmanager
def translate_os_errors() -> Iterator[None]:
    """Say plainly what the operating system refuses: a file not to be read, a full disk.

    Also a decorator of the public functions.

    Raises:
        RunError: In place of an `OSError`.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read our output has gone
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is None:
            raise RunError(f"the operating system refuses: {reason}") from error
        if is_disk_full(error):
            reason = "the disk is full; make room: what is finished is kept"
        name = str(error.filename2 or error.filename)  # of a renaming, what it was to be
        raise RunError(f"cannot use {name!r}: {reason}") from error
