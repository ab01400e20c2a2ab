"""The largest batch that fits into memory, found by making whole training steps.

A step is everything that training does: forward pass, loss, backward pass, and an update with AdamW's state in
place. Sizes are doubled until one does not fit, then the gap is halved.

On a CPU every try runs in a fork of this process. Its highest point of memory starts anew, while that of one
process never comes down; a try that takes too much is ended, by us or by the kernel, and this process goes on;
and nothing that a try does can change anything here.

On a GPU the tries run in this process, torch's allocator tells the highest point, and all that a step changes
is put back. This was never run on a GPU; the putting back is tested on a CPU.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import hardware
from lorakit.data.order import Grouping
from lorakit.data.packing import best_fit
from lorakit.errors import MemoryLimitError, ModelError, UsageError
from lorakit.log import logger

_GLANCE = 0.02  # seconds between two looks at what a fork takes
_RESERVE = 0.1  # of the free memory, left alone unless a limit is given
_KEPT = 1 / 3  # of what a step takes on a CPU: freed blocks that the allocator keeps in the course of a run
_LONGEST = 2048  # tokens of a row, unless told


def find_optimal_batch_size(
    model: nn.Module,
    max_memory_gb: float | None = None,
    *,
    make_batch: Callable[[int], Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    seq_len: int | None = None,
    max_batch_size: int = 64,
    poll: Callable[[], None] = lambda: None,
) -> int:
    """The largest batch size, up to ``max_batch_size``, with which training ``model`` stays within memory.

    Model, gradients, random number generators and optimizers are left bit for bit as they were.

    Args:
        model: with the parameters trainable that will be trained.
        max_memory_gb: gigabytes (10⁹ bytes) for the whole process: its resident memory, which training then
            keeps to within a tenth, or what it reserves on the GPU. If left out, what it has and nine tenths of
            what is free.
        make_batch: a batch of so many rows, the longest there will be. For a language model of transformers,
            random tokens if left out.
        loss_fn: the loss of model and batch. If left out, the ``loss`` of what the model returns for the batch
            (a mapping of arguments, a tuple of them, or one), or the mean square of a tensor that it returns.
        seq_len: length of rows of random tokens; the most that the model takes, up to 2048, if left out.
        max_batch_size: the largest size to try.
        poll: called between tries, on a CPU many times a second during them; may raise to stop.

    Raises:
        UsageError: nothing is trainable, a step fails for another reason than memory, or an argument is wrong.
        MemoryLimitError: not even one row fits.
    """
    if max_batch_size < 1:
        raise UsageError(f"max_batch_size is {max_batch_size}", remedy="give at least 1")
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("nothing in the model is trainable", remedy="attach an adapter, or unfreeze it")
    step = _Step(model, make_batch or _random_tokens(model, seq_len), loss_fn or _own_loss)
    device = next(model.parameters()).device
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # loads what it needs here, not in every try
    limit = _free(device) if max_memory_gb is None else int(max_memory_gb * 1e9)

    def fits(rows: int) -> bool:
        poll()
        peak = _peak_on_gpu(step, rows) if device.type == "cuda" else _peak_in_fork(step, rows, limit, poll)
        taken = "too much memory" if peak is None else f"{peak / 1e9:.2f} GB"
        logger.info("a training step of %d takes %s", rows, taken)
        return peak is not None and peak <= limit

    best = _largest(fits, max_batch_size)
    if not best:
        raise MemoryLimitError(
            f"training on a single row takes more than {limit / 1e9:.2f} GB",
            remedy="shorten the rows (cutoff_len), turn on gradient_checkpointing, or take a smaller model",
        )
    return best


def longest_rows(lengths: Sequence[int], grouping: Grouping, size: int) -> list[int]:
    """The rows of the micro-batch of ``size`` that takes the most memory; if rows are few, they repeat.

    With packing these are the rows of ``size`` bins: attention takes more in long rows than in many short ones.
    """
    if grouping.capacity is None:
        groups = [[row] for row in sorted(range(len(lengths)), key=lambda row: -lengths[row])]
    else:
        groups = best_fit(lengths, grouping.capacity)
    return list(chain(*islice(chain.from_iterable([groups] * size), size)))


def same_update(rows: int, most: int) -> tuple[int, int]:
    """The size of micro-batches, up to ``most``, and how many of them make an update of exactly ``rows``."""
    size = max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)
    return size, rows // size


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that fits, if every smaller one does; 0 if none."""
    good, size = 0, 1
    while good < most and fits(size):
        good, size = size, min(2 * size, most)
    bad = size if good < most else most + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


