"""What every process of a run has in its environment, and which library warnings are silenced."""

from __future__ import annotations

import os
import warnings

ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "MKL_CBWR": "AUTO,STRICT",  # the same bits whatever the number of threads
}
"""What every process of a run is to have in its environment before torch is imported."""


def set_environment() -> None:
    """Set what is not set of the environment, and silence the warnings of libraries."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
