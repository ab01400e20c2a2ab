"""A polite stop: the first signal is noted, the second acts as usual, SIGUSR1 asks for a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from lorakit.training.signals import Stopped, StopRequest

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in ALL}
    yield
    assert {s: signal.getsignal(s) for s in before} == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(signum: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.signum is None
        stop.poll()
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(Stopped) as caught:
            stop.poll()
        assert caught.value.signum == signum


def test_the_second_one_acts_as_usual() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_sigusr1_is_told_once_each_time() -> None:
    with StopRequest() as stop:
        assert not stop.take_save()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.take_save()
            assert not stop.take_save()
        assert stop.signum is None


def test_no_handler_of_errors_swallows_a_stop() -> None:
    assert not issubclass(Stopped, Exception)


def test_outside_the_main_thread_nothing_is_changed() -> None:
    seen: list[object] = []

    def use() -> None:
        with StopRequest() as stop:
            seen.extend([stop.signum, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [None, signal.getsignal(signal.SIGINT)]


def test_a_second_sigterm_kills() -> None:
    program = (
        "import os, signal\n"
        "from lorakit.training.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "15\n", "")
