"""The demo model: what it is called, and where it lies once `lorakit.models.sources` has fetched it."""

from __future__ import annotations

from pathlib import Path

from lorakit.files import cache_folder

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_folder() -> Path:
    """The folder made of its GGUF file."""
    return converted_path(DEMO_GGUF.removesuffix(".gguf"), _SHA256)


def converted_path(name: str, sha256: str) -> Path:
    """Where the conversion of a GGUF file with this content lies."""
    return cache_folder() / "models" / f"{name}-{sha256[:12]}"
