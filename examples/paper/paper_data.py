"""Pool, targets and held-out examples of the paper, from the archive that LESS published.

`princeton-nlp/less_data` on the Hub is one file, less-data.zip: the four sets of the pool and the
three benchmarks as LESS (Xia et al., 2024, arXiv 2402.04333) prepared them and GIST (Min et al.,
2026, arXiv 2602.18584) took them over. Targets are in LESS's prompt format; `cue` is the beginning
of an assistant's turn whose loss does not count (see tulu.jinja).
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import yaml

from gradsift.errors import DataError
from gradsift.runs.atomic import write_atomically

REPOSITORY, ARCHIVE = "princeton-nlp/less_data", "less-data.zip"
POOL = ("flan_v2", "cot", "dolly", "oasst1")
EXPECTED = {"mmlu": (57, 5), "bbh": (27, 3), "tydiqa": (9, 1)}
"""Tasks of each benchmark, and target examples of each task."""
HELD_OUT = {"mmlu": 5, "bbh": 10, "tydiqa": 30}
"""Held-out examples of each task at most."""
Row = dict[str, Any]


def download() -> Path:
    """Fetch the archive from the Hub, or find it where it was fetched before.

    Raises:
        DataError: If it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except OSError as error:
        raise DataError(
            f"cannot fetch {ARCHIVE} of {REPOSITORY} from the Hub: {error}\nWithout a network, "
            "bring the file from elsewhere and name it with --archive FILE"
        ) from None


def paths(benchmark: str, folder: Path) -> tuple[Path, Path, Path]:
    """Return where `write_data` writes the pool, a folder, and target and held-out examples."""
    names = ("pool", f"{benchmark}.jsonl", f"{benchmark}_held_out.jsonl")
    pool, target, held_out = (folder / name for name in names)
    return pool, target, held_out


def write_data(archive: Path, benchmark: str, folder: Path) -> None:
    """Write pool, target and held-out examples; what is there already stays as it is.

    Raises:
        DataError: If the archive cannot be read, or does not hold what is expected.
    """
    pool, target, held_out = paths(benchmark, folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ZipFile(archive) as opened:
            if not (target.exists() and held_out.exists()):
                rows, others = _READERS[benchmark](opened)
                check_counts(rows, benchmark)
                _write(others, held_out)
                _write(rows, target)
            if not pool.exists():
                _extract_pool(opened, pool)
    except (OSError, BadZipFile) as error:
        raise DataError(f"cannot read the archive {archive}: {error}") from None


def check_counts(rows: Sequence[Row], benchmark: str) -> None:
    """Make sure that there are as many target examples as in the paper.

    Raises:
        DataError: If there are not.
    """
    tasks, each = EXPECTED[benchmark]
    found = {row["task"] for row in rows}
    if (len(rows), len(found)) != (tasks * each, tasks):
        raise DataError(
            f"{benchmark}: expected {tasks * each} target examples of {tasks} tasks, found "
            f"{len(rows)} of {len(found)}"
        )


def example(task: str, question: str, cue: str, answer: str) -> Row:
    """Return a row of the `messages` schema; the loss counts in the answer alone."""
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "cue": cue, "content": answer},
    ]
    return {"task": task, "messages": turns}


def mmlu_rows(questions: Mapping[str, Sequence[Sequence[str]]], most: int) -> list[Row]:
    """Return the first `most` questions of each subject; each is question, choices, letter."""
    rows = []
    for subject, own in sorted(questions.items()):
        about = "".join(f" {word}" for word in subject.split("_"))  # so that two spaces stand there
        head = f"The following are multiple choice questions (with answers) about {about}."
        for question, *choices, letter in own[:most]:
            listed = "".join(f"\n{name}. {c}" for name, c in zip("ABCD", choices, strict=True))
            asked = f"{head}\n\n{question}{listed}\nAnswer:"
            rows.append(example(subject, asked, "The answer is:", f" {letter}"))
    return rows


def bbh_rows(prompts: Mapping[str, str]) -> list[Row]:
    """Return each worked example of each task, with the task's other two before it.

    A task's prompt is its description and three worked examples, with an empty line between them.
    """
    rows = []
    for task, prompt in prompts.items():
        *description, first, second, third = prompt.strip().split("\n\n")
        worked = [first, second, third]
        for number, own in enumerate(worked):
            question, _, answer = own.partition("\nA:")
            others = worked[:number] + worked[number + 1 :]
            rows.append(example(task, "\n\n".join([*description, *others, question]), "A:", answer))
    return rows


