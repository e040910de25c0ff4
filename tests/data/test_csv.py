"""CSV files with broken quotes, bytes and widths: each costs its own record and nothing else."""

from __future__ import annotations

import bz2
import csv
import gzip
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from gradsift.data import csv_records
from gradsift.data.csv_records import read_csv
from gradsift.errors import DataError

HEADER = b"prompt,completion\n"
DOUBLED = ' a quote inside a quoted field is written twice: ""'
UNCLOSED = f"a quoted field is not closed before the end of the file;{DOUBLED}"
AFTER = f"other text follows the closing quote of a field;{DOUBLED}"


def read(tmp_path: Path, content: bytes, name: str = "a.csv") -> list[tuple[int, object]]:
    """Return each row's line with its values, or with what is wrong with it."""
    (tmp_path / name).write_bytes(content)
    rows = read_csv(str(tmp_path / name))
    return [(row.line, row.problem or tuple((row.value or {}).values())) for row in rows]


def width(found: int, expected: int = 2) -> str:
    return f"expected {expected} fields as in the header, found {found}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # what is no fault: line breaks, separators and doubled quotes in quotes, blank lines, CRLF
        (b'"a\n\nb","x, ""y"""\n\nc,d\n', [(2, ("a\n\nb", 'x, "y"')), (6, ("c", "d"))]),
        (b'"a\r\nb",x\r\nc,d\r\n', [(2, ("a\r\nb", "x")), (4, ("c", "d"))]),
        (b'a,b\rc,"d\re"', [(2, ("a", "b")), (3, ("c", "d\re"))]),
        (b'5" pipe,b "c" d\n', [(2, ('5" pipe', 'b "c" d'))]),
        (b'a,""\n"",b\n', [(2, ("a", "")), (3, ("", "b"))]),
        # a quote that is never closed
        (b'a,"b\nc,d\ne,f\n', [(2, UNCLOSED), (3, ("c", "d")), (4, ("e", "f"))]),
        (b'a,b\nc,"d', [(2, ("a", "b")), (3, UNCLOSED)]),
        # one that would be closed by the next quoted field, which is whole by itself
        (b'a,"b\nc,d\ne,"f, g"\nh,i\n',
         [(2, AFTER), (3, ("c", "d")), (4, ("e", "f, g")), (5, ("h", "i"))]),
        (b'a,"b\nc,"d\ne,f\n', [(2, AFTER), (3, UNCLOSED), (4, ("e", "f"))]),
        (b'a,"b\nc,""\nd,"e\nf"\ng,h\n',
         [(2, AFTER), (3, ("c", "")), (4, ("d", "e\nf")), (6, ("g", "h"))]),
        # one that is closed by a field that begins with the separator: too many fields
        (b'a,"b\nc,d\ne,",f"\ng,h\n',
         [(2, width(3)), (3, ("c", "d")), (4, ("e", ",f")), (5, ("g", "h"))]),
        # quotes in a field that are not doubled
        (b'a,"say "yes" now"\nc,d\n', [(2, AFTER), (3, ("c", "d"))]),
        (b'a,"say \\"yes\\""\nc,d\n', [(2, AFTER), (3, ("c", "d"))]),
        # another number of fields, all lines of the record at once
        (b'a\nb,c,d\ne,f\n', [(2, width(1)), (3, width(3)), (4, ("e", "f"))]),
        (b'a,b,"c\nd, e\nf"\ng,h\n', [(2, width(3)), (5, ("g", "h"))]),
        # bytes that are no UTF-8, in the text and in a record of several lines
        (b'a,b\n\xe9,c\nd,e\n', [(2, ("a", "b")), (3, "not valid UTF-8 at byte 0"),
                                 (4, ("d", "e"))]),
        (b'a,"b\n\xff\nc"\nd,e\n', [(2, "not valid UTF-8 at byte 5"), (5, ("d", "e"))]),
        (b'a,\xed\xa0\x80\nd,e\n', [(2, "not valid UTF-8 at byte 2"), (3, ("d", "e"))]),
    ],
)  # fmt: skip
def test_a_broken_record_costs_itself(
    tmp_path: Path, content: bytes, expected: list[tuple[int, object]]
) -> None:
    assert read(tmp_path, HEADER + content) == expected
    assert read(tmp_path, b"\xef\xbb\xbf" + HEADER + content) == expected
    assert read(tmp_path, gzip.compress(HEADER + content), "a.csv.gz") == expected
    assert read(tmp_path, bz2.compress(HEADER + content), "a.csv.bz2") == expected
    tabs = (HEADER + content).replace(b",", b"\t")
    in_tabs = [
        (line, tuple(v.replace(",", "\t") for v in f) if isinstance(f, tuple) else f)
        for line, f in expected
    ]
    assert read(tmp_path, tabs, "a.tsv") == in_tabs


def test_whole_files_are_read_as_the_standard_library_reads_them(tmp_path: Path) -> None:
    texts = [
        "x",
        "",
        'a "b" c',
        '"',
        '""',
        "a,b",
        "line\nbreak",
        "\r\n",
        '\n\n"\n,',
        "é😀",
        ' "x" ',
    ]
    rows = [(one, other) for one in texts for other in texts]
    with (tmp_path / "w.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *rows])
    found = [tuple((row.value or {}).values()) for row in read_csv(str(tmp_path / "w.csv"))]
    assert found == rows


def test_of_many_broken_records_every_whole_one_is_kept(tmp_path: Path) -> None:
    good = [b"p%d,c%d\n" % (i, i) for i in range(3000)]
    stray = [line if i % 3 else line.replace(b",", b',"') for i, line in enumerate(good)]
    found = read(tmp_path, HEADER + b"".join(stray))
    assert [line for line, _ in found] == [*range(2, 3002)]
    problems = {line: f for line, f in found if isinstance(f, str)}
    assert [*problems] == [i + 2 for i in range(0, 3000, 3)]


def test_a_quote_is_looked_for_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_records, "LONGEST_RECORD", 1000)
    (tmp_path / "a.csv").write_bytes(HEADER + b'a,"b\n' + b"c,d\n" * 10_000)
    tracemalloc.start()
    found = Counter(row.problem for row in read_csv(str(tmp_path / "a.csv")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == {
        f"a quoted field is not closed within 1,000 characters;{DOUBLED}": 1,
        None: 10_000,
    }
    assert peak < 250_000  # its lines would take 500 kB
    within = f'a,"{"b" * 400}\n{"b" * 400}\n"\n'.encode()
    assert [line for line, _ in read(tmp_path, HEADER + within)] == [2]
    long = f'a,"{"b" * 5000}"\n'.encode()  # closed in its own line
    assert read(tmp_path, HEADER + long) == [(2, ("a", "b" * 5000))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'prompt,"completion\na,b\n', r"a\.csv:1: the header cannot be read: a quoted field is"),
        (b"\xff\xfep\x00r\x00", r"a\.csv:1: the header cannot be read: not valid UTF-8 at byte 0"),
        (b"\n\nprompt,prompt\na,b\n", r"a\.csv has the column 'prompt' twice; rename or remove"),
    ],
)
def test_a_header_that_cannot_be_read_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)
