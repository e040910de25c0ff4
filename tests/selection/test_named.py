"""Several selections of a target in one run folder, by name, and the policy of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gradsift
from conftest import Write, configure
from gradsift.config import Config
from gradsift.errors import ConfigError, RunError
from gradsift.pipeline import run
from gradsift.policy_config import NAMES_OF_FILES, PolicyConfig
from gradsift.runs import layout
from gradsift.sections import read_yaml
from gradsift.selection.picks import list_selections, overlap
from gradsift.selection.policies import describe_policy

Rows = list[dict[str, Any]]


@pytest.fixture
def config(base: Path, adapter: Path, write: Write, pool_rows: Rows, target_rows: Rows) -> Config:
    return configure(
        base, write("pool.jsonl", pool_rows), {"t": write("t.jsonl", target_rows)},
        warmup={"adapter": str(adapter)},
    )  # fmt: skip


def with_policy(config: Config, **policy: Any) -> Config:
    return config.model_copy(update={"policy": config.policy.model_copy(update=policy)})


def test_named_picks_stand_beside_others_and_are_listed(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    run(config, folder)
    unnamed = (folder / "selected/t.jsonl").read_bytes()
    tight = run(with_policy(config, name="tight", budget="4"), folder).selections["t"]
    assert (tight.key, len(tight.picks)) == ("t.tight", 4)
    assert (folder / "selected/t.jsonl").read_bytes() == unnamed
    capped = with_policy(config, name="capped", source_cap="40%")
    run(capped, folder)
    assert "is replaced" not in caplog.text
    found = list_selections(folder)
    assert [(one.key, len(one.picks), one.method) for one in found] == [
        ("t", 9, "gist"), ("t.capped", 9, "gist"), ("t.tight", 4, "gist"),
    ]  # fmt: skip
    assert found[1].policy == capped.policy  # kept in its Parquet file
    assert overlap(found[0], found[2]) == pytest.approx(4 / 9)
    for one in found:
        names = (layout.picks, layout.messages, layout.reasons, layout.refusals)
        assert all((folder / name(one.key)).exists() for name in names)
    entries = json.loads((folder / "selected/dataset_info.json").read_text())
    assert [*entries] == ["gradsift_t", "gradsift_t.capped", "gradsift_t.tight"]
    page = (folder / "report.html").read_text()
    for key in ("t", "t.capped", "t.tight"):
        assert f'<a role="tab" id="tab/{key}"' in page
    assert page.count("2 more selections of t in this folder") == 3
    assert "<td>4, decontaminate=none</td>" in page  # the policy of `tight`
    assert "at most 40% from any one source <code>source_cap=40%</code>" in page
    # named picks leave the policy of the folder alone
    assert read_yaml(folder / "config.yaml") == json.loads(config.model_dump_json())
    best = found[0].picks["id"][8].as_py()
    [explained] = gradsift.explain(folder, best)
    assert explained.verdict.startswith("picked as number 9 of 9, for ")
    assert "; tight: not picked: the budget was spent before its turn" in explained.verdict


def test_named_picks_of_other_scores_take_the_folder_with_them(
    config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(config, folder)
    gist = config.gist.model_copy(update={"norm_power": 1.0})
    other = with_policy(config, name="power").model_copy(update={"gist": gist})
    run(other, folder)  # the scores that the unnamed picks were made from are no more
    assert read_yaml(folder / "config.yaml")["policy"]["name"] == "power"
    assert [one.key for one in list_selections(folder)] == ["t", "t.power"]
    page = (folder / "report.html").read_text()
    assert 'id="tab/t.power"' in page
    assert 'id="tab/t"' not in page
    assert "1 more selection of t in this folder" in page


def test_a_method_beside_another_leaves_it_the_folder(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config, folder)
    length = with_policy(config, name="long").model_copy(update={"method": "length"})
    assert run(length, folder).selections["t"].method == "length"
    assert read_yaml(folder / "config.yaml")["method"] == "gist"
    assert [(one.key, one.method) for one in list_selections(folder)] == [
        ("t", "gist"), ("t.long", "length"),
    ]  # fmt: skip
    assert 'id="tab/t.long"' not in (folder / "report.html").read_text()
    assert gradsift.explain(folder, "sql-1-0")[0].method == "gist"


def test_named_picks_of_other_targets_take_the_folder_with_them(
    config: Config, tmp_path: Path, write: Write, pool_rows: Rows
) -> None:
    folder = tmp_path / "run"
    cheap = config.model_copy(update={"method": "length"})
    run(cheap, folder)
    targets = config.data.targets | {"u": (str(write("u.jsonl", pool_rows[:5])),)}
    data = config.data.model_copy(update={"targets": targets})
    more = with_policy(cheap, name="more").model_copy(update={"data": data})
    assert [*run(more, folder).selections] == ["t", "u"]
    assert [*read_yaml(folder / "config.yaml")["data"]["targets"]] == ["t", "u"]
    assert [one.key for one in list_selections(folder)] == ["t", "t.more", "u.more"]


def test_the_unnamed_picks_are_replaced_and_that_is_said(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(config, tmp_path / "run")
    run(with_policy(config, budget="5"), tmp_path / "run")
    assert (
        'selected/t.jsonl is replaced (budget was "10%", is now "5"); --name NAME keeps a '
        "selection beside it"
    ) in caplog.text
    assert len((tmp_path / "run/selected/t.jsonl").read_text().splitlines()) == 5


def test_damaged_picks_are_named_and_left_out(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    run(config, folder)
    run(with_policy(config, name="tight", budget="4"), folder)
    with (folder / "selected/t.tight.messages.jsonl").open("a") as file:
        file.write("{}\n")
    assert [one.key for one in list_selections(folder)] == ["t"]
    assert f"left out: {folder / 'selected/t.tight.messages.jsonl'} is damaged" in caplog.text


def test_picks_that_were_broken_off_are_named_and_left_out(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    run(config, folder)

    def die(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("gradsift.selection.picks._refusals", die)
        run(with_policy(config, name="tight", budget="4"), folder)
    assert (folder / "selected/t.tight.parquet").exists()
    run(with_policy(config, name="wide", budget="12"), folder)
    assert [one.key for one in list_selections(folder)] == ["t", "t.wide"]
    assert "left out: selected/t.tight was not finished" in caplog.text
    run(with_policy(config, name="tight", budget="4"), folder)
    assert [one.key for one in list_selections(folder)] == ["t", "t.tight", "t.wide"]


def test_a_folder_without_picks_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a gradsift run"):
        list_selections(tmp_path)


@pytest.mark.parametrize("name", [*NAMES_OF_FILES, "a/b", "", "a.b"])
def test_a_name_that_no_file_can_have_is_refused(config: Config, name: str) -> None:
    values = config.model_dump()
    values["policy"]["name"] = name
    message = r"policy\.name .--name.: (expected another name|a selection's name)"
    with pytest.raises(ConfigError, match=message):
        Config.build(values)


def test_the_names_that_are_refused_are_those_of_files() -> None:
    names = {layout.messages("t"), layout.refusals("t")}
    assert {name.removeprefix("selected/t.").partition(".")[0] for name in names} == {
        *NAMES_OF_FILES
    }


def test_the_configuration_of_a_run_keeps_the_name_of_its_last_picks(
    config: Config, tmp_path: Path
) -> None:
    run(with_policy(config, name="tight"), tmp_path / "run")
    assert read_yaml(tmp_path / "run/config.yaml")["policy"]["name"] == "tight"
    gradsift.write_report(tmp_path / "run")  # of a folder that has no other


def test_a_policy_is_described_in_plain_words() -> None:
    assert describe_policy(PolicyConfig(source_cap={"dolly": "10%"}, budget="3Mtok")) == {
        "budget": "3,000,000 tokens",
        "strategy": "the top of the ranking",
        "source_cap": "at most 10% from dolly",
        "duplicates": "repeated picks are refused",
        "decontaminate": "examples near those of the target are refused (Jaccard similarity of "
        "0.8 or more)",
    }
    policy = PolicyConfig(budget="20", strategy="round-robin", per="task", source_cap="5%",
                          duplicates="near", decontaminate="none", similarity=0.5)  # fmt: skip
    assert [*describe_policy(policy).values()] == [
        "20 examples",
        "round-robin: each target task picks in turn",
        "at most 5% from any one source",
        "picks near an earlier one are refused (Jaccard similarity of 0.5 or more)",
        "repeats of target examples are kept",
    ]
