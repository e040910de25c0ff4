"""Names of the files and folders in a run folder, each decided here and nowhere else."""

from __future__ import annotations
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from gradsift.config import Config
from gradsift.sections import read_yaml
from gradsift.errors import BusyError, ModelError, RunError, is_full
from gradsift.runs.remote import Mirror, is_remote
from gradsift.types import Checkpoint
from collections.abc import Iterator, Mapping
from gradsift.config import Config
from gradsift.data.sources import resolve
from gradsift.methods.base import Inputs
from gradsift.methods.registry import METHODS
from gradsift.runs.stage import Stage
from gradsift.models.identity import identity


OPTIMIZER_STATE = "optimizer.safetensors"
"""Where Adam's moments lie in the folder of an adapter."""


CONFIG = "config.yaml"


MANIFESTS, OWNER = "manifests", ".owner"


def scores_file(method: str) -> str:
    """Return where in a run folder the scores of a method lie."""
    return f"scores/{method}.parquet"
