"""Shared fixtures; shapes and types are checked by beartype throughout (see pyproject.toml)."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