@dataclass(frozen=True)
class _Step:
    """A training step of so many rows."""

    model: nn.Module
    make_batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]

    def __call__(self, rows: int) -> None:
        batch = self.make_batch(rows)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # from the second step on, its state is there during the passes
        optimizer.zero_grad(set_to_none=True)
        self.model.train()
        self.loss(self.model, batch).backward()
        optimizer.step()


def _peak_in_fork(step: _Step, rows: int, limit: int, poll: Callable[[], None]) -> int | None:
    """The highest point of memory in bytes; None if it was too much."""
    if sys.platform != "linux":
        raise UsageError(
            "memory is measured in a forked process, which is safe on Linux only",
            remedy="choose per_device_train_batch_size yourself",
        )
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(step, rows, theirs))
    process.start()
    theirs.close()
    try:
        while not ours.poll(_GLANCE):
            poll()
            if hardware.resident(process.pid) > limit:
                return None
        peak, files, trouble = ours.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:  # by the kernel, which had no memory left
            return None
        trouble = f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        ours.close()
    if trouble is not None:
        raise UsageError(
            f"a training step of {rows} fails: {trouble}", remedy="make_batch and loss_fn must fit the model"
        )
    if peak is None:
        return None
    # A fork has what mirrors files only where it looks: what this process has of it is missing there.
    peak += max(0, hardware.resident_files() - files)
    return int(peak + _KEPT * max(0, peak - hardware.resident()))


def _try(step: _Step, rows: int, pipe: Connection) -> None:
    """In the fork: send the highest point of memory and what mirrors files, or None; and other trouble."""
    # On a thread of its own, which gets a new team of OpenMP threads: the old one did not survive the fork.
    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(step, rows).exception()
    if error is None:
        pipe.send((hardware.resident_peak(), hardware.resident_files(), None))
    elif hardware.is_out_of_memory(error):
        pipe.send((None, None, None))
    else:
        pipe.send((None, None, f"{type(error).__name__}: {error}"))


def _peak_on_gpu(step: _Step, rows: int) -> int | None:
    """The most that was reserved, in bytes; None if that was too much."""
    gc.collect()
    torch.cuda.empty_cache()
    device = next(step.model.parameters()).device
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with _untouched(step.model):
            step(rows)
    except RuntimeError as error:
        if not hardware.is_out_of_memory(error):
            raise
        return None
    return int(torch.cuda.max_memory_reserved(device))


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Undo what the block does to the model and to the random number generators. The copies are on the CPU."""
    training = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    values = [p for p in model.parameters() if p.requires_grad] + list(model.buffers())
    copies = [value.detach().to("cpu", copy=True) for value in values]
    generator = random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(generator)
        with torch.no_grad():
            for value, copy in zip(values, copies, strict=True):
                value.copy_(copy)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode


def _free(device: torch.device) -> int:
    """What this process has, and what is free of the device's memory but for a reserve."""
    if device.type == "cuda":
        own, free = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
    else:
        own = hardware.resident()
        free = hardware.resident_limit() - own
    return own + int((1 - _RESERVE) * free)


def _random_tokens(model: nn.Module, seq_len: int | None) -> Callable[[int], dict[str, Any]]:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"what a batch of {type(model).__name__} looks like is not known",
            remedy="give make_batch, a function from the number of rows to a batch",
        )
    config = model.config.get_text_config().to_dict()
    length = seq_len or min(config.get("max_position_embeddings") or _LONGEST, _LONGEST)

    def make(rows: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config["vocab_size"], (rows, length), generator=generator).to(model.device)
        return {"input_ids": ids, "labels": ids, "use_cache": False}

    return make


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    if isinstance(output, Tensor):
        return output.square().mean()
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return output["loss"]
    raise ModelError(f"{type(model).__name__} returns no loss", remedy="give loss_fn")
