"""Work on a stream of chunks with several processes: in order, in bounded memory, and never orphaned.

Every worker has a pipe of its own and one chunk at a time. A worker whose parent is gone reads the end of its
pipe and leaves; a worker that dies is noticed at once, with the rows it was working on.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from lorakit.errors import LorakitError, MemoryLimitError

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 4  # finished chunks that may wait for an earlier one, per worker


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items; the last may be shorter."""
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def in_order(
    work: Callable[[list[Item]], Result], parts: Iterable[list[Item]], workers: int
) -> Iterator[Result]:
    """``work`` of every part, in the order of the parts.

    Workers are forked, so that ``work`` may be any function and what it holds is shared. Where forking is not
    safe (macOS, Windows), and when there are too few parts to be worth a process, this process works alone.

    Raises:
        MemoryLimitError: a worker was killed.
    """
    rest = iter(parts)
    first = list(itertools.islice(rest, 2 * workers))
    everything = itertools.chain(first, rest)
    if workers == 1 or len(first) < 2 * workers or sys.platform != "linux":
        yield from map(work, everything)
        return
    with _crew(work, workers) as crew:
        yield from _collect(crew, everything, limit=_AHEAD * workers)


@contextlib.contextmanager
def _crew(work: Callable[[list[Item]], Result], workers: int) -> Iterator[dict[Connection, ForkProcess]]:
    context = multiprocessing.get_context("fork")
    crew: dict[Connection, ForkProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs, [ours, *crew]), daemon=True)
            process.start()
            theirs.close()
            crew[ours] = process
        yield crew
    finally:
        for pipe, process in crew.items():
            pipe.close()
            process.terminate()
            process.join()


def _serve(work: Callable[[list[Item]], Result], pipe: Connection, foreign: Sequence[Connection]) -> None:
    """The life of a worker. Ends of pipes that are not its own would keep it from noticing its parent's end."""
    # What the parent had loaded is not looked through again and again; garbage is collected after each part.
    gc.freeze()
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in foreign:
        end.close()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            part = pipe.recv()
            answer: Result | LorakitError
            try:
                answer = work(part)
            except LorakitError as error:
                answer = error
            pipe.send(answer)
            gc.collect()


def _collect(crew: dict[Connection, ForkProcess], parts: Iterator[list[Item]], limit: int) -> Iterator[Result]:
    """Feed idle workers, take what is finished, give it out in order; at most ``limit`` results wait."""
    numbered = enumerate(parts)
    ahead = next(numbered, None)  # read while the workers are busy, so that none waits for it
    idle = list(crew)
    busy: dict[Connection, tuple[int, range]] = {}  # pipe -> number of the part, its rows
    done: dict[int, Result] = {}
    rows = given = 0
    while True:
        while idle and len(done) < limit and ahead is not None:
            number, part = ahead
            pipe = idle.pop()
            busy[pipe] = (number, range(rows, rows := rows + len(part)))
            with contextlib.suppress(BrokenPipeError):  # noticed below, where the place is known
                pipe.send(part)
            ahead = next(numbered, None)
        if not busy:
            return
        ready = wait(list(busy))
        for pipe in [pipe for pipe in busy if pipe in ready]:
            number, place = busy.pop(pipe)
            done[number] = _receive(pipe, crew[pipe], place)
            idle.append(pipe)
        while given in done:
            yield done.pop(given)
            given += 1


def _receive(pipe: Connection, process: ForkProcess, rows: range) -> Any:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        raise MemoryLimitError(
            f"a process that encoded rows ended with code {process.exitcode}, most likely for want of memory",
            place=f"rows {rows.start + 1} to {rows.stop}",
            remedy="set preprocessing_num_workers: 1",
        ) from error
    if isinstance(answer, LorakitError):
        raise answer
    return answer
