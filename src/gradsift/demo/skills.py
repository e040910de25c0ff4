"""Ten small skills, each a question and its answer made from a seeded random generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_WORDS = [
    first + middle + last
    for first in "ba co di fu ga lo mi ne pa ro".split()
    for middle in "ben der lin mor pul".split()
    for last in "ka to si met nol".split()
]
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jun Kai Lea Max Nia Otto".split()
_CITIES = "Oslo Lima Cairo Delhi Paris Quito Rome Sofia Tokyo Accra".split()
_COLUMNS = "name age city price stock title year".split()
_TABLES = "users orders books shops trains".split()
_GOOD = "warm fresh friendly bright superb".split()
_BAD = "cold stale rude dull awful".split()
_THINGS = "soup staff room film service coffee".split()


def _addition(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(10, 500), rng.randrange(10, 500)
    return f"What is {a} plus {b}?", f"{a} + {b} = {a + b}"


def _sorting(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(100), rng.randrange(4, 7))
    listed = " ".join(map(str, numbers))
    return f"Put these numbers in order: {listed}", " ".join(map(str, sorted(numbers)))


def _spelling(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(_WORDS, 2)
    return f"Spell backwards: {' '.join(words)}", " ".join("-".join(word[::-1]) for word in words)


def _record(rng: random.Random) -> tuple[str, str]:
    name, age, city = rng.choice(_NAMES), rng.randrange(18, 90), rng.choice(_CITIES)
    answer = f'{{"name": "{name}", "age": {age}, "city": "{city}"}}'
    return f"Turn into JSON: {name} is {age} years old and lives in {city}.", answer


def _weekday(rng: random.Random) -> tuple[str, str]:
    start, steps, sign = rng.randrange(7), rng.randrange(1, 40), rng.choice((1, -1))
    when, day = "after" if sign > 0 else "before", _DAYS[(start + sign * steps) % 7]
    return f"Which day is {steps} days {when} {_DAYS[start]}?", f"It is {day}."


def _logic(rng: random.Random) -> tuple[str, str]:
    a, b, c, d = (rng.random() < 0.5 for _ in range(4))
    first, second, third = (rng.choice(("and", "or")) for _ in range(3))
    left = (a and b) if first == "and" else (a or b)
    right = (c and d) if third == "and" else (c or d)
    whole = (left and right) if second == "and" else (left or right)
    question = f"Evaluate: ({a} {first} {b}) {second} ({c} {third} {d})"
    return question, f"{left} {second} {right} is {whole}."


def _pig_latin(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(_WORDS, 2)
    said = " ".join(f"{word[1:]}{word[0]}ay" for word in words)
    return f"Say in Pig Latin: {' '.join(words)}", said


def _sql(rng: random.Random) -> tuple[str, str]:
    column, other, table = *rng.sample(_COLUMNS, 2), rng.choice(_TABLES)
    sign, word = rng.choice(((">", "above"), ("<", "below"), ("=", "equal to")))
    value = rng.randrange(1, 100)
    answer = f"SELECT {column} FROM {table} WHERE {other} {sign} {value};"
    return f"Query the {column} of all {table} with {other} {word} {value}.", answer


def _review(rng: random.Random) -> tuple[str, str]:
    good, (one, other) = rng.random() < 0.5, rng.sample(_THINGS, 2)
    first, second = rng.sample(_GOOD if good else _BAD, 2)
    question = f"Good or bad? The {one} was {first} and the {other} was {second}."
    return question, "good" if good else "bad"


def _units(rng: random.Random) -> tuple[str, str]:
    amount = rng.randrange(2, 300)
    name, factor, small = rng.choice(
        (("metres", 100, "centimetres"), ("hours", 60, "minutes"), ("dozens", 12, "pieces"))
    )
    return (
        f"How many {small} are {amount} {name}?",
        f"{amount} {name} are {amount * factor} {small}.",
    )


SKILLS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "addition": _addition,
    "sorting": _sorting,
    "spelling": _spelling,
    "record": _record,
    "weekday": _weekday,
    "logic": _logic,
    "pig-latin": _pig_latin,
    "sql": _sql,
    "review": _review,
    "units": _units,
}


def make_examples(skill: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` examples of one skill, different ones as far as the skill allows.

    >>> make_examples("weekday", 1, seed=0)[0]["messages"][1]["content"]
    'It is Tuesday.'
    """
    rng = random.Random(f"{skill} {seed}")
    made: dict[tuple[str, str], None] = {}
    for _ in range(50 * count):
        made.setdefault(SKILLS[skill](rng))
        if len(made) == count:
            break
    return [
        {
            "id": f"{skill}-{seed}-{number}",
            "source": skill,
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
        }
        for number, (question, answer) in enumerate(made)
    ]
