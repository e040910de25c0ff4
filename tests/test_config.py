from __future__ import annotations

from pathlib import Path

import pytest

from gradsift.config import Config
from gradsift.errors import ConfigError
from gradsift.sections import merge, parse_assignment, read_yaml
from gradsift.types import Budget

MINIMAL = {"model": {"name": "m"}, "data": {"pool": "p.jsonl", "targets": {"t": "t.jsonl"}}}


def build(*assignments: str) -> Config:
    return Config.build(merge(MINIMAL, *map(parse_assignment, assignments)))


def test_defaults_are_the_papers() -> None:
    config = build()
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 512, 0.1)
    warmup = config.warmup
    assert (warmup.fraction, warmup.epochs, warmup.learning_rate) == (0.05, 1, 2e-5)
    assert (warmup.batch_size, warmup.warmup_ratio, config.data.max_length) == (128, 0.03, 2048)
    assert (config.policy.budget, config.gist.aggregation, config.gist.norm_power) == (
        "5%",
        "max",
        0,
    )


def test_yaml_takes_the_configuration_there_and_back(tmp_path: Path) -> None:
    config = build("lora.target_modules=[q_proj, v_proj]", "policy.source_cap={a: 10%}")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert Config.build(read_yaml(path)) == config


def test_later_settings_win_and_targets_are_replaced_whole() -> None:
    merged = merge(MINIMAL, {"data": {"targets": {"u": "u.jsonl"}}})
    assert merged["data"] == {"pool": "p.jsonl", "targets": {"u": "u.jsonl"}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("warmup.learning_rat=1", "unknown setting 'warmup.learning_rat'; did you mean "
         "'warmup.learning_rate'?"),
        ("warmpu.epochs=1", "unknown setting 'warmpu'; did you mean 'warmup'?"),
        ("warmup.epochs=many", "warmup.epochs: Input should be a valid integer"),
        ("policy.budget=0", "above 0 and at most the whole pool, found '0'"),
        ("policy.budget=0%", "above 0 and at most the whole pool, found '0%'"),
        ("policy.budget=101%", "above 0 and at most the whole pool, found '101%'"),
        ("policy.budget=some", "expected a share (5%), a count (2000) or tokens (3Mtok)"),
        ("policy.budget=1.5", "a whole number"),
        ("policy.source_cap=much", "expected a share above 0% and up to 100%"),
        ("policy.source_cap=NaN%", "expected a share above 0%"),
        ("data.pool=''", "at least 1 character"),
        ("gist.rank=0", "expected at least 1, found 0"),
        ("gist.rank=half", "expected a share above 0%"),
        ("warmup.checkpoints=2", "2 checkpoints need as many epochs, found 1"),
        ("warmup.micro_batch_size=5", "batch_size 128 is not a multiple of micro_batch_size 5"),
        ("data.columns={question: q}", "'question' is no field"),
        ("data.targets={a/b: t.jsonl}", "a target's name becomes a file name"),
        ("rank", "expected SECTION.KEY=VALUE such as lora.rank=16, found 'rank'"),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_is_wrong(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(assignment)
    assert message in str(error.value)


def test_a_shard_is_whole_windows() -> None:
    given = {"model": {"name": "m"}, "data": {"pool": "p", "targets": {"t": "t"}}}
    told = "multiple of engine.window, found 1000 and 1024; raise shard_size or lower window"
    with pytest.raises(ConfigError, match=told):
        Config.build(given | {"engine": {"shard_size": 1000}})


def test_an_adapter_and_no_warm_up_contradict() -> None:
    with pytest.raises(ConfigError, match="give an adapter or mode 'none', not both"):
        build("warmup.adapter=a", "warmup.mode=none")


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"missing setting 'model.name'"):
        Config.build({"model": {}, "data": MINIMAL["data"]})


def test_a_broken_configuration_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("just text")
    with pytest.raises(ConfigError, match=r"expected sections .* in .*c\.yaml"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("5%", 5, "%"), ("2000", 2000, "examples"), ("3Mtok", 3_000_000, "tok"), ("10tok", 10, "tok"),
     ("1.5ktok", 1500, "tok")],
)  # fmt: skip
def test_budgets(text: str, amount: int, unit: str) -> None:
    budget = Budget.parse(text)
    assert (budget.amount, budget.unit) == (amount, unit)
    assert Budget.parse(str(budget)) == budget
