from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradsift.config import Config
from gradsift.errors import ConfigError
from gradsift.evaluation.config import EvaluationConfig
from gradsift.geometry.config import GeometryConfig
from gradsift.sections import Section, merge, parse_assignment, read_yaml
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
        ("warmup.epochs=many", "warmup.epochs: expected a whole number of at least 1 and at most "
         "2,147,483,647, found 'many'"),
        ("policy.budget=0", "above 0 and at most the whole pool, found '0'"),
        ("policy.budget=0%", "above 0 and at most the whole pool, found '0%'"),
        ("policy.budget=101%", "above 0 and at most the whole pool, found '101%'"),
        ("policy.budget=some", "expected a share (5%), a count (2000) or tokens (3Mtok)"),
        ("policy.budget=1.5", "a whole number, found '1.5'"),
        ("policy.budget=0.05", "found '0.05'; did you mean 5%?"),
        ("policy.budget=.5", "found '0.5'; did you mean 50%?"),
        ("policy.budget='.05'", "found '.05'; did you mean 5%?"),
        ("policy.budget=0.0025", "found '0.0025'; did you mean 0.25%?"),
        ("policy.source_cap='0.2'", "such as 5%, found '0.2'; did you mean 20%?"),
        ("policy.source_cap=0.2", "or one for each source such as {dolly: 10%}, found 0.2; did you "
         "mean 20%?"),
        ("policy.source_cap={dolly: 0.1}", "{'dolly': 0.1}"),
        ("gist.rank=0.95", "a share such as 95%, or a count of at least 1, found 0.95; did you "
         "mean 95%?"),
        ("policy.strategy=rond-robin", "policy.strategy: expected one of 'top', 'round-robin', "
         "'balanced', found 'rond-robin'; did you mean 'round-robin'?"),
        ("lora.target_modules=atention", "found 'atention'; did you mean 'attention'?"),
        ("engine.workers=Auto", "'auto' or a whole number of at least 1 and at most 2,147,483,647, "
         "found 'Auto'; did you mean 'auto'?"),
        ("engine.memory=much", "engine.memory (--memory): expected 'auto' or a size such as 8GiB, "
         "found 'much'"),
        ("method=gits", "'fuse', found 'gits'; did you mean 'gist'?"),
        ("lora=8", "lora: expected its settings by their names (rank, alpha, dropout, …), found 8"),
        ("data.columns={prmpt: q}", "'prmpt' is no field; expected one of messages, prompt, "
         "completion, system, tools, id, source, task; did you mean 'prompt'?"),
        ("data.columns={1: q}", "data.columns: expected a name that is text, found 1; quote it"),
        ("lora.xyz=1", "unknown setting 'lora.xyz' (known: lora.rank, lora.alpha, lora.dropout, "
         "lora.target_modules)"),
        ("policy.source_cap=much", "expected a share above 0% and up to 100%"),
        ("policy.source_cap=NaN%", "expected a share above 0%"),
        ("data.pool=''", "(--pool): expected a path or Hub id, or a list of them, found ''"),
        ("gist.rank=0", "gist.rank: expected 'auto', 'full', a share such as 95%, or a count of at "
         "least 1, found 0"),
        ("gist.rank=fulll", "found 'fulll'; did you mean 'full'?"),
        ("gist.rank=150%", "or a count of at least 1, found '150%'"),
        ("gist.rank=half", "or a count of at least 1, found 'half'"),
        ("warmup.checkpoints=2", "2 checkpoints need as many epochs, found 1"),
        ("warmup.micro_batch_size=8", "unknown setting 'warmup.micro_batch_size'; "
         "micro_batch_tokens takes its place and counts padded tokens, not examples (known: "),
        ("warmup.micro_batch_tokens=0", "warmup.micro_batch_tokens: expected 'auto' or a whole "
         "number of at least 1 and at most 2,147,483,647, found 0"),
        ("warmup.gradient_checkpointing=maybe", "warmup.gradient_checkpointing: expected 'auto' or "
         "true or false, found 'maybe'"),
        ("data.columns={question: q}", "'question' is no field"),
        ("data.targets={a/b: t.jsonl}", "a target's name becomes a file name"),
        ("rank", "expected SECTION.KEY=VALUE such as lora.rank=16, found 'rank'"),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_is_wrong(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(assignment)
    assert message in str(error.value)


WRONG = (
    "nonsense", "", 5, -3, 10**30, 1.5, 0.5, math.inf, math.nan, True, None, [], ["x", 1], [[]], {},
    {"a": 1}, {1: "b"}, b"x",
)  # fmt: skip
INTERNALS = re.compile(
    r"pydantic|Input|should|valid |type=|input_value|\w\[|\]:|function|union|constrained|literal|"
    r"\.(int|str|tuple|dict)\b|unable to parse|None\b"
)
WORDS = re.compile(
    r"\w[\w.]*( \(--[^)]+\))?: .*(expected .*)?found .*|(missing|unknown) setting '\S+'.*|"
    r"\w+: .*(not both|found \d+|multiple of \w+ \d+|which needs an .*)"
)


def settings(schema: dict[str, Any], node: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every setting and section of a schema."""
    node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    for name, inner in node.get("properties", {}).items():
        yield (name,)
        yield from ((name, *path) for path in settings(schema, inner))


@pytest.mark.parametrize(
    ("section", "given"),
    [(Config, MINIMAL), (EvaluationConfig, {"tests": {"t": "t.jsonl"}}), (GeometryConfig, {})],
)
def test_whatever_is_wrong_is_told_in_plain_words(
    section: type[Section], given: dict[str, Any]
) -> None:
    schema, refused = section.model_json_schema(), 0
    for path in settings(schema, schema):
        for value in WRONG:
            values = copy.deepcopy(given)
            inner = values
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value
            try:
                section.build(values)
            except ConfigError as error:
                refused += 1
                for line in str(error).splitlines():
                    where, _, _ = line.partition(", found ")
                    assert not INTERNALS.search(where), line
                    assert WORDS.fullmatch(line), line
                    assert path[0] in line, line
    assert refused > 10 * len([*settings(schema, schema)])


def test_a_shard_is_whole_windows() -> None:
    given = {"model": {"name": "m"}, "data": {"pool": "p", "targets": {"t": "t"}}}
    told = "multiple of engine.window, found 1000 and 1024; raise shard_size or lower window"
    with pytest.raises(ConfigError, match=told):
        Config.build(given | {"engine": {"shard_size": 1000}})


def test_an_adapter_and_no_warm_up_contradict() -> None:
    with pytest.raises(ConfigError, match="give an adapter or mode 'none', not both"):
        build("warmup.adapter=a", "warmup.mode=none")


def test_each_wrong_setting_is_told_once() -> None:
    with pytest.raises(ConfigError) as error:
        build("lora.rnk=1", "lora.alfa=2", "gist.rank=[]", "less.seed=-1", "lora.dropout=2")
    named = [re.sub(r"unknown setting |:.*|;.*", "", line) for line in str(error.value).split("\n")]
    assert sorted(named) == [
        "'lora.alfa'",
        "'lora.rnk'",
        "gist.rank",
        "less.seed (--seed)",
        "lora.dropout",
    ]


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
