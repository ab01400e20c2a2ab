"""``lorakit init``: a first configuration for a model, a data file and this machine, with its reasons."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.show import emit
from lorakit.config.problems import printable
from lorakit.config.yaml_text import scalar
from lorakit.planning.advise import TASKS, Task

if TYPE_CHECKING:
    from lorakit.config.presets import Preset
    from lorakit.data.estimate import Estimate
    from lorakit.modelinfo.facts import ModelFacts
    from lorakit.planning.advise import Advice
    from lorakit.planning.setup import Setup

_MODEL = "smollm2-135m-instruct"
_NO_DATA = "rows.jsonl"


@click.command()
@click.option("--model", default=_MODEL, show_default=True, help="Hub id, local folder, GGUF file or alias.")
@click.option("--data", "data", multiple=True, help="File, folder or pattern of training rows; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default="sft.yaml", show_default=True,
              help="The file to write; one that is there is left alone.")  # fmt: skip
@click.option("--preset", help="Begin with named settings (`lorakit presets`).")
@click.option("--task", type=click.Choice(TASKS), help="What is taught; it decides the rank.")
@click.option("--fit", "limit", metavar="SIZE", help="Memory to use, such as 16GB; this machine's if left out.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def init(
    model: str,
    data: tuple[str, ...],
    out: Path,
    preset: str | None,
    task: Task | None,
    limit: str | None,
    as_json: bool,
) -> None:
    r"""Write a commented configuration for a model, training rows and this machine.

    \b
    lorakit init --data rows.jsonl
    lorakit init --model Qwen/Qwen3-0.6B --data rows.jsonl --out qwen.yaml
    """
    from lorakit import hardware
    from lorakit.config.presets import find_preset
    from lorakit.errors import ConflictError
    from lorakit.files import write_text
    from lorakit.log import logger
    from lorakit.planning.fit import parse_size

    if out.exists():
        raise ConflictError(
            f"{out} is there already, and is left as it is", remedy="give another name with --out"
        )
    room = parse_size(limit) if limit else hardware.memory_limit()
    start = begin(model, data, find_preset(preset) if preset else None, task, room)
    write_text(out, to_yaml(start, out, room))
    if not start.fits:
        logger.warning("warning: it does not fit into %.1f GB; `lorakit plan %s` tells more", room / 1e9, out)
    advice = [asdict(each) for each in start.advice]
    done = {"written": str(out), "model": model, "dataset": start.data, "preset": preset, "advice": advice}
    emit(done if as_json else f"wrote {out}; next: lorakit plan {out}, then lorakit train {out}", as_json)


@dataclass(frozen=True)
class Start:
    """What a first configuration says.

    Attributes:
        facts: the model.
        data: names of the training rows.
        rows: what they are like, where they are known.
        preset: what it begins with.
        advice: keys of its own.
        fits: into the memory that there is.
    """

    facts: ModelFacts
    data: tuple[str, ...]
    rows: Estimate | None
    preset: Preset | None
    advice: tuple[Advice, ...]
    fits: bool


def begin(model: str, data: Sequence[str], preset: Preset | None, task: Task | None, room: int) -> Start:
    """Gather what is known of model, rows and memory, and what it advises.

    Raises:
        ModelError, DataError: one of them is not there.
        TargetError: the preset names layers that the model does not have.
    """
    from lorakit.data.estimate import estimate
    from lorakit.modelinfo.find import find_facts, local_folder
    from lorakit.planning import advise

    facts, folder = find_facts(model), local_folder(model)
    tokenizer = folder / "tokenizer.json" if folder else None
    rows = estimate(data, tokenizer if tokenizer and tokenizer.is_file() else None) if data else None
    given = preset.values if preset else {}
    advice = [advise.rank_advice(facts.parameters, task)] if task or "lora_rank" not in given else []
    if rows:
        advice.append(advise.length_advice(rows.longest, rows.most, facts.context))
        advice.append(advise.epochs_advice(rows.rows))
        advice += advise.held_out_advice(rows.rows)
    setup = _setup(preset, advice)
    changes, fitting = advise.memory_advice(facts, setup, room)
    changed = {each.key for each in changes}
    advice = [each for each in advice if each.key not in changed and _says_more(each, given)]
    advice += [each for each in changes if given.get(each.key) != each.value]
    if "learning_rate" not in given:
        advice += [advise.rate_advice(facts.parameters, (fitting or setup).bits), *advise.COURSE]
    return Start(facts, tuple(data) or (_NO_DATA,), rows, preset, tuple(advice), fitting is not None)


def _says_more(advice: Advice, given: Mapping[str, Any]) -> bool:
    """What a preset says holds; but a task was asked for, and rows may be shorter than the preset's."""
    if advice.key == "cutoff_len":
        return bool(advice.value < given.get(advice.key, math.inf))
    return advice.key not in given or advice.key == "lora_rank"


