"""The picks as trainers read them: one schema of messages, whatever the pool's schemas are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset

from conftest import Write, configure
from data.test_whole_messages import ASKED, QWEN, TOOLS
from gradsift.pipeline import run

Rows = list[dict[str, Any]]

PARTS = [{"type": "text", "text": "Say "}, {"type": "text", "text": "yes."}]
SCHEMAS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "system", "content": "Be short."},
                              {"role": "user", "content": PARTS},
                              {"role": "assistant", "content": "Yes."}]},
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be exact."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hello?"},
                                   {"from": "gpt", "value": "Hello."}]},
    "prompt-completion": {"question": "Two and two?", "answer": "Four."},
}  # fmt: skip
AS_MESSAGES = {
    "messages": [("system", "Be short."), ("user", "Say yes."), ("assistant", "Yes.")],
    "alpaca": [("system", "Be exact."), ("user", "Add.\n\n1 and 2"), ("assistant", "3")],
    "sharegpt": [("user", "Hello?"), ("assistant", "Hello.")],
    "prompt-completion": [("user", "Two and two?"), ("assistant", "Four.")],
}
TEMPLATE = (  # of texts and of parts
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COLUMNS = {"prompt": "question", "completion": "answer"}


def pick_all(base: Path, pool: Path, target: Path, folder: Path, **data: Any) -> Path:
    """Pick a whole pool, without measuring anything of it, and return where the picks are."""
    config = configure(
        base, pool, {"t": target}, method="length", data=data,
        policy={"budget": "100%", "duplicates": "keep"},
    )  # fmt: skip
    run(config, folder)
    return folder / "selected"


@pytest.fixture
def mixed(base: Path, write: Write, target_rows: Rows, tmp_path: Path) -> Path:
    """The picks of a pool whose files have four schemas."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for schema, row in SCHEMAS.items():
        write(f"pool/{schema}.jsonl", [row | {"id": f"{schema}-{n}"} for n in range(3)])
    target, template = write("t.jsonl", target_rows), tmp_path / "parts.jinja"
    template.write_text(TEMPLATE)
    return pick_all(base, folder, target, tmp_path / "run", columns=COLUMNS, template=str(template))


def load(path: Path, tmp_path: Path) -> Any:
    cache = str(tmp_path / "cache")
    return load_dataset("json", data_files=str(path), split="train", cache_dir=cache)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_schema_becomes_messages_in_the_order_of_the_picks(mixed: Path) -> None:
    lines = read_lines(mixed / "t.messages.jsonl")
    assert len(lines) == 12
    assert [list(line) for line in lines] == [["id", "source", "score", "messages"]] * 12
    assert [line["id"] for line in lines] == [row["id"] for row in read_lines(mixed / "t.jsonl")]
    scores = [line["score"] for line in lines]
    assert scores == sorted(scores, reverse=True)
    for line in lines:
        assert line["source"] == line["id"].rpartition("-")[0]
        turns = [(turn["role"], turn["content"]) for turn in line["messages"]]
        assert turns == AS_MESSAGES[line["source"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("schema", [*SCHEMAS, "mixed"])
def test_trl_trains_on_picks_of_every_schema(
    schema: str, base: Path, write: Write, target_rows: Rows, mixed: Path, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    picked = mixed
    if schema != "mixed":
        pool = write("one.jsonl", [SCHEMAS[schema] | {"id": f"{n}"} for n in range(6)])
        target, template = write("t.jsonl", target_rows), tmp_path / "parts.jinja"
        columns = COLUMNS if schema == "prompt-completion" else {}
        picked = pick_all(
            base, pool, target, tmp_path / "one", columns=columns, template=str(template)
        )
    data = load(picked / "t.messages.jsonl", tmp_path)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=2,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(model=str(base), train_dataset=data, args=arguments)
    assert len(trainer.train_dataset) == (12 if schema == "mixed" else 6)
    result = trainer.train()
    assert result.global_step == 2
    assert 0 < result.training_loss < 20


def test_calls_and_tools_are_kept_and_load_however_late_they_come(
    base: Path, write: Write, tmp_path: Path
) -> None:
    long = {"messages": [{"role": "user", "content": "x"},
                         {"role": "assistant", "content": "yes " * 20}]}  # fmt: skip
    asked = {"messages": ASKED, "tools": TOOLS, "id": "asked"}
    template = tmp_path / "qwen.jinja"
    template.write_text(QWEN)
    pool = write("pool.jsonl", [asked, long | {"id": "first"}, long | {"id": "second"}])
    target = write("t.jsonl", [long])
    picked = pick_all(base, pool, target, tmp_path / "run", template=str(template), max_length=4000)
    first, second, last = (picked / "t.messages.jsonl").read_text().splitlines(keepends=True)
    found = json.loads(last)
    assert [turn.get("tool_calls") for turn in found["messages"]] == [
        turn.get("tool_calls") for turn in ASKED
    ]
    assert json.loads(found["tools"]) == TOOLS
    # a file whose calls come after the 10 MB from which `datasets` infers its types
    turn = json.loads(first)["messages"][0]
    assert turn == {"role": "user", "content": "x", "name": None, "tool_calls": None}
    late = tmp_path / "late.jsonl"
    count = 12_000_000 // len(second)
    late.write_text(first + second * count + last)
    loaded = load(late, tmp_path)[count + 1]
    assert loaded["messages"] == found["messages"]
    assert json.loads(loaded["tools"]) == TOOLS
    entry = json.loads((picked / "dataset_info.json").read_text())["gradsift_t"]
    assert entry["formatting"] == "openai"
    assert entry["columns"] == {"messages": "messages", "tools": "tools"}


def test_entries_name_the_file_and_what_its_turns_are_called(mixed: Path, tmp_path: Path) -> None:
    entry = json.loads((mixed / "dataset_info.json").read_text())["gradsift_t"]
    assert entry == {
        "file_name": "t.messages.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system",
        },
    }  # fmt: skip
    [dataset] = yaml.safe_load((mixed / "axolotl.yaml").read_text())["datasets"]
    assert dataset == {
        "path": str(mixed / "t.messages.jsonl"), "ds_type": "json", "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
    }  # fmt: skip
    turn = load(mixed / "t.messages.jsonl", tmp_path)[0][entry["columns"]["messages"]][-1]
    assert turn[entry["tags"]["role_tag"]] == entry["tags"]["assistant_tag"]
