"""The command line: one file for each verb, and the exit codes.

In: the words of the command line. Out: messages, a run folder, an exit code.
May import: everything.
"""

from gradsift.cli.app import main

__all__ = ["main"]
