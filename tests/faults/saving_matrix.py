"""Every way of writing, with every fault of the disk at every change it makes.

    python saving_matrix.py FOLDER [EVERY]      with the environment of faulty_disk.environment()

Works in FOLDER, kills at every change, takes every EVERY-th one for the other faults, and prints one JSON
object: what was tried how often, what was found wrong, and how often in writers that are meant to fail.
"""

from __future__ import annotations

import errno
import functools
import gc
import hashlib
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import faulty_disk
import torch
from faulty_disk import CHANGES, CHMOD, GROWS, MKDIR, REMOVE, RENAME, RESIZE, SYNC, WRITE, Fault
from torch import nn

from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.checkpoint import snapshot
from lorakit.checkpoint.peft_format import fill_adapter, save_adapter
from lorakit.checkpoint.state import State
from lorakit.errors import StorageError
from lorakit.files import tidy, write_text
from lorakit.training.folder import RunFolder

KILLS = {
    "SIGKILL": Fault("kill"),
    "power cut": Fault("cut"),
    "power cut, renames undone": Fault("cut back"),
}
ERRORS = {
    "ENOSPC from there on": Fault("fail on", GROWS, error=errno.ENOSPC),
    "EDQUOT from there on": Fault("fail on", GROWS, error=errno.EDQUOT),
    "EFBIG once": Fault("fail", WRITE | RESIZE, error=errno.EFBIG),
    "EIO at write once": Fault("fail", WRITE, error=errno.EIO),
    "EIO at fsync once": Fault("fail", SYNC, error=errno.EIO),
    "EIO from there on": Fault("fail on", CHANGES, error=errno.EIO),
    "EROFS from there on": Fault("fail on", CHANGES, error=errno.EROFS),
    "EACCES once": Fault("fail", RENAME | MKDIR | CHMOD | REMOVE, error=errno.EACCES),
}
LEAVES_REMAINS = RENAME | REMOVE | SYNC  # faults of these may keep the process from cleaning up at once


@dataclass(frozen=True)
class Scenario:
    """Something that a run writes: ``prepare`` makes what is there before, ``work`` does it."""

    prepare: Callable[[Path], None]
    work: Callable[[Path], object]


def state(step: int, salt: int = 0) -> State:
    """A state of its own for each step."""
    random = torch.Generator().manual_seed(1000 * salt + step)
    tensors = {
        "model/layer.lora_A": torch.randn(4, 8, generator=random),
        "optimizer/layer.lora_A/exp_avg": torch.randn(4, 8, generator=random),
        "rng/0/cpu": torch.randint(0, 256, (64,), generator=random, dtype=torch.uint8),
    }
    return State(tensors, {"progress": {"step": step, "loss": 0.1 * step + salt}})


def adapter(step: int, salt: int = 0) -> nn.Module:
    """A model with an adapter of its own for each step."""
    torch.manual_seed(1000 * salt + step)
    model = add_lora_to_model(nn.Sequential(nn.Linear(6, 5)), r=2)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.adapter("default").lora_B)
    return model


@functools.cache
def made(step: int, salt: int) -> tuple[State, nn.Module]:
    """The same objects for every case."""
    return state(step, salt), adapter(step, salt)


def save(run: Path, step: int, salt: int = 0) -> None:
    """A checkpoint as a run writes it."""
    kept, model = made(step, salt)

    def fill(stage: Path) -> None:
        fill_adapter(model, stage, texts={"chat_template.jinja": "{{ messages }}"})
        (stage / "config.resolved.yaml").write_text(f"seed: {salt}\n")

    snapshot.write_snapshot(RunFolder(run).checkpoint(step), kept, fill)


def saved(*steps: int) -> Callable[[Path], None]:
    """A run's folder with these checkpoints."""

    def prepare(run: Path) -> None:
        for step in steps:
            save(run, step)

    return prepare


def save_and_prune(run: Path) -> None:
    """As the loop does after each checkpoint: the first one is the best or what was resumed from."""
    save(run, 4)
    snapshot.prune(run, 2, [run / "checkpoint-1"])


