"""A flag that each thread raises for itself.

What is put in the place of a library's function stays there for good and looks at the flag: other
threads get the function's own answers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ThreadFlag(threading.local):
    """Whether this thread is within `raised`."""

    up = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise the flag while the context is open; contexts may lie within each other."""
        before, self.up = self.up, True
        try:
            yield
        finally:
            self.up = before
