"""Runs of ``lorakit train`` for a tiny model, with every fault of the disk at every change that they make.

    python training_matrix.py FOLDER [EVERY [RANDOM]]      with the environment of `environment(FOLDER)`

A run is killed, loses power, gets a signal or an error from the disk at every EVERY-th change that it makes to
its folder and the cache, and is killed at RANDOM random times. Then ``lorakit train --resume auto`` on a good
disk must end as the run that nothing happened to: adapter, optimizer, generators and metrics bit for bit,
nothing damaged, nothing left over. Runs are processes forked from this one, which has imported everything: that
saves hours. Prints one JSON object: what was tried how often, and what was found wrong.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty_disk
from faulty_disk import CHANGES, GROWS, RESIZE, SYNC, WRITE, Fault

STEPS, SAVE_STEPS, LIMIT = 7, 2, 2
CLOCK = {"seconds", "data_seconds", "since", "tokens_per_second", "memory_gb"}
OWED = {"evaluated", "best", "best_step", "waited"}  # of progress, by an evaluation

# What happens at each change, and how the run may end.
KILLED, REFUSED, STOPPED = {"killed by SIGKILL"}, {"0", "6"}, {"0", "143", "killed by SIGTERM"}
TRIED = {
    "SIGKILL": (Fault("kill"), KILLED),
    "power cut": (Fault("cut"), KILLED),
    "power cut, renames undone": (Fault("cut back"), KILLED),
    "SIGTERM": (Fault("signal", error=signal.SIGTERM), STOPPED),
    "ENOSPC from there on": (Fault("fail on", GROWS, error=errno.ENOSPC), REFUSED),
    "ENOSPC once": (Fault("fail", GROWS, error=errno.ENOSPC), REFUSED),
    "EFBIG once": (Fault("fail", WRITE | RESIZE, error=errno.EFBIG), REFUSED),
    "EIO once": (Fault("fail", WRITE | SYNC, error=errno.EIO), REFUSED),
    "EROFS from there on": (Fault("fail on", CHANGES, error=errno.EROFS), REFUSED),
}


def environment(folder: Path) -> dict[str, str]:
    """The environment for this program: a disk that can fail, with a cache on it."""
    return faulty_disk.environment(folder) | {
        "LORAKIT_CACHE": f"{folder}/disk/cache", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
        "LORAKIT_NATIVE": "0",  # else each run would compile onto the failing disk
    }  # fmt: skip


class Runs:
    """Runs of one configuration in one folder, each from scratch."""

    def __init__(self, folder: Path) -> None:
        self.disk, self.log = folder / "disk", folder / "log"
        self.run = self.disk / "run"
        self.config = configuration(folder)
        self.fresh()
        before = time.monotonic()
        assert self.train() == 0, self.log.read_text()
        self.seconds = time.monotonic() - before
        self.expected_checkpoints = self.checkpoints()
        self.expected_adapter, self.expected_metrics = self.adapter(), self.metrics()
        self.expected_names = {path.name for path in self.run.iterdir()} - self.expected_checkpoints.keys()

    def fresh(self) -> None:
        """An empty disk."""
        shutil.rmtree(self.disk, ignore_errors=True)
        self.disk.mkdir()

    def program(self) -> int:
        """``lorakit train``; its output goes to the log."""
        import torch

        from lorakit.cli.main import main

        torch.set_num_threads(1)
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        return main(["train", str(self.config), f"output_dir={self.run}", "--resume", "auto"])

    def start(self) -> int:
        """The run as a process; its number."""
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = self.program()
            finally:
                sys.stderr.flush()
                os._exit(status)
        return child

    def train(self) -> int:
        """A whole run on a good disk; its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(), 0)[1])

    def with_fault(self, fault: Fault) -> faulty_disk.Outcome:
        """A whole run on a disk that has a fault; its end is the exit code or ``killed by …``."""
        return faulty_disk.run(self.disk, fault, self.program)

    def changes(self, kinds: int) -> int:
        """How many changes of these kinds a run makes."""
        self.fresh()
        outcome = self.with_fault(Fault("count", kinds))
        assert outcome.end == "0", self.log.read_text()
        return outcome.changes

    def checkpoints(self) -> dict[str, Any]:
        """What each checkpoint keeps."""
        from lorakit.checkpoint.snapshot import read_snapshot, snapshots

        found = {}
        for path in snapshots(self.run):
            state = read_snapshot(path)
            tensors = {name: tensor.numpy(force=True).tobytes() for name, tensor in state.tensors.items()}
            found[path.name] = (tensors, without(state.values, CLOCK | {"metrics_bytes", "environment"}))
        return found

    def metrics(self) -> list[Any]:
        """All that was measured, notes left out."""
        from lorakit.log import read_metrics

        events = read_metrics(self.run / "metrics.jsonl")
        return [without(event, CLOCK) for event in events if event["event"] != "note"]

    def adapter(self) -> dict[str, bytes]:
        """The files of the result, without the card, which tells the time."""
        return {path.name: path.read_bytes() for path in self.run.glob("adapter/*") if path.suffix != ".md"}

    def finish(self, *, refused: bool) -> Iterator[str]:
        """Take the run up again on a good disk, and tell what is not as it should be.

        If the disk ``refused`` a checkpoint before the last, the run went on without it.
        """
        from lorakit.errors import ModelError

        try:
            self.checkpoints()
        except ModelError as error:
            yield f"a checkpoint is damaged: {error}"
        status = self.train()
        if status:
            yield f"taken up again, it ended with {status}: {self.log.read_text()[-500:]}"
            return
        found, (last, *_) = self.checkpoints(), self.expected_checkpoints
        for name, kept in self.expected_checkpoints.items():
            same = name in found and agrees(found[name], kept)
            if not same and (name in found or name == last or not refused):
                yield f"{name} is another one" if name in found else f"there is no {name}"
        if len(found) > LIMIT + 1:  # the one that was resumed from stays
            yield f"too many checkpoints: {sorted(found)}"
        if self.adapter() != self.expected_adapter:
            yield "another adapter"
        if self.metrics() != self.expected_metrics:
            yield "other metrics"
        names = {path.name for path in self.run.iterdir()} - found.keys() - {"metrics.superseded.jsonl"}
        if names != self.expected_names:
            yield f"the folder holds {sorted(names)}"
        left = [path.name for path in self.disk.rglob(".lorakit-*")]
        if left:
            yield f"left over: {left}"


