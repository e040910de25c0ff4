"""What can go wrong by a user's hand, each with a message that says how to mend it."""


class GradsiftError(Exception):
    """A fault that the user can mend; the command line prints its message and exits with 2."""


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
