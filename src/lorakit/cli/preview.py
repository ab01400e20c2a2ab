"""``lorakit preview``: what training would see."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.show import emit
from lorakit.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.text import Text

    from lorakit.config.resolve import Resolved
    from lorakit.data.encode import Encoded
    from lorakit.data.preview import Piece, ShownRow
    from lorakit.data.sample import Sample
    from lorakit.data.survey import Bar, Survey
    from lorakit.models.sources import ModelSource

_DEFAULT_ROWS = 2
_CHUNK = 512  # rows that are encoded together
_MOST_PIECES = 600  # of one row on a terminal; the page holds all of it
_BAR = 40
_SPECIAL = "magenta"
_STYLES = {"prompt": "", "trained": "bold green", "cut": "strike red", "padding": "dim", "gap": "dim italic"}
_MARKS = {
    "prompt": ("", ""),
    "trained": ("⟦", "⟧"),
    "cut": ("⟨cut: ", "⟩"),
    "padding": ("", ""),
    "gap": ("", ""),
}


@click.command(short_help="Show what a model would see of the data.")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--rows", help="Rows to show, counted from 0: 0,5,7.")
@click.option("--random", "draw", type=click.IntRange(min=1), metavar="N", help="Show N rows, drawn.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a page with the numbers and the rows.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers and the rows as JSON.")
def preview(
    config: str, overrides: tuple[str, ...], rows: str | None, draw: int | None, html: str | None, as_json: bool
) -> None:
    r"""Show what a model would see of the data of the YAML file CONFIG: which tokens are trained, what is cut
    or padded, what repeats, and what the held-out rows share with the trained ones. No weights are loaded.

    \b
    lorakit preview configs/addresses.yaml
    lorakit preview configs/addresses.yaml --random 5 --html preview.html
    """
    from lorakit.config.load import load
    from lorakit.config.resolve import resolve
    from lorakit.log import logger

    if rows is not None and draw is not None:
        raise UsageError("--rows and --random both choose the rows", remedy="keep one of them")
    settings = resolve(load(config, overrides))
    found, shown = _look(settings, rows, draw)
    for warning in (*settings.warnings, *found.warnings()):
        logger.warning("warning: %s", warning)
    if html:
        from lorakit.files import write_text
        from lorakit.report.preview import render_preview

        write_text(Path(html), render_preview(Path(config).name, found, shown))
    if as_json:
        emit(_as_json(found, shown), as_json)
    else:
        _print(found, shown)
    if not found.waterfall.kept:
        raise DataError(f"no row is left to train on: {found.waterfall}", remedy="see the numbers above")


def _look(settings: Resolved, rows: str | None, draw: int | None) -> tuple[Survey, list[ShownRow]]:
    """The numbers of all rows, and the chosen rows in pieces."""
    from lorakit.data.configured import policy_of, read_data, template_of
    from lorakit.data.encode import encode_batch
    from lorakit.data.pool import chunks
    from lorakit.data.preview import show
    from lorakit.data.probe import check_template
    from lorakit.data.survey import batches, survey
    from lorakit.models.load import load_tokenizer
    from lorakit.models.sources import locate

    data = read_data(settings)
    wanted = _wanted(rows, draw, len(data.samples), settings.seed)
    source = locate(settings.model_name_or_path, settings.model_revision)
    tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
    template, policy = template_of(settings, tokenizer), policy_of(settings)
    check_template(tokenizer, template)
    kept: dict[int, Encoded] = {}
    lengths: list[int] = []

    def encoded(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Encoded]]:
        for part in chunks(samples, _CHUNK):
            yield from zip(part, encode_batch(tokenizer, part, policy, template), strict=True)

    def kept_if_wanted() -> Iterator[tuple[Sample, Encoded]]:
        for number, (sample, one) in enumerate(encoded(data.samples)):
            lengths.extend(len(row.ids) for row in one.rows)
            if number in wanted:
                kept[number] = one
            yield sample, one

    for _ in encoded(data.held_out):  # what the template refuses is told now
        pass
    found = survey(kept_if_wanted(), data.held_out, bad=data.training.bad, cutoff_len=settings.cutoff_len)
    packs = _packs(source, trust_remote_code=settings.trust_remote_code)
    capacity = settings.cutoff_len if settings.packing else None
    found = replace(found, batches=batches(lengths, can_pack=packs, capacity=capacity))
    longest = max((len(row.ids) for one in kept.values() for row in one.rows), default=0)
    pad_to = 0 if packs else longest
    return found, [show(tokenizer, data.samples[number], number, kept[number], pad_to) for number in wanted]


def _packs(source: ModelSource, *, trust_remote_code: bool) -> bool:
    """Whether training can lay the rows end to end; asked of the architecture, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorakit.models.patch import PACKABLE, can_pack
    from lorakit.models.quiet import quiet
    from lorakit.models.sources import local_folder

    folder = local_folder(source, weights=False, trust_remote_code=trust_remote_code)
    if json.loads((folder / "config.json").read_bytes()).get("model_type") not in PACKABLE:
        return False
    auto: Any = AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return can_pack(auto.from_config(config, trust_remote_code=trust_remote_code))


