"""Comes in: the words of the command line. Goes out: messages, a run folder, an exit code.

May import: everything beneath.
"""

from gradsift.cli.app import main

__all__ = ["main"]
