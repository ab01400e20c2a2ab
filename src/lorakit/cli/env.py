"""``lorakit env``: what this machine can do."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import click

from lorakit.cli.show import emit

_PACKAGES = ("lorakit", "torch", "transformers", "safetensors", "tokenizers", "peft")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def env(as_json: bool) -> None:
    """Print the machine, the number formats it computes in, and the versions of the packages that matter."""
    from lorakit import hardware
    from lorakit.files import cache_folder
    from lorakit.ops import native

    formats = [name for name in ("fp32", "bf16", "fp16") if hardware.supports(name)]
    passes = "C++, compiled here" if native.library() else "PyTorch"
    facts = {**hardware.summary(), "computes_in": ", ".join(formats), "passes": passes}
    facts["cache"] = str(cache_folder())
    emit({**facts, **{name: _version(name) for name in _PACKAGES}}, as_json)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