def _setup(preset: Preset | None, advice: Sequence[Advice]) -> Setup:
    """The setup of preset and advice, on this machine; without a preset, with all rows of an update at once."""
    from lorakit import hardware
    from lorakit.config.load import load_mapping
    from lorakit.config.resolve import resolve
    from lorakit.planning.advise import BATCH
    from lorakit.planning.setup import setup_of

    values: dict[str, Any] = {"model_name_or_path": _MODEL, "dataset": _NO_DATA, "output_dir": "run"}
    values |= {"preset": preset.name} if preset else {}
    if not preset or "per_device_train_batch_size" not in preset.values:
        values |= {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    values |= {each.key: each.value for each in advice if not preset or _says_more(each, preset.values)}
    return replace(setup_of(resolve(load_mapping(values, Path.cwd()))), device=hardware.device())


def to_yaml(start: Start, out: Path, room: int) -> str:
    """The configuration with its reasons, for the file ``out``."""
    return "\n".join(_lines(start, out, room)) + "\n"


def _lines(start: Start, out: Path, room: int) -> Iterator[str]:
    yield from _about(start, room)
    yield ""
    if _is_table_name(start.facts):
        yield "# A name that `lorakit plan` knows. To train, write the model's hub id (owner/name) or folder."
    yield f"model_name_or_path: {scalar(_from(out, start.facts.name))}"
    names = tuple(_from(out, name) for name in start.data)
    yield f"dataset: {scalar(names[0] if len(names) == 1 else names)}"
    yield f"output_dir: runs/{scalar(out.stem)}"
    if start.preset:
        yield f"\n# What the preset brings; a key written here wins over it.\npreset: {start.preset.name}"
        yield from (f"#   {key}: {scalar(value)}" for key, value in start.preset.values.items())
    for each in start.advice:
        yield f"\n# {printable(each.reason)} [{each.source}]\n{each.key}: {scalar(each.value)}"


def _about(start: Start, room: int) -> Iterator[str]:
    from lorakit import hardware
    from lorakit.config.presets import GUIDES

    facts, rows = start.facts, start.rows
    size = f"{facts.parameters / 1e6:,.0f} million parameters"
    yield f"# {printable(facts.name)}: {size} ({printable(facts.source)})"
    if rows:
        how = "" if rows.counted else " (estimated from bytes)"
        yield f"# {rows.rows:,} rows of {rows.mean:.0f} tokens on average, at most {rows.longest}{how}"
    else:
        yield "# No rows yet: name them under dataset, or run `lorakit init --data FILE` again."
    yield f"# {room / 1e9:.1f} GB of memory on a {hardware.device()}"
    if not start.fits:
        yield "# It does not fit there, whatever is changed: take a smaller model, or more memory."
    used = sorted({name for each in start.advice for name in GUIDES if name in each.source})
    yield from (f"# [{name}]: lines of the {GUIDES[name]}; see docs/presets.md" for name in used)


def _is_table_name(facts: ModelFacts) -> bool:
    """Known by its size alone: neither a path nor a hub id nor the alias."""
    return "/" not in facts.name and facts.name != _MODEL and not Path(facts.name).exists()


def _from(out: Path, name: str) -> str:
    """A relative path that is there, as seen from the file's folder; any other name as it is."""
    if Path(name).is_absolute() or not Path(name).exists():
        return name
    return os.path.relpath(name, out.parent)
