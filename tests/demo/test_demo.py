from __future__ import annotations

import re
from pathlib import Path

import pytest

import gradsift
from gradsift.demo.run_demo import run_demo
from gradsift.demo.skills import SKILLS, make_examples


def test_skills_are_many_different_and_seeded() -> None:
    assert len(SKILLS) >= 8
    for skill in SKILLS:
        made = make_examples(skill, 60, seed=1)
        assert made == make_examples(skill, 60, seed=1)
        assert len({str(example["messages"]) for example in made}) == 60
        assert made[0]["messages"] != make_examples(skill, 60, seed=2)[0]["messages"]


@pytest.mark.slow
def test_the_demo_finds_its_skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    shown = run_demo(tmp_path / "demo", scale=0.15)
    table = shown.text()
    found = re.search(r"picks of gist +([\d.]+)% +\d\.\d{3} ± \d\.\d{3}\n", table)
    in_pool = re.search(r"random picks +([\d.]+)% \(pool\) +\d\.\d{3} ± \d\.\d{3}\n", table)
    assert found, table
    assert in_pool, table
    assert re.search(r"nothing +\d\.\d{3}\n\nsql, 5%: .*(gist|random).*\.$", table), table
    assert [*shown.fine_tunings] == ["gist", "influence", "bm25", "random", "base"]
    assert float(found[1]) > 2 * float(in_pool[1])
    assert shown.fine_tunings["gist"][0] == pytest.approx(float(found[1]) / 100, abs=5e-4)
    assert gradsift.explain(shown.run, shown.first_pick)
    assert len(list((tmp_path / "cache").iterdir())) == 1
