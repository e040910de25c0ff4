"""Beside the built sites of versions in `site/` write which there are, and a page to the newest.

The theme's selector of versions reads the list: its form is that of mike, the tool that usually
writes it, which is not on PyPI for Zensical.
"""

from __future__ import annotations

import json
from pathlib import Path

from packaging.version import Version

SITE = Path(__file__).parents[1] / "site"


def main() -> None:
    """Write `versions.json` and `index.html`."""
    versions = sorted(Version(path.name) for path in SITE.iterdir() if path.is_dir())[::-1]
    listed = [{"version": str(own), "title": str(own), "aliases": []} for own in versions]
    listed[0]["aliases"] = ["latest"]
    (SITE / "versions.json").write_text(json.dumps(listed), encoding="utf-8")
    page = f'<meta http-equiv="refresh" content="0; url={versions[0]}/index.html">\n'
    (SITE / "index.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
