"""Files of every kind and schema, masks, and what becomes of rows that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import tiny_models
from conftest import Write
from gradsift.data.conversations import UnusableRowError, detect, rename, to_messages
from gradsift.data.encoded import EncodedSet, encode_set
from gradsift.data.encoding import TULU, Encoded, Encoder
from gradsift.data.groups import GroupEncoder
from gradsift.data.sources import resolve
from gradsift.errors import DataError

QA = [{"role": "user", "content": "the what"}, {"role": "assistant", "content": "one two"}]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def encode(
    tmp_path: Path, *specs: str | Path, strict: bool = False, columns: dict[str, str] | None = None
) -> EncodedSet:
    encoder = Encoder(tiny_models.tokenizer(), 64)
    sources = resolve([str(spec) for spec in specs])
    return encode_set(
        "pool", sources, GroupEncoder(lambda: encoder, columns or {}), tmp_path / "data", strict
    )


def rejections(tmp_path: Path) -> list[dict[str, Any]]:
    text = (tmp_path / "data" / "pool.rejected.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


SCHEMAS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "messages": ({"messages": QA}, [("user", "the what"), ("assistant", "one two")]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [("user", "q"), ("assistant", "a")],
    ),
    "prompt-completion": (
        {"prompt": "q", "completion": "a"},
        [("user", "q"), ("assistant", "a")],
    ),
    "alpaca": (
        {"instruction": "q", "input": "i", "output": "a", "system": "s"},
        [("system", "s"), ("user", "q\n\ni"), ("assistant", "a")],
    ),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas(schema: str) -> None:
    row, expected = SCHEMAS[schema]
    assert detect(row, {}) == schema
    assert [(m["role"], m["content"]) for m in to_messages(row, schema)] == expected


def test_a_conversational_prompt_and_completion() -> None:
    row = {"prompt": QA[:1], "completion": QA[1:]}
    assert to_messages(row, "prompt-completion") == QA


def test_mapped_columns_win() -> None:
    assert detect({"q": "x", "completion": "y"}, {"prompt": "q"}) == "prompt-completion"
    row, columns = {"messages": QA, "q": "x", "a": "y"}, {"prompt": "q", "completion": "a"}
    assert detect(row, columns) == "prompt-completion"
    assert to_messages(rename(row, columns), "prompt-completion")[1]["content"] == "y"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": QA[:1]}, "no assistant turn with text (turns: user)"),
        ({"messages": [QA[0], {"role": "assistant", "content": "  "}]}, "no assistant turn with"),
        ({"messages": []}, "messages is empty, expected a list of turns"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard' in turn 1"),
        ({"messages": [{"role": "user", "content": None}]}, "content of turn 1 is empty, expected"),
        ({"messages": [{"content": "x"}]}, "turn 1 is an object, expected an object with 'role'"),
        ({"text": "x"}, "the file's schema is messages (messages), this row has text"),
    ],
)
def test_unusable_rows(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRowError) as error:
        to_messages(row, "messages")
    assert reason in str(error.value)


def test_earlier_turns_in_history_are_not_dropped_in_silence() -> None:
    row = {"instruction": "q", "output": "a", "history": [["x", "y"]]}
    with pytest.raises(UnusableRowError, match="'history' are not read"):
        to_messages(row, "alpaca")


def test_bad_rows_are_kept_with_file_line_and_reason(tmp_path: Path, write: Write) -> None:
    path = write(
        "pool.jsonl",
        [{"messages": QA}, '{"messages": [', {"prompt": "q", "completion": "a"}, "[1]", "",
         {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": QA, "id": 7}],
    )  # fmt: skip
    encoded = encode(tmp_path, path)
    assert encoded.table(["row", "id", "source", "line"]).to_pylist() == [
        {"row": 0, "id": "pool-1", "source": "pool", "line": 1},
        {"row": 1, "id": "7", "source": "pool", "line": 7},
    ]
    found = rejections(tmp_path)
    assert [r["line"] for r in found] == [2, 3, 4, 6]
    assert {r["file"] for r in found} == {str(path)}
    assert found[0]["reason"].startswith("not valid JSON: ")
    assert "the file's schema is messages" in found[1]["reason"]
    assert found[2]["reason"] == "expected a JSON object, found list"
    assert found[3]["reason"].startswith("unknown role 'wizard'")


def test_strict_stops_at_the_first_bad_row(tmp_path: Path, write: Write) -> None:
    path = write("pool.jsonl", [{"messages": QA}, {"messages": QA[:1]}])
    with pytest.raises(DataError, match=r"pool\.jsonl:2: no assistant turn"):
        encode(tmp_path, path, strict=True)


def test_json_lines_come_back_byte_for_byte(tmp_path: Path) -> None:
    lines = [
        json.dumps({"messages": QA}).encode().replace(b": ", b" :  "),
        json.dumps({"messages": QA, "note": "é😀"}, ensure_ascii=False).encode() + b"\r",
        json.dumps({"messages": QA, "note": "\u2028"}, ensure_ascii=False).encode(),
    ]
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    encoded = encode(tmp_path, path)
    raw = encoded.take([2, 0, 1, 0], ["raw"])["raw"].to_pylist()
    assert raw == [lines[2], lines[0], lines[1], lines[0]]  # the mark is the file's, not the row's
    assert encoded.conversations([0], {}) == [QA]


def test_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"what {i}", "completion": f"0{i}", "id": str(i)} for i in range(3)]
    table, text = pa.Table.from_pylist(rows), "".join(json.dumps(r) + "\n" for r in rows)
    pq.write_table(table, tmp_path / "a.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "b.csv")
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.json").write_text(text)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    datasets.Dataset(table).save_to_disk(tmp_path / "f")
    (tmp_path / "g").mkdir()
    pq.write_table(table, tmp_path / "g" / "train.parquet")
    (tmp_path / "h.tsv").write_text("prompt\tcompletion\tid\n" + "".join(
        "\t".join(row.values()) + "\n" for row in rows))  # fmt: skip
    names = ["a.parquet", "b.csv", "c.json", "d.json", "e.jsonl.gz", "f", "g", "h.tsv"]
    encoded = encode(tmp_path, *(tmp_path / name for name in names))
    assert encoded.table(["id"])["id"].to_pylist() == ["0", "1", "2"] * len(names)
    sources = encoded.table(["source"])["source"].to_pylist()
    expected = ["train" if name == "g" else name[0] for name in names]  # a file of its folder
    assert sources == [name for name in expected for _ in range(3)]
    conversations = encoded.conversations(range(len(encoded)), {})
    assert [c[1]["content"] for c in conversations] == ["00", "01", "02"] * len(names)


def test_names_with_dots_stay_whole(tmp_path: Path, write: Write) -> None:
    names = ["v1.0-math.jsonl", "v1.0-code.jsonl"]
    encoded = encode(tmp_path, *(write(name, [{"messages": QA}]) for name in names))
    assert encoded.table(["id"])["id"].to_pylist() == ["v1.0-math-1", "v1.0-code-1"]
    assert resolve(["org/name/config:split"])[0].stem == "name"


def test_odd_json_is_rejected_row_by_row(tmp_path: Path, write: Write) -> None:
    half = '{"prompt": "\\ud83d", "completion": "a"}'
    rows = [{"prompt": "q", "completion": "a"}, half, '{"prompt": ' + "9" * 5000 + "}"]
    path = write("pool.jsonl", rows)
    assert len(encode(tmp_path, path)) == 1
    assert [r["line"] for r in rejections(tmp_path)] == [2, 3]
    (tmp_path / "array.json").write_text(f"[{json.dumps(rows[0])}, {half}]")
    assert len(encode(tmp_path, tmp_path / "array.json")) == 1
    assert [r["line"] for r in rejections(tmp_path)] == [2]


def test_an_empty_turn_beside_others_is_no_fault() -> None:
    empty = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}, *QA]
    for template in (tiny_models.CHATML, MARKED):
        [encoded] = Encoder(tiny_models.tokenizer(template), 99).encode([empty])  # type: ignore[list-item]
        assert isinstance(encoded, Encoded)
        text = tiny_models.tokenizer().decode(encoded.input_ids[encoded.supervised])
        assert text == "<|im_end|>one two<|im_end|>"


def test_globs_are_sorted(tmp_path: Path, write: Write) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write(name, [{"messages": QA}])
    encoded = encode(tmp_path, tmp_path / "*.jsonl")
    assert encoded.table(["id"])["id"].to_pylist() == ["a-1", "b-1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "pool is empty: no row in"),
        ("{}\n", r"no known schema; expected messages; prompt \+ completion"),
        ('{"messages": []}\n' * 2, "pool has no usable row in .*2 × messages is empty"),
        ('{"question": "q", "answer": "a"}\n', r"--set data.columns.prompt=question.*question, an"),
    ],
)
def test_files_without_anything_usable(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        encode(tmp_path, path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.jsonl", "no such file: 'missing.jsonl'"),
        ("data/missing.jsonl", "no such file: 'data/missing.jsonl'"),
        ("missing*.jsonl", "no file matches 'missing\\*.jsonl'"),
        (__file__, "is of an unknown kind; expected a folder or one of .jsonl"),
    ],
)
def test_missing_and_unknown_files(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve([spec])


def test_a_hub_id_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read 'nobody/nothing:test'"):
        encode(tmp_path, "nobody/nothing:test")


def test_a_mapped_column_that_is_not_there_is_named(tmp_path: Path, write: Write) -> None:
    path = write("pool.jsonl", [{"question": "q", "answer": "a"}])
    columns = {"prompt": "qestion", "completion": "answer"}
    with pytest.raises(
        DataError,
        match=r"question, answer; no column 'qestion' as mapped by data\.columns\.prompt; did you "
        r"mean 'question'\?",
    ):
        encode(tmp_path, path, columns=columns)


def test_csv_rows_of_another_width_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"NA\n",007\nx\na,b,c\n')
    assert encode(tmp_path, path).conversations([0], {})[0][1]["content"] == "007"
    assert [(r["line"], r["reason"]) for r in rejections(tmp_path)] == [
        (4, "expected 2 fields as in the header, found 1"),
        (5, "expected 2 fields as in the header, found 3"),
    ]  # fmt: skip


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1,")
    with pytest.raises(DataError, match=r"a\.json is not valid JSON"):
        encode(tmp_path, tmp_path / "a.json")
    (tmp_path / "a.jsonl.gz").write_text("no gzip")
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.gz"):
        encode(tmp_path, tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        encode(tmp_path, tmp_path / "a.parquet")


CONVERSATION = [
    {"role": "system", "content": "of the"},
    *QA,
    {"role": "user", "content": "  what\n\nis "},
    {"role": "assistant", "content": "    and\n  the answer"},
    {"role": "user", "content": "and"},
]


def supervised_text(template: str | None) -> tuple[list[str], Encoded]:
    tokenizer = tiny_models.tokenizer(template)
    [encoded] = Encoder(tokenizer, 200).encode([CONVERSATION])  # type: ignore[list-item]
    assert isinstance(encoded, Encoded)
    edges = np.flatnonzero(np.diff(encoded.supervised, prepend=False, append=False))
    spans = [encoded.input_ids[a:b] for a, b in edges.reshape(-1, 2)]
    return [tokenizer.decode(span) for span in spans], encoded


def test_only_assistant_turns_with_their_end_are_supervised() -> None:
    expected = ["one two<|im_end|>", "    and\n  the answer<|im_end|>"]
    marked, by_markers = supervised_text(MARKED)
    prefixes, by_prefixes = supervised_text(tiny_models.CHATML)
    assert marked == prefixes == expected
    np.testing.assert_array_equal(by_markers.input_ids, by_prefixes.input_ids)
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)["input_ids"]
    assert by_prefixes.input_ids.tolist() == ids


def test_a_template_that_ends_turns_by_white_space_alone() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert supervised_text(template)[0] == [" one two\n", "     and\n  the answer\n"]


def test_without_a_template_the_tulu_format_is_used(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(tiny_models.tokenizer(None), 200)
    assert "has no chat template; using the Tulu format" in caplog.text
    assert encoder.template == TULU
    spans, encoded = supervised_text(None)
    assert spans == ["one two<|im_end|>", "    and\n  the answer<|im_end|>"]
    text = tiny_models.tokenizer().decode(encoded.input_ids)
    assert text.startswith(
        "<|system|>\nof the\n<|user|>\nthe what\n<|assistant|>\none two<|im_end|>"
    )


def test_a_template_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(MARKED)
    assert Encoder(tiny_models.tokenizer(None), 200, str(path)).template == MARKED
    with pytest.raises(DataError, match="cannot read the chat template"):
        Encoder(tiny_models.tokenizer(), 200, str(tmp_path / "none.jinja"))


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ' ' }}{% if m['role'] == 'assistant' and not "
        "loop.last %}{{ '(left out)' }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    encoder = Encoder(tiny_models.tokenizer(template), 200)
    assert isinstance(encoder.encode([QA])[0], Encoded)  # type: ignore[list-item]
    with pytest.raises(DataError, match="the chat template rewrites earlier turns"):
        encoder.encode([CONVERSATION])  # type: ignore[list-item]


def test_a_template_that_refuses_a_conversation_rejects_the_row() -> None:
    template = "{{ raise_exception('no system turn, please') }}"
    [reason] = Encoder(tiny_models.tokenizer(template), 9).encode([QA])  # type: ignore[list-item]
    assert str(reason) == "the chat template refuses it: no system turn, please"


def test_truncation() -> None:
    tokenizer = tiny_models.tokenizer()
    [whole] = Encoder(tokenizer, 200).encode([QA])  # type: ignore[list-item]
    assert isinstance(whole, Encoded)
    first = int(whole.supervised.argmax())
    [cut] = Encoder(tokenizer, first + 1).encode([QA])  # type: ignore[list-item]
    assert isinstance(cut, Encoded)
    assert (len(cut.input_ids), cut.supervised.sum(), cut.truncated) == (first + 1, 1, True)
    [reason] = Encoder(tokenizer, first).encode([QA])  # type: ignore[list-item]
    assert str(reason) == (
        f"nothing supervised is left after truncation to {first} tokens "
        f"(the first assistant token is number {first + 1})"
    )


def test_encoded_examples_come_back_in_any_order(tmp_path: Path, write: Write) -> None:
    rows = [{"prompt": "what " * (i % 7), "completion": f"{i}", "id": i} for i in range(2500)]
    encoded = encode(tmp_path, write("pool.jsonl", rows))
    wanted = [2400, 3, 1023, 1024, 3]
    [ids, table] = encoded.examples(wanted), encoded.take(wanted, ["id", "num_tokens"])
    assert table["id"].to_pylist() == [str(i) for i in wanted]
    assert [len(e.input_ids) for e in ids] == table["num_tokens"].to_pylist()
    assert tiny_models.tokenizer().decode(ids[0].input_ids[ids[0].supervised]) == "2400<|im_end|>"
    assert len(encoded.take([], ["id"])) == 0