def agrees(found: Any, kept: Any) -> bool:
    """Whether two checkpoints are the same; a stop in the evaluation of one leaves that to be made again."""
    (tensors, values), (expected_tensors, expected) = found, kept
    if values["progress"]["evaluated"] < expected["progress"]["evaluated"]:
        values, expected = without(values, OWED), without(expected, OWED)
    return bool(tensors == expected_tensors and values == expected)


def main() -> None:
    """Try everything and print what came out."""
    import lorakit.training.recipe  # noqa: F401 - so that the forked processes need not

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("every", type=int, nargs="?", default=1)
    parser.add_argument("random", type=int, nargs="?", default=0)
    options = parser.parse_args()
    runs = Runs(options.folder)
    counts: Counter[str] = Counter()
    wrong = []
    for kind, name, found in itertools.chain(
        faults(runs, options.every), kills_at_random(runs, options.random)
    ):
        counts[kind] += 1
        wrong += [f"{kind}: {name}: {each}" for each in found]
    print(json.dumps({"counts": counts, "wrong": wrong, "seconds_of_a_run": round(runs.seconds, 2)}))


def faults(runs: Runs, every: int) -> Iterator[tuple[str, str, list[str]]]:
    """Each fault at every so many changes: its kind, its place, what was wrong."""
    for shift, (kind, (fault, ends)) in enumerate(TRIED.items()):
        count = runs.changes(fault.kinds)
        first = shift * count // len(TRIED) % every  # few of each kind are spread over the run
        for at in range(1 + first, count + 1, every):
            runs.fresh()
            end = runs.with_fault(replace(fault, at=at)).end
            found = [] if end in ends else [f"the run ended with {end}: {runs.log.read_text()[-500:]}"]
            tell(kind, f"change {at} of {count}", found := found + list(runs.finish(refused=ends is REFUSED)))
            yield kind, f"change {at} of {count}", found


def kills_at_random(runs: Runs, count: int) -> Iterator[tuple[str, str, list[str]]]:
    """SIGKILL at times drawn evenly from the length of a run."""
    moments = random.Random(0)
    for _ in range(count):
        after = moments.uniform(0, runs.seconds)
        runs.fresh()
        child = runs.start()
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tell("SIGKILL at a random time", f"after {after:.3f} s", found := list(runs.finish(refused=False)))
        yield "SIGKILL at a random time", f"after {after:.3f} s", found


def tell(kind: str, place: str, found: list[str]) -> None:
    """Progress, for who waits."""
    print(f"{kind}, {place}: {'; '.join(found) or 'as if nothing had happened'}", file=sys.stderr, flush=True)


def without(value: Any, keys: set[str]) -> Any:
    """JSON values without these keys, on any level."""
    if isinstance(value, dict):
        return {key: without(each, keys) for key, each in value.items() if key not in keys}
    return [without(each, keys) for each in value] if isinstance(value, list) else value


def configuration(folder: Path) -> Path:
    """A tiny model, a few rows, and a run that uses what has a state: dropout, accumulation, evaluation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=letters | {"<end>": len(letters)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    )
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": f"say {'ab'[i % 2] * (i % 5)}", "output": str(i)} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""\
model_name_or_path: {folder}/model
template: default
dataset: rows.jsonl
eval_dataset: rows.jsonl
eval_strategy: steps
eval_steps: 3
output_dir: run
bf16: false
lora_rank: 2
lora_dropout: 0.2
learning_rate: 0.01
max_steps: {STEPS}
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
logging_steps: 1
save_steps: {SAVE_STEPS}
save_total_limit: {LIMIT}
preprocessing_num_workers: 1
plot_loss: false
"""
    )
    return folder / "config.yaml"


if __name__ == "__main__":
    main()