def _wanted(rows: str | None, draw: int | None, count: int, seed: int) -> list[int]:
    """The numbers of the rows to show."""
    if draw is not None:
        return sorted(random.Random(seed).sample(range(count), min(draw, count)))
    if rows is None:
        return list(range(min(_DEFAULT_ROWS, count)))
    numbers = [part.strip() for part in rows.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise UsageError(f"--rows takes numbers with commas between them, not {rows!r}")
    beyond = [number for number in numbers if int(number) >= count]
    if beyond:
        raise UsageError(f"there is no row {beyond[0]}: the rows are 0 to {count - 1}")
    return [int(number) for number in numbers]


def _as_json(found: Survey, shown: Sequence[ShownRow]) -> dict[str, object]:
    from dataclasses import asdict

    numbers = asdict(found)
    numbers["tokens"]["masked_share"] = found.tokens.masked_share
    return {**numbers, "warnings": found.warnings(), "rows": [asdict(row) for row in shown]}


def _print(found: Survey, shown: Sequence[ShownRow]) -> None:
    from rich.console import Console
    from rich.text import Text

    from lorakit.data.preview import visible

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    for row in shown:
        rest = f", {row.cut} cut" if row.cut else ""
        rest += f", {row.padding} padding" if row.padding else ""
        head = f"row {row.number}  {visible(row.place)}  {row.tokens} tokens, {row.trained} trained{rest}"
        console.print(Text(head, "bold"))
        for pieces in row.sequences:
            console.print(_coloured(pieces) if coloured else Text(_marked(pieces)))
            console.print()
    console.print(_legend(coloured))
    for title, value in found.lines():
        console.print(f"{title:<11}{visible(value)}")
    console.print("lengths in tokens, before anything is cut")
    for line in _bars(found.tokens.histogram, "█" if console.encoding.startswith("utf") else "#"):
        console.print(line)


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[str, bool, str]]:
    """Neighbours of one kind joined: kind, whether special, text. The middle of a long row is left out."""
    from lorakit.data.preview import visible

    half = _MOST_PIECES // 2
    if len(pieces) > _MOST_PIECES:
        yield from _runs(pieces[:half])
        yield "gap", False, f"\n… {len(pieces) - 2 * half} tokens more, --html shows them …\n"
        yield from _runs(pieces[-half:])
        return
    for (kind, special), run in itertools.groupby(pieces, key=lambda piece: (piece.kind, piece.special)):
        yield kind, special, visible("".join(piece.text for piece in run))


def _coloured(pieces: Sequence[Piece]) -> Text:
    from rich.text import Text

    text = Text()
    for kind, special, run in _runs(pieces):
        text.append(run, _style(kind, special))
    return text


def _style(kind: str, special: bool) -> str:
    return f"{_STYLES[kind]} {_SPECIAL}".strip() if special else _STYLES[kind]


def _marked(pieces: Sequence[Piece]) -> str:
    """For a terminal without colours."""
    runs = itertools.groupby(_runs(pieces), key=lambda run: run[0])
    return "".join(text.join(_MARKS[kind]) for kind, run in runs if (text := "".join(part for *_, part in run)))


def _legend(coloured: bool) -> Text:
    from rich.text import Text

    if not coloured:
        return Text("⟦trained⟧ ⟨cut: …⟩ ⟨padding: …⟩, everything else is prompt")
    words = [("prompt", False), ("trained", False), ("cut", False), ("padding", False)]
    parts = [(kind, _style(kind, special)) for kind, special in words]
    return Text(" ").join(Text(*part) for part in [*parts, ("special", _SPECIAL)])


def _bars(histogram: Sequence[Bar], block: str) -> Iterator[str]:
    most = max((bar.rows for bar in histogram), default=1)
    names = [f"{bar.low} to {bar.high}" for bar in histogram]
    for name, bar in zip(names, histogram, strict=True):
        size = math.ceil(_BAR * bar.rows / most)
        yield f"  {name:>{max(map(len, names))}}  {block * size:<{_BAR}} {bar.rows}"
