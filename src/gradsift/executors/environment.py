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


# set on the way, and read where a GPU is first used: `use_deterministic_kernels`
_FROM_DRIVER = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")


def worker_environment() -> dict[str, str]:
    """Return what a process elsewhere is to have in its environment when it begins."""
    return ENVIRONMENT | {name: os.environ[name] for name in _FROM_DRIVER if name in os.environ}


def set_environment() -> None:
    """Set what is not set of the environment, and silence the warnings of libraries."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