def used(run: Path) -> None:
    """The folder of an earlier run."""
    saved(1, 2)(run)
    save_adapter(made(2, 0)[1], run / "adapter")
    for name in ("metrics.jsonl", "run.json"):
        (run / name).write_text("{}\n")


def killed(run: Path) -> None:
    """What a process leaves that is killed between two renames and while it deletes."""
    saved(1, 2)(run)
    (run / "checkpoint-2").rename(run / ".lorakit-old-01234567-checkpoint-2")
    shutil.copytree(run / "checkpoint-1", run / ".lorakit-new-01234567-checkpoint-2")
    (run / ".lorakit-new-89abcdef-run.json").write_text("{")


SCENARIOS = {
    "a checkpoint": Scenario(saved(1), lambda run: save(run, 2)),
    "a checkpoint in the place of one": Scenario(saved(1, 2), lambda run: save(run, 2, salt=1)),
    "a checkpoint, and pruning": Scenario(saved(1, 2, 3), save_and_prune),
    "an adapter in the place of one": Scenario(used, lambda run: save_adapter(made(3, 0)[1], run / "adapter")),
    "a file in the place of one": Scenario(used, lambda run: write_text(run / "run.json", '{"a": 1}' * 9)),
    "a run over an earlier one": Scenario(used, lambda run: RunFolder(run).begin("seed: 1\n", overwrite=True)),
    "going back": Scenario(saved(1, 2, 3), lambda run: snapshot.set_aside(run, 1)),
    "clearing away": Scenario(killed, tidy),
}


def without_flushing(run: Path) -> None:
    """Renamed into place, but the power may go before the bytes are on the disk."""
    shutil.rmtree(run / "checkpoint-2", ignore_errors=True)
    aside = run / ".lorakit-new-01234567-checkpoint-2"
    aside.mkdir()
    for path in (run / "checkpoint-1").iterdir():
        (aside / path.name).write_bytes(path.read_bytes())
    aside.rename(run / "checkpoint-2")


def file_by_file(run: Path) -> None:
    """Each file is whole, the folder is not."""
    (run / "checkpoint-2").mkdir(exist_ok=True)
    for path in (run / "checkpoint-1").iterdir():
        write_text(run / "checkpoint-2" / path.name, path.name)


# What must not pass: else the matrix proves nothing.
CARELESS = {
    "without flushing": Scenario(saved(1), without_flushing),
    "file by file": Scenario(saved(1), file_by_file),
}


