"""The picks as other trainers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset

from conftest import Write, configure
from gradsift.pipeline import run
from gradsift.selection.export import export_entries

Rows = list[dict[str, Any]]


@pytest.fixture
def picked(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> Path:
    config = configure(
        base, write("pool.jsonl", pool_rows), {"t": write("t.jsonl", target_rows)},
        warmup={"adapter": str(adapter)},
    )  # fmt: skip
    run(config, tmp_path / "run")
    return tmp_path / "run" / "selected"


def load(path: Path, tmp_path: Path) -> Any:
    cache = str(tmp_path / "cache")
    return load_dataset("json", data_files=str(path), split="train", cache_dir=cache)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_trl_trains_on_the_picks_as_they_are(picked: Path, base: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    data = load(picked / "t.jsonl", tmp_path)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=2,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(model=str(base), train_dataset=data, args=arguments)
    assert len(trainer.train_dataset) == 9
    result = trainer.train()
    assert result.global_step == 2
    assert 0 < result.training_loss < 20


def test_datasets_reads_the_picks_in_their_order(picked: Path, tmp_path: Path) -> None:
    data = load(picked / "t.jsonl", tmp_path)
    lines = [json.loads(line) for line in (picked / "t.jsonl").read_text().splitlines()]
    assert [row["id"] for row in data] == [line["id"] for line in lines]
    assert [row["messages"] for row in data] == [line["messages"] for line in lines]


def test_entries_name_the_file_and_what_its_turns_are_called(picked: Path, tmp_path: Path) -> None:
    entry = json.loads((picked / "dataset_info.json").read_text())["gradsift_t"]
    assert entry == {
        "file_name": "t.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant", "system_tag": "system",
        },
    }  # fmt: skip
    [dataset] = yaml.safe_load((picked / "axolotl.yaml").read_text())["datasets"]
    assert dataset == {
        "path": str(picked / "t.jsonl"), "ds_type": "json", "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
    }  # fmt: skip
    turn = load(picked / "t.jsonl", tmp_path)[0][entry["columns"]["messages"]][0]
    assert turn[entry["tags"]["role_tag"]] == entry["tags"]["user_tag"]


@pytest.mark.parametrize(
    ("schema", "row", "columns", "factory", "axolotl"),
    [
        ("alpaca", {"instruction": "a", "output": "b"}, {},
         {"formatting": "alpaca",
          "columns": {"prompt": "instruction", "response": "output"}},
         {"type": "alpaca"}),
        ("alpaca", {"instruction": "a", "input": "i", "output": "b", "system": "s"}, {},
         {"formatting": "alpaca", "columns": {"prompt": "instruction", "query": "input",
                                              "response": "output", "system": "system"}},
         {"type": {"field_instruction": "instruction", "field_input": "input",
                   "field_output": "output", "format": "{instruction}\n\n{input}",
                   "no_input_format": "{instruction}", "field_system": "system"}}),
        ("sharegpt", {"conversations": [{"from": "user"}, {"from": "gpt"}]}, {},
         {"formatting": "sharegpt", "columns": {"messages": "conversations"},
          "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "user",
                   "assistant_tag": "gpt", "system_tag": "system"}},
         {"type": "chat_template", "field_messages": "conversations",
          "message_property_mappings": {"role": "from", "content": "value"}}),
        ("prompt-completion", {"q": "a", "a": "b"}, {"prompt": "q", "completion": "a"},
         {"formatting": "alpaca", "columns": {"prompt": "q", "response": "a"}},
         {"type": {"field_instruction": "q", "field_output": "a", "format": "{instruction}",
                   "no_input_format": "{instruction}"}}),
    ],
)  # fmt: skip
def test_entries_of_other_schemas(
    schema: str, row: dict[str, Any], columns: dict[str, str], factory: dict[str, Any],
    axolotl: dict[str, Any], tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "selected"
    folder.mkdir()
    (folder / "t.jsonl").write_text(json.dumps(row) + "\n")
    export_entries(tmp_path, {"t": {schema}}, columns)
    found = json.loads((folder / "dataset_info.json").read_text())
    assert found == {"gradsift_t": {"file_name": "t.jsonl", **factory}}
    [dataset] = yaml.safe_load((folder / "axolotl.yaml").read_text())["datasets"]
    assert dataset == {"path": str(folder / "t.jsonl"), "ds_type": "json", **axolotl}


@pytest.mark.parametrize(
    ("schemas", "row"),
    [
        ({"messages", "alpaca"}, {}),
        ({"prompt-completion"}, {"prompt": [], "completion": []}),
        ({"sharegpt"}, {"conversations": [{"from": "human"}, {"from": "user"}]}),
    ],
)
def test_what_no_trainer_reads_in_one_go_has_no_entry(
    schemas: set[str], row: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "selected"
    folder.mkdir()
    (folder / "t.jsonl").write_text(json.dumps(row) + "\n")
    export_entries(tmp_path, {"t": schemas}, {})
    assert json.loads((folder / "dataset_info.json").read_text()) == {}
    assert "no trainer reads these rows in one go" in caplog.text
