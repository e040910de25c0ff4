"""Small value types that several folders use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

from gradsift.errors import shorten, suggest_share

FusedMethodName = Literal[
    "gist",
    "less",
    "cosine",
    "influence",
    "rds",
    "embed",
    "bm25",
    "target-path",
    "perplexity",
    "length",
    "random",
