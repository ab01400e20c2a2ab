"""Who will load the adapter that a setup makes, told before it is trained.

The rules are those of the loaders' sources, read in 2026: vLLM's ``peft_helper`` (no DoRA, no modules_to_save,
ranks up to ``--max-lora-rank``, at most 512), and llama.cpp's ``convert_lora_to_gguf.py`` (A and B alone,
scaled by alpha over rank). PEFT loads all that lorakit writes. A merged model loads everywhere: that is the
remedy throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.planning.setup import Setup

_VLLM_DEFAULT_RANK, _VLLM_RANKS = 16, (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MERGE = "merge it: `lorakit merge`"


@dataclass(frozen=True)
class Deployment:
    """Whether a program loads the adapter, what stands in the way or is to be done, and the remedy."""

    program: str
    loads: bool
    note: str = ""
    remedy: str = ""


def deployments(setup: Setup) -> tuple[Deployment, ...]:
    """PEFT, vLLM and GGUF (llama.cpp), in this order."""
    if setup.method == "full":
        note = "a whole model, no adapter"
        return tuple(Deployment(name, True, note) for name in ("PEFT", "vLLM", "GGUF"))
    return Deployment("PEFT", True), _vllm(setup), _gguf(setup)


def _vllm(setup: Setup) -> Deployment:
    obstacles = _obstacles(setup)
    highest = max(setup.rank, *(rank for _, rank in setup.rank_pattern), 0)
    if highest > _VLLM_RANKS[-1]:
        obstacles.append(f"rank {highest} is above {_VLLM_RANKS[-1]}")
    if obstacles:
        return Deployment("vLLM", False, "; ".join(obstacles), _remedy(setup))
    if highest > _VLLM_DEFAULT_RANK:
        least = min(rank for rank in _VLLM_RANKS if rank >= highest)
        return Deployment("vLLM", True, f"start it with --max-lora-rank {least}")
    return Deployment("vLLM", True)


def _gguf(setup: Setup) -> Deployment:
    obstacles = _obstacles(setup)
    if setup.rslora:
        obstacles.append("rsLoRA's scale is read as alpha over rank")
    if obstacles:
        return Deployment("GGUF", False, "; ".join(obstacles), _remedy(setup))
    return Deployment("GGUF", True, "with llama.cpp's convert_lora_to_gguf.py")


def _obstacles(setup: Setup) -> list[str]:
    found = {"dora": ["DoRA is not supported"], "adalora": ["AdaLoRA is not supported"]}.get(setup.method, [])
    return [*found, *(["modules_to_save is not supported"] if setup.whole else [])]


def _remedy(setup: Setup) -> str:
    plain = setup.method == "adalora" and not setup.whole
    return f"write it as plain LoRA: `lorakit convert`; or {_MERGE}" if plain else _MERGE
