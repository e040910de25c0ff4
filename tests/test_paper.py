"""The paper's experiment on stand-ins of its data, and its page."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from typer.testing import CliRunner

import tiny_models
from gradsift.config import Config
from gradsift.data.encoding import Encoder
from gradsift.errors import ConfigError, DataError, ModelError
from gradsift.evaluation.config import EvaluationConfig
from gradsift.sections import merge

PAPER = Path(__file__).parents[1] / "examples" / "paper"
sys.path.insert(0, str(PAPER))
import hours as paper_hours  # noqa: E402
import paper_data  # noqa: E402
import run as paper_run  # noqa: E402

LANGUAGES = yaml.safe_load((PAPER / "tydiqa_prompts.yaml").read_text("utf-8"))
PROMPT = (
    "Count things.\n\nCount them all.\n\n"
    "Q: one?\nA: Let's think.\nSo the answer is 1.\n\n"
    "Q: two?\nA: It is 2.\n\nQ: three?\nA: It is 3."
)
PASSAGE = {"id": "finnish-1-0", "context": "Oulu on kaupunki.", "question": "Mikä on Oulu?"}
PASSAGE = PASSAGE | {"answers": [{"text": "kaupunki", "answer_start": 8}]}
QUICK = {
    "select": {
        "model": {"dtype": "float32", "device": "cpu"},
        "data": {"max_length": 512},
        "lora": {"rank": 4, "alpha": 8},
        "warmup": {"learning_rate": 1e-2, "batch_size": 8, "fraction": 0.2},
        "less": {"checkpoints": 1, "dimension": 64},
        "engine": {"batch_tokens": 2000},
        "policy": {"budget": "10%", "duplicates": "keep", "decontaminate": "none"},
    },
    "evaluate": {
        "epochs": 2,
        "seeds": 2,
        "random_seeds": 3,
        "fine_tuning": {"batch_size": 4, "learning_rate": 1e-3},
    },
}
# in place of lm-evaluation-harness: every task gives one score
HARNESS = {
    "__init__": "",
    "tasks": (
        "from pathlib import Path\n"
        "class TaskManager:\n"
        "    def __init__(self, include_path):\n"
        "        self.known = [path.stem for path in Path(include_path).iterdir()]\n"
        "    def match_tasks(self, names):\n"
        "        return [name for name in names if name in self.known]\n"
        "    def load(self, names):\n"
        "        pass\n"
    ),
    "evaluator": (
        "def simple_evaluate(model, tasks, task_manager, log_samples):\n"
        "    return {'results': {tasks[0]: {'f1,none': 0.375, 'sample_len': 9}}}\n"
    ),
    "models/__init__": "",
    "models/huggingface": (
        "class HFLM:\n    def __init__(self, pretrained, tokenizer, batch_size):\n        pass\n"
    ),
}


def turns(row: dict[str, Any]) -> tuple[str, str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["cue"], assistant["content"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def archive(tmp_path: Path, pool_rows: list[dict[str, Any]]) -> Path:
    """An archive laid out as that of LESS."""
    files: dict[str, str] = {}
    for number, name in enumerate(paper_data.POOL):
        own = [row | {"dataset": name} for row in pool_rows[number::4]]
        text = "".join(json.dumps(row) + "\n" for row in own)
        files[f"train/processed/{name}/{name}_data.jsonl"] = text
    for number in range(57):
        for split, count in (("dev", 6), ("test", 3)):
            table = io.StringIO()
            rows = [
                [f"{split} {i}, of\n{number}?", "w", "x", "y", "z", "ABCD"[i % 4]]
                for i in range(count)
            ]
            csv.writer(table).writerows(rows)
            files[f"eval/mmlu/{split}/subject_{number}_{split}.csv"] = table.getvalue()
    tasks = [f"task_{number}" for number in range(27)]
    files["eval/bbh/bbh-three-shot.json"] = json.dumps(dict.fromkeys(tasks, PROMPT))
    for task in tasks:
        examples = [{"input": f"{i}?", "target": f"({i})"} for i in range(12)]
        files[f"eval/bbh/test/{task}.json"] = json.dumps({"examples": examples})
    shots = {language: [PASSAGE, PASSAGE] for language in LANGUAGES}
    files["eval/tydiqa/dev/tydiqa-one-shot.json"] = json.dumps(shots, ensure_ascii=False)
    files["eval/tydiqa/dev/tydiqa-one-shot-zh.json"] = "{}"
    qas = [
        {
            "id": f"{language}-{i}",
            "question": f"{i}?",
            "answers": [{"text": f"{i}", "answer_start": 0}],
        }
        for language in LANGUAGES
        for i in range(31)
    ]
    squad = {"data": [{"paragraphs": [{"context": "all of it", "qas": qas}]}]}
    files["eval/tydiqa/test/tydiqa-goldp-v1.1-dev.json"] = json.dumps(squad)
    files["eval/tydiqa/one-shot-valid/tydiqa-goldp-v1.1-dev.json"] = '{"data": []}'
    path = tmp_path / "less-data.zip"
    with ZipFile(path, "w") as made:
        for name, text in files.items():
            made.writestr(f"data/{name}", text)
            made.writestr(f"__MACOSX/data/{name}", "not this")
    return path


def test_a_question_of_mmlu() -> None:
    questions = {
        "b_c": [["Q?", "one", "two", "three", "four", "C"]] * 2,
        "a": [["P?", *"wxyz", "A"]],
    }
    first, second = paper_data.mmlu_rows(questions, 1)
    assert (first["task"], second["task"]) == ("a", "b_c")
    assert turns(second) == (
        "The following are multiple choice questions (with answers) about  b c.\n\n"
        "Q?\nA. one\nB. two\nC. three\nD. four\nAnswer:",
        "The answer is:",
        " C",
    )


def test_a_worked_example_of_bbh_comes_after_the_other_two() -> None:
    first, second, third = paper_data.bbh_rows({"counting": PROMPT})
    assert {row["task"] for row in (first, second, third)} == {"counting"}
    assert turns(first) == (
        "Count things.\n\nCount them all.\n\n"
        "Q: two?\nA: It is 2.\n\nQ: three?\nA: It is 3.\n\nQ: one?",
        "A:",
        " Let's think.\nSo the answer is 1.",
    )
    assert turns(second)[0].endswith("So the answer is 1.\n\nQ: three?\nA: It is 3.\n\nQ: two?")
    assert turns(third)[2] == " It is 3."


def test_held_out_questions_of_bbh() -> None:
    questions = {"counting": [{"input": "four?", "target": "4"}] * 2}
    [row] = paper_data.bbh_held_out({"counting": PROMPT}, questions, 1)
    assert turns(row) == (f"{PROMPT}\n\nQ: four?", "A: So the answer is", " 4")


def test_a_passage_of_tydiqa() -> None:
    [row] = paper_data.tydiqa_rows({"finnish": [PASSAGE, PASSAGE]}, 1)
    assert row["task"] == "finnish"
    assert turns(row) == (
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella."
        "Kappale: Oulu on kaupunki.\nKysymys: Mikä on Oulu?",
        "Vastaus:",
        " kaupunki",
    )


def test_only_the_answer_counts_and_the_format_is_that_of_less() -> None:
    tokenizer = tiny_models.tokenizer()
    encoder = Encoder(tokenizer, 512, str(PAPER / "tulu.jinja"))
    [row] = paper_data.mmlu_rows({"a": [["Q?", *"wxyz", "B"]]}, 1)
    ordinary = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\n"}]
    ordinary.append({"role": "assistant", "content": " Hello. "})
    found = encoder.encode([row["messages"], ordinary])
    texts = []
    for one in found:
        ids = one.input_ids  # type: ignore[union-attr]
        texts.append(tokenizer.decode(ids))
        texts.append(tokenizer.decode(ids[one.supervised]))  # type: ignore[union-attr]
    assert texts == [
        "<|user|>\nThe following are multiple choice questions (with answers) about  a.\n\n"
        "Q?\nA. w\nB. x\nC. y\nD. z\nAnswer:\n<|assistant|>\nThe answer is: B",
        " B",
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello.<|im_end|>\n",
        "Hello.<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("benchmark", "num_target", "num_tasks", "num_held_out"),
    [("mmlu", 285, 57, 57 * 3), ("bbh", 81, 27, 270), ("tydiqa", 9, 9, 270)],
)
def test_as_many_examples_as_in_the_paper(
    archive: Path, tmp_path: Path, pool_rows: list[dict[str, Any]],
    benchmark: str, num_target: int, num_tasks: int, num_held_out: int,
) -> None:  # fmt: skip
    paper_data.write_data(archive, benchmark, tmp_path / "made")
    pool, target, held_out = paper_data.paths(benchmark, tmp_path / "made")
    assert len(lines(target)) == num_target
    assert len({row["task"] for row in lines(target)}) == num_tasks
    assert len(lines(held_out)) == num_held_out
    assert not {turns(row) for row in lines(target)} & {turns(row) for row in lines(held_out)}
    assert sorted(path.name for path in pool.iterdir()) == [
        "cot.jsonl", "dolly.jsonl", "flan_v2.jsonl", "oasst1.jsonl"
    ]  # fmt: skip
    inside = ZipFile(archive).read("data/train/processed/cot/cot_data.jsonl")
    assert (pool / "cot.jsonl").read_bytes() == inside
    target.write_text("mine", encoding="utf-8")
    paper_data.write_data(archive, benchmark, tmp_path / "made")
    assert target.read_text(encoding="utf-8") == "mine"


def test_another_archive_is_told(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the archive .*missing\.zip"):
        paper_data.write_data(tmp_path / "missing.zip", "mmlu", tmp_path)
    other = tmp_path / "other.zip"
    with ZipFile(other, "w") as made:
        made.writestr("data/readme.txt", "")
    with pytest.raises(DataError, match=r"other\.zip holds no .*is it less-data\.zip of princeton"):
        paper_data.write_data(other, "bbh", tmp_path / "made")
    rows = paper_data.bbh_rows(dict.fromkeys(["a", "b"], PROMPT))
    with pytest.raises(DataError, match="expected 81 target examples of 27 tasks, found 6 of 2"):
        paper_data.check_counts(rows, "bbh")


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(DataError, match=r"cannot fetch .* no network\n.*--archive FILE"):
        paper_data.download()


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a stand-in before lm-evaluation-harness; take it away again."""
    for name, code in HARNESS.items():
        path = tmp_path / "installed" / "lm_eval" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
    about = tmp_path / "installed" / "lm_eval-9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 9\n")
    for name in loaded_harness():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "installed")
    yield
    for name in loaded_harness():
        del sys.modules[name]