def bbh_held_out(
    prompts: Mapping[str, str], questions: Mapping[str, Sequence[Mapping[str, str]]], most: int
) -> list[Row]:
    """Return the first `most` questions of each task after its prompt: their answers alone.

    The benchmark has no reasoning for them, so that the answer is asked for at once.
    """
    return [
        example(
            task,
            f"{prompt.strip()}\n\nQ: {own['input']}",
            "A: So the answer is",
            f" {own['target']}",
        )
        for task, prompt in prompts.items()
        for own in questions[task][:most]
    ]


def tydiqa_rows(examples: Mapping[str, Sequence[Mapping[str, Any]]], most: int) -> list[Row]:
    """Return the first `most` examples of each language, with their passages."""
    prompts = yaml.safe_load((Path(__file__).parent / "tydiqa_prompts.yaml").read_text("utf-8"))
    rows = []
    for language, own in examples.items():
        instruction, passage, asked, cue = prompts[language]
        for one in own[:most]:
            # nothing between instruction and passage, as in LESS
            question = f"{instruction}{passage} {one['context']}\n{asked} {one['question']}"
            rows.append(example(language, question, cue, f" {one['answers'][0]['text']}"))
    return rows


def by_language(squad: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the examples of a file in SQuAD's format, by the language that ids begin with."""
    found: dict[str, list[Row]] = {}
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            for one in paragraph["qas"]:
                language = one["id"].partition("-")[0]
                own = {key: one[key] for key in ("question", "answers")}
                found.setdefault(language, []).append(own | {"context": paragraph["context"]})
    return found


def _mmlu(archive: ZipFile) -> tuple[list[Row], list[Row]]:
    splits = {
        split: {
            subject: list(csv.reader(io.StringIO(_read(archive, name), newline="")))
            for subject, name in _find(archive, rf"eval/mmlu/{split}/(\w+)_{split}\.csv").items()
        }
        for split in ("dev", "test")
    }
    each = EXPECTED["mmlu"][1]
    return mmlu_rows(splits["dev"], each), mmlu_rows(splits["test"], HELD_OUT["mmlu"])


def _bbh(archive: ZipFile) -> tuple[list[Row], list[Row]]:
    [name] = _find(archive, r"eval/bbh/(?:.*/)?(bbh-three-shot)\.json").values()
    prompts = json.loads(_read(archive, name))
    found = _find(archive, r"eval/bbh/(?:.*/)?(\w+)\.json")
    if missing := prompts.keys() - found.keys():
        raise DataError(
            f"{archive.filename}: no questions of the tasks {', '.join(sorted(missing))}"
        )
    questions = {task: json.loads(_read(archive, found[task]))["examples"] for task in prompts}
    return bbh_rows(prompts), bbh_held_out(prompts, questions, HELD_OUT["bbh"])


def _tydiqa(archive: ZipFile) -> tuple[list[Row], list[Row]]:
    [one_shot] = _find(archive, r"eval/tydiqa/(?:.*/)?(tydiqa-one-shot)\.json").values()
    [dev] = _find(archive, r"eval/tydiqa/(?:test/)?(tydiqa-goldp-v1\.1-dev)\.json").values()
    target = json.loads(_read(archive, one_shot))
    held_out = by_language(json.loads(_read(archive, dev)))
    return tydiqa_rows(target, EXPECTED["tydiqa"][1]), tydiqa_rows(held_out, HELD_OUT["tydiqa"])


_READERS: dict[str, Callable[[ZipFile], tuple[list[Row], list[Row]]]] = {
    "mmlu": _mmlu,
    "bbh": _bbh,
    "tydiqa": _tydiqa,
}


def _find(archive: ZipFile, pattern: str) -> dict[str, str]:
    """Return the files whose paths end as the pattern says, by its group.

    Raises:
        DataError: If there is none.
    """
    found = {}
    for name in archive.namelist():
        match = re.search(rf"(?:^|/){pattern}$", name)
        if match and not name.startswith("__MACOSX/"):
            found[match[1]] = name
    if not found:
        raise DataError(
            f"{archive.filename} holds no {pattern}: is it {ARCHIVE} of {REPOSITORY} on the Hub?"
        )
    return found


def _read(archive: ZipFile, name: str) -> str:
    return archive.read(name).decode("utf-8")


def _extract_pool(archive: ZipFile, folder: Path) -> None:
    """Write the four sets byte for byte, each under its name; the folder is there when all are."""
    unfinished = folder.with_name("pool.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name in POOL:
        [inside] = _find(archive, rf"train/processed/{name}/({name}_data)\.jsonl").values()
        with archive.open(inside) as source, (unfinished / f"{name}.jsonl").open("wb") as copy:
            shutil.copyfileobj(source, copy)
    unfinished.rename(folder)


def _write(rows: Iterable[Row], path: Path) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, "".join(lines).encode())
