"""What the configuration says about data, as the data layer takes it: data sets, samples, template, policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.config.resolve import Resolved
from lorakit.data.mix import Mix, split_rows
from lorakit.data.reading import Counts, DataSet, SampleStream, find_sets
from lorakit.data.rendering import Policy
from lorakit.data.sample import Sample
from lorakit.data.templates import Template, find_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunData:
    """Samples to train on and held out; ``training`` counts what was read for the former (and split off)."""

    samples: list[Sample]
    held_out: list[Sample]
    training: Counts


def read_data(settings: Resolved) -> RunData:
    """Read the data sets; with ``val_size`` the held-out rows are drawn from those to train on.

    Raises:
        DataError: naming the file, the row and the rule it breaks.
    """
    stream = training_stream(settings, data_sets(settings, settings.dataset))
    samples = list(stream)
    if settings.val_size:
        kept, held_out = split_rows(samples, settings.val_size, settings.seed)
        return RunData(kept, held_out, stream.counts)
    return RunData(samples, held_out_samples(settings), stream.counts)


def data_sets(settings: Resolved, names: Iterable[str]) -> list[DataSet]:
    """What the names of ``dataset`` or ``eval_dataset`` mean."""
    return find_sets(list(names), dataset_dir=Path(settings.dataset_dir), streaming=settings.streaming)


def training_stream(settings: Resolved, sets: list[DataSet]) -> SampleStream:
    """The samples to train on, in the order of the mix."""
    return _stream(settings, sets, Mix(settings.mix_strategy, settings.interleave_probs))


def held_out_samples(settings: Resolved) -> list[Sample]:
    """The samples of ``eval_dataset``, if there is one."""
    if not settings.eval_dataset:
        return []
    return list(_stream(settings, data_sets(settings, settings.eval_dataset), Mix()))


def template_of(settings: Resolved, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that the configuration chooses."""
    return find_template(
        tokenizer,
        settings.template,
        default_system=settings.default_system,
        enable_thinking=settings.enable_thinking,
        tool_format=settings.tool_format,
    )


def policy_of(settings: Resolved) -> Policy:
    """What carries loss, and what becomes of long rows."""
    return Policy(settings.cutoff_len, settings.train_on_prompt, settings.mask_history, settings.long_rows)


def _stream(settings: Resolved, sets: list[DataSet], mix: Mix) -> SampleStream:
    return SampleStream(
        sets, settings.max_samples, settings.on_bad_row, settings.max_bad_rows, mix, settings.seed
    )