def loaded_harness() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]


def test_what_stops_it_is_said_before_any_work(
    archive: Path, harness: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no network")

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("evaluate: {sedes: 3}")
    given: dict[str, Any] = {"model": "no/such", "output_dir": tmp_path, "archive": archive}
    with pytest.raises(ConfigError, match=r"sedes.* seeds"):
        paper_run.experiment("mmlu", **given, settings=wrong)
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    with monkeypatch.context() as patch:
        patch.setattr(TaskManager, "load", refuse)
        with pytest.raises(ConfigError, match=r"data of paper_mmlu: no network\n.*--no-lm-eval"):
            paper_run.experiment("mmlu", **given)
    assert not (tmp_path / "data").exists()
    with pytest.raises(ModelError, match="cannot load the model 'no/such'"):
        paper_run.experiment("mmlu", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_harness_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'gradsift\[lm-eval\]'"):
        paper_run.experiment("mmlu", model="no/such", output_dir=tmp_path)


@pytest.mark.slow
def test_one_command_ends_in_the_table(
    archive: Path, harness: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(paper_data.HELD_OUT, "tydiqa", 1)
    monkeypatch.setattr(paper_run.logging, "basicConfig", lambda **_: None)
    base = tiny_models.save_base(tmp_path / "tiny", max_position_embeddings=512)
    settings = tmp_path / "quick.yaml"
    settings.write_text(yaml.safe_dump(QUICK), encoding="utf-8")
    app = paper_run.typer.Typer()
    app.command()(paper_run.main)
    command = [
        "tydiqa", "--model", base, "--output-dir", tmp_path / "out", "--archive", archive,
        "--settings", settings,
    ]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out/table.md").read_text("utf-8")
    assert page in done.output
    monkeypatch.setattr("gradsift.evaluation.fine_tunings.FineTuner.run", None)  # all are there
    assert page in CliRunner().invoke(app, list(map(str, command))).output
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["| base", "| random", "| gist", "| less"]
    assert rows[0][3:5] == ["tydiqa, f1", "LESS's table 2"]
    for row in rows[2:]:
        assert row[3:5] == ["37.5", ""]
    assert [row[1:3] for row in rows[3:]] == [["9", "3"], ["9", "2"], ["9", "2"]]
    kept = yaml.safe_load((tmp_path / "out/run/evaluation/config.yaml").read_text())
    assert kept["fine_tuning"]["steps"] == 5  # 2 epochs over 9 picks, 4 at a time
    for name in ("tydiqa", "tydiqa.less"):
        assert len(lines(tmp_path / f"out/run/selected/{name}.jsonl")) == 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_hours_of_the_page_are_those_computed() -> None:
    page = (PAPER / "README.md").read_text("utf-8")
    assert f"| {' | '.join(paper_hours.row_of('Llama-3.2-3B'))} |" in page
    assert list(paper_hours.MODELS) == [
        line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if " h | " in line
    ]


def test_the_settings_are_the_papers_whatever_the_defaults_become() -> None:
    given = yaml.safe_load((PAPER / "settings.yaml").read_text("utf-8"))
    select, evaluate = given["select"], given["evaluate"]
    needed = {"model": {"name": "m"}, "data": {"pool": "p", "targets": {"t": "t"}}}
    config = Config.build(merge(needed, select))
    assert config.lora.model_dump() == select["lora"]
    assert (config.lora.rank, config.lora.alpha, config.warmup.fraction) == (128, 512, 0.05)
    assert (config.gist.aggregation, config.policy.budget) == ("max", "5%")
    assert evaluate.pop("epochs") == 4
    assert EvaluationConfig.build({"tests": {"t": "t"}} | evaluate).seeds == 3
