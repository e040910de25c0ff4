"""`gradsift geometry` on a tiny model: what it leaves, what it refuses, where it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradsift
from conftest import Write, configure
from gradsift.errors import ConfigError, RunError
from gradsift.pipeline import run
from gradsift.report.exhibits import read_exhibits
from gradsift.runs.folder import Run

Rows = list[dict[str, Any]]
SMALL = {"examples": 5, "eigenvectors": 3, "probes": 3}


@pytest.fixture
def files(write: Write, pool_rows: Rows, target_rows: Rows) -> dict[str, Path]:
    return {"pool": write("pool.jsonl", pool_rows), "t": write("t.jsonl", target_rows)}


@pytest.mark.slow
def test_what_geometry_leaves(base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = configure(
        base, files["pool"], {"t": files["t"]},
        warmup={"epochs": 2, "checkpoints": 2}, lora={"rank": 1, "alpha": 2}, gist={"rank": 6},
    )  # fmt: skip
    run(config, folder)
    found = gradsift.measure_geometry(folder, **SMALL)
    assert found == json.loads((folder / "geometry/geometry.json").read_text())
    places = found["t"]["places"]
    assert [*places] == ["before warm-up", "epoch-1", "epoch-2"]
    stored = json.loads((folder / "targets/t/spectrum.json").read_text())
    for label in ("epoch-1", "epoch-2"):
        spectrum = places[label]["spectrum"]
        np.testing.assert_allclose(
            spectrum["singular_values"], stored[label]["singular_values"], rtol=1e-3
        )
        assert spectrum["rank"] == stored[label]["rank"]
    for place in places.values():
        hessian = place["hessian"]
        magnitudes = np.abs(hessian["eigenvalues"])
        assert (np.diff(magnitudes) <= 0).all()
        assert len(magnitudes) == len(hessian["captured"]) == 3
        assert all(0 <= share <= 1 + 1e-6 for share in hessian["captured"])
        assert hessian["angles"][-1]["rank"] == hessian["rank"] == 5
        for angle in hessian["angles"]:
            assert angle["rms_sine"] <= angle["largest_sine"] + 1e-12 <= 1 + 1e-9
    coupling = found["t"]["coupling"]
    assert 0 < coupling["off_diagonal"]["value"] < 1.2
    assert len(coupling["layers"]) == 8
    assert len(coupling["masses"]) == len(coupling["blocks"]) == 16
    matrix = np.array(coupling["entries"]["matrix"])
    np.testing.assert_allclose(matrix, matrix.T)
    assert "Measured for other picks or adapters" not in (folder / "report.html").read_text("utf-8")
    titles = [exhibit.title for exhibit in read_exhibits(Run(folder), "geometry", "t", "")]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(titles) == 6
    assert all(title in page for title in titles)
    times = {p: p.stat().st_mtime_ns for p in (folder / "geometry/t").iterdir()}
    assert gradsift.measure_geometry(folder, **SMALL) == found
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_what_geometry_cannot_do_is_told(
    base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    config = configure(base, files["pool"], {"t": files["t"]}, method="length")
    run(config, tmp_path / "run")
    with pytest.raises(RunError, match="holds no adapter; run `gradsift select --method gist`"):
        gradsift.measure_geometry(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"unknown setting 'probe'; did you mean 'probes'"):
        gradsift.measure_geometry(tmp_path / "run", probe=1)
    text = (
        (tmp_path / "run/config.yaml")
        .read_text()
        .replace("quantization: none", "quantization: 4bit")
    )
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized/config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="differentiates twice, which quantized layers do not"):
        gradsift.measure_geometry(tmp_path / "quantized")
