"""Work on a stream of items: in their order, a few at a time, by several processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from gradsift.errors import DataError, RunError
from gradsift.executors.base import FEW, in_order
from gradsift.executors.local import Local


def test_only_a_few_items_are_taken_ahead_of_their_results() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    for number, found in enumerate(in_order(lambda item: item, lambda item: item, items(), 4)):
        assert found == number
        assert len(taken) <= number + 4


def where(item: int) -> tuple[int, int]:
    return item, os.getpid()


def fail(at: int, item: int) -> int:
    if item == at:
        raise DataError(f"item {item}")
    return item


def die(at: int, item: int) -> int:
    if item == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.slow
def test_processes_of_this_machine_keep_the_order() -> None:
    found = [*Local().stream(where, range(40))]
    assert [item for item, _ in found] == [*range(40)]
    assert {process for _, process in found[:FEW]} == {os.getpid()}
    if (os.cpu_count() or 1) > 1:
        assert os.getpid() not in {process for _, process in found[FEW:]}


@pytest.mark.slow
def test_a_fault_in_another_process_is_the_same_as_here() -> None:
    for at in (2, 20):
        with pytest.raises(DataError, match=f"item {at}"):
            [*Local().stream(partial(fail, at), range(40))]

    def broken() -> Iterator[int]:
        yield from range(20)
        raise DataError("the file ends")

    with pytest.raises(DataError, match="the file ends"):
        [*Local().stream(partial(fail, -1), broken())]


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) == 1, reason="one processor: all is done here")
def test_a_process_that_dies_is_told_and_the_next_stream_works() -> None:
    with pytest.raises(RunError, match="died, perhaps because memory ran out"):
        [*Local().stream(partial(die, 20), range(40))]
    stream = Local().stream(where, range(1000))
    assert [next(stream)[0] for _ in range(12)] == [*range(12)]
    stream.close()  # broken off, as `--strict` does: no warning, no process left at work
    assert len([*Local().stream(where, range(20))]) == 20