class Matrix:
    """Tries one scenario with one fault after the other, and tells what is wrong afterwards."""

    def __init__(self, folder: Path, scenario: Scenario) -> None:
        self.scenario = scenario
        self.folder, self.run, self.template = folder, folder / "run", folder / "before"
        self.told = folder / "told"
        self.template.mkdir(parents=True)
        scenario.prepare(self.template)
        self.fresh()
        with RunFolder(self.run).lock():
            self.before = self.seen()
        self.work()
        self.after = self.seen()

    def fresh(self) -> None:
        """The folder as it was before anything happened."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.template, self.run)
        self.told.unlink(missing_ok=True)

    def work(self) -> None:
        """What is tried."""
        self.scenario.work(self.run)

    def seen(self) -> dict[str, str]:
        """Each entry of the folder, with a digest of all that is in it."""
        found = {}
        for entry in self.run.iterdir():
            digest = hashlib.sha256()
            for path in [entry, *sorted(entry.rglob("*"))]:
                digest.update(f"{path.relative_to(self.run)}\n".encode())
                digest.update(path.read_bytes() if path.is_file() else b"")
            found[entry.name] = digest.hexdigest()
        found.pop("run.lock", None)
        return found

    @functools.cache  # noqa: B019 - a matrix lives as long as the program
    def changes(self, kinds: int) -> int:
        """How many changes of these kinds the work makes."""
        self.fresh()
        outcome = faulty_disk.run(self.folder, Fault("count", kinds), self.work)
        assert outcome.end == "None", outcome
        assert self.seen() == self.after
        return outcome.changes

    def kill(self, fault: Fault, *, done: bool) -> Iterator[str]:
        """The process dies in the middle of the work, or when it is done; the next start finds all well."""

        def work() -> None:
            self.work()
            self.told.touch()  # one more change, at which to die

        self.fresh()
        outcome = faulty_disk.run(self.folder, fault, work)
        if outcome.end != "killed by SIGKILL":
            yield f"the process was not killed but {outcome.end}"
        yield from self._look(recovered=False)
        yield from self._next_start(done=done)

    def fail(self, fault: Fault) -> Iterator[str]:
        """The process goes on; what it tells is true, and a second attempt on a good disk succeeds."""

        def work() -> None:
            try:
                self.work()
            except StorageError:
                faulty_disk.disarm()
                self.told.write_text(" ".join(self.seen()))
                self.work()
                raise
            faulty_disk.disarm()
            self.told.write_text(" ".join(self.seen()))

        self.fresh()
        outcome = faulty_disk.run(self.folder, fault, work)
        if outcome.end not in {"None", "StorageError"}:
            yield f"the process ended with {outcome.end}"
            return
        remains = [name for name in self.told.read_text().split() if name.startswith(".lorakit-")]
        if remains and not fault.kinds & LEAVES_REMAINS:
            yield f"{remains} was left there"
        yield from self._next_start(done=True)

    def _next_start(self, *, done: bool) -> Iterator[str]:
        with RunFolder(self.run).lock():
            yield from self._look(recovered=True)
        if done and self.seen() != self.after:
            yield f"what was done did not last: there is {sorted(self.seen())}"
        self.work()
        if self.seen() != self.after:
            yield f"after another attempt there is {sorted(self.seen())}"

    def _look(self, *, recovered: bool) -> Iterator[str]:
        """Every entry is what it was before or what it is after the work; nothing else can be seen."""
        found = self.seen()
        for name in self.before.keys() | self.after.keys() | found.keys():
            known = {self.before.get(name), self.after.get(name)}
            hidden = not recovered and (name.startswith(".lorakit-") or name not in found)
            if found.get(name) not in known and not hidden:
                yield f"{name} is neither what it was nor what it was to be"
        if recovered and snapshot.snapshots(self.run):
            good, damage = snapshot.newest_good(self.run)
            if good is None or damage:
                yield f"newest good checkpoint {good}, {damage}"


def tried(
    folder: Path, scenarios: Mapping[str, Scenario], faults: Mapping[str, Fault], every: int
) -> Iterator[tuple[str, str, list[str]]]:
    """Scenario, fault, and what was wrong, of each case."""
    for number, (name, scenario) in enumerate(scenarios.items()):
        matrix = Matrix(folder / str(number), scenario)
        for shift, (kind, fault) in enumerate(faults.items(), start=number):
            step = 1 if kind == "SIGKILL" else every
            count = matrix.changes(fault.kinds)
            places = {*range(1 + shift % step, count + 1, step)} | ({count + 1} if kind in KILLS else set())
            for at in sorted(places):
                case = replace(fault, at=at)
                wrong = matrix.kill(case, done=at > count) if kind in KILLS else matrix.fail(case)
                yield name, kind, [f"change {at}: {each}" for each in wrong]


def main() -> None:
    """Try everything and print what came out."""
    gc.freeze()  # a forked process that looks through all objects copies all of their memory
    gc.disable()
    folder, every = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    wrong = []
    for name, kind, found in tried(folder, SCENARIOS, KILLS | ERRORS, every):
        counts[name][kind] += 1
        wrong += [f"{name}: {kind}: {each}" for each in found]
    caught = dict.fromkeys(CARELESS, 0)
    for name, _, found in tried(folder / "careless", CARELESS, KILLS, every):
        caught[name] += bool(found)
    print(json.dumps({"counts": counts, "wrong": wrong, "caught": caught}))


if __name__ == "__main__":
    main()
