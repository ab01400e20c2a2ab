"""``lorakit plan``: what a training will take, before anything is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.show import emit, table
from lorakit.patterns import is_expression

if TYPE_CHECKING:
    from lorakit.planning.plan import Plan


@click.command()
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--model", help="Folder, file of weights, hub id, a name such as llama-3-8b, or 4096x4096.")
@click.option("--method", type=click.Choice(["lora", "dora", "adalora", "full"]), help="What is trained.")
@click.option("--rank", type=int, help="Rank of the adapters.")
@click.option("--targets", help="Names of the layers that carry one, comma between; or all.")
@click.option("--bits", type=int, help="Of a number of the frozen base: 32, 16, 8 or 4.")
@click.option("--batch", type=int, help="Sequences in one pass.")
@click.option("--length", type=int, help="Tokens in a sequence.")
@click.option("--row", type=int, help="Tokens in a row, where a sequence is packed of several.")
@click.option("--labelled", type=float, help="Share of the tokens that carry loss, 0 to 1.")
@click.option("--accumulation", type=int, help="Passes for one update.")
@click.option("--dropout", type=float, help="Of the adapters' inputs.")
@click.option("--checkpointing/--no-checkpointing", default=None, help="Recompute activations.")
@click.option("--optimizer", help="As the key optim.")
@click.option("--strategy", type=click.Choice(["one", "ddp", "zero1", "zero2", "zero3", "fsdp"]),
              help="How devices share the work; ddp, or what CONFIG says, if left out.")  # fmt: skip
@click.option("--ranks", type=int, help="Devices that share the work.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where it runs; here, if left out.")
@click.option("--fit", "limit", metavar="SIZE", help="Search what fits into SIZE, such as 16GB.")
@click.option("--gflops", type=float, help="Rate of matrix products, if it was not measured.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(
    config: str | None,
    overrides: tuple[str, ...],
    limit: str | None,
    gflops: float | None,
    plot: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    r"""Work out bytes, seconds and sizes of a training: of the YAML file CONFIG, or of a model by name.

    \b
    lorakit plan configs/addresses.yaml
    lorakit plan --model llama-3-8b --bits 4 --rank 16 --length 2048 --fit 16GB
    """
    from lorakit.planning.plan import plan as work_out

    given = {name: value for name, value in settings.items() if value is not None}
    model = given.pop("model", None)
    found = work_out(config, overrides, model=model, limit=limit, gflops=gflops, **given)
    if plot:
        from lorakit.planning.picture import draw

        draw(found, plot)
    emit(found.to_dict() if as_json else _text(found), as_json)


def _text(found: Plan) -> str:
    parts = [_model(found), _memory(found), _time(found)]
    if found.waterfall:
        rows = [(step.name, f"{step.memory.total / 1e9:.2f}") for step in found.waterfall]
        parts.append(_titled("from a plain training to a sparing one, GB", rows))
    programs = [
        (each.program, "yes" if each.loads else "no", each.note, each.remedy) for each in found.deployments
    ]
    parts.append(_titled("who loads the adapter", programs))
    if found.fit:
        parts.append(_fit(found))
    if found.advice:
        lines = [(each.setting, each.reason, f"[{each.source}]") for each in found.advice]
        parts.append(_titled("outside of what is usual", lines))
    return "\n\n".join([*parts, *([table([("note:", note) for note in found.notes])] if found.notes else [])])


def _model(found: Plan) -> str:
    facts, setup = found.facts, found.setup
    rows: list[tuple[str, object]] = [("model", f"{facts.name} ({facts.family}; {facts.source})")]
    rows.append(("parameters", f"{facts.parameters:,}"))
    if facts.active_parameters != facts.parameters:
        rows.append(("met by one token", f"{facts.active_parameters:,}"))
    named = found.by_target if any(map(is_expression, setup.targets)) else setup.targets
    rank = "" if setup.method == "full" else f", rank {setup.rank}, on {', '.join(named)}"
    rows.append(("trained", f"{setup.method}{rank}"))
    rows.append(("trainable", f"{found.trainable:,} ({found.percent:.3g} %, one of {found.reduction:.0f})"))
    if found.by_target:
        rows.append(("of them on", ", ".join(f"{name} {count:,}" for name, count in found.by_target.items())))
    rows.append(("size on disk", _size(found.adapter_bytes)))
    rows.append(
        (
            "effective batch",
            f"{setup.batch} × {setup.accumulation} × {setup.ranks} = {setup.effective_batch} "
            f"sequences of {setup.length} tokens",
        )
    )
    return table(rows)


def _memory(found: Plan) -> str:
    setup, memory = found.setup, found.memory
    each = f"each of {setup.ranks} devices ({setup.strategy})" if setup.ranks > 1 else f"one {setup.device}"
    rows = [(name, _size(size)) for name, size in memory.categories().items()]
    rows.append(("total", _size(memory.total)))
    other = found.without_checkpointing if setup.checkpointing else found.with_checkpointing
    rows.append((f"{'without' if setup.checkpointing else 'with'} checkpointing", _size(other)))
    if found.loading > memory.total:
        rows.append(("while loading", _size(found.loading)))
    return _titled(f"memory on {each}, {setup.bits}-bit base", rows)


def _time(found: Plan) -> str:
    time = found.time
    rows: list[tuple[str, object]] = [("operations", f"{time.flops / 1e12:.4g} TFLOP")]
    if time.seconds is not None:
        rows.append(("seconds", f"{time.seconds:.3g}"))
        rows.append(("tokens a second", f"{time.tokens_per_second:.4g}"))
        if found.updates:
            rows.append((f"{found.updates} updates", f"{time.seconds * found.updates / 3600:.3g} hours"))
    rate = f"{time.rates.gflops:,.0f} GFLOP/s, " if time.rates.gflops else ""
    return _titled("one update", [*rows, ("rate", rate + time.rates.origin)])


def _fit(found: Plan) -> str:
    fit = found.fit
    assert fit is not None
    title = f"{_size(fit.total)} {'fit' if fit.fits else 'do not fit'} into {_size(fit.limit)}"
    largest = [(f"largest {name}", size or "none") for name, size in fit.largest.items()]
    parts = [_titled(f"{title}; with all else as it is", largest)]
    levers = [(lever.line, f"-{_size(lever.saved)}", lever.name) for lever in fit.levers]
    parts.append(_titled("what each change alone saves", levers))
    if fit.ladder:
        steps = [(step.line, _size(step.total), step.name) for step in fit.ladder]
        ends = "until it fits" if fit.setup else "and still it does not fit"
        parts.append(_titled(f"one change on top of the other, {ends}", steps))
    return "\n\n".join(parts)


def _titled(title: str, rows: list[Any]) -> str:
    return f"{title}:\n{table(rows)}"


def _size(count: int) -> str:
    """Bytes as people read them: 10³ and 10⁶ bytes, GB of 10⁹."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}" if name == "GB" else f"{count / unit:.1f} {name}"
    return f"{count} B"
