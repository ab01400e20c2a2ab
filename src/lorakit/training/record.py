"""``run.json``, model card and report: what a run says about itself, from what was measured."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lorakit import __version__, hardware
from lorakit.adapters.attach import adapter_layers, count_parameters
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.inspect import inspect, probe_ranks
from lorakit.data.store import lengths_of
from lorakit.evals.evaluate import Evaluation
from lorakit.files import write_json, write_text
from lorakit.models.patch import can_pack
from lorakit.report.card import model_card
from lorakit.report.html import write_report
from lorakit.report.record import RunRecord
from lorakit.training.folder import RunFolder
from lorakit.training.job import Job

_SAMPLES = 10


def describe(
    job: Job, before: Evaluation | None, after: Evaluation | None, *, started: float, status: str
) -> dict[str, Any]:
    """The content of ``run.json``."""
    settings = job.settings
    scored = after or before
    return {
        "lorakit": __version__,
        "command": shlex.join(["lorakit", *sys.argv[1:]]) if Path(sys.argv[0]).name == "lorakit" else None,
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "status": status,
        "model": {
            "name": settings.model_name_or_path,
            "kind": job.source.kind,
            "hub_id": job.source.hub_id,
            "license": job.source.license,
        },
        "adapter": _adapter(job.model),
        "data": {
            "train": {
                "files": list(settings.dataset),
                **asdict(job.data),
                "reading": dict(job.reading),
                "padding": _padding(job),
            },
            "eval": scored and {"files": list(settings.eval_dataset or ()), **asdict(scored.data)},
        },
        "environment": {
            **hardware.summary(),
            **{name: version(name) for name in ("torch", "transformers")},
            "peak_memory_gb": round(hardware.memory_peak() / 1e9, 3),
            "memory_limit_gb": round(hardware.memory_limit() / 1e9, 3),
        },
        "samples": _samples(job, before, after),
        "scores": [scores and {**scores.to_json(), "answers": None} for scores in (before, after)],
        "base_unchanged": True,  # a run whose base changed never gets here
    }


def finished_record(folder: RunFolder, step: int) -> dict[str, Any] | None:
    """The content of ``run.json``, if that run came to its end after `step` updates and the result is there."""
    try:
        record: dict[str, Any] = json.loads(folder.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ended = record.get("status") == "finished" and record.get("updates") == step and "scores" in record
    whole = folder.result().is_dir() and folder.report.is_file()  # the report is written last
    return record if ended and whole else None


def publish(folder: RunFolder, result: Path, record: dict[str, Any]) -> Path:
    """Write ``run.json``, the result's model card and the report; returns the report's path."""
    if result == folder.adapter and result.is_dir():
        ranks = probe_ranks(inspect(result).updates)
        record = record | {"ranks": ranks and asdict(ranks)}
    write_json(folder.record, record)
    if result.is_dir():  # not yet, if a second stage was interrupted
        write_text(result / "README.md", model_card(RunRecord.read(folder.path)))
    return write_report(folder.path)


def _adapter(model: nn.Module) -> dict[str, Any]:
    """Rank, scaling and size, with the adapted modules grouped by name and shape."""
    layers = adapter_layers(model)
    config: LoRAConfig = next(iter(layers.values())).adapter("default").config
    sizes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    modules: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for path, layer in layers.items():
        kind = (path.rpartition(".")[2], layer.store.shape)
        modules[kind] += 1
        sizes[kind] += sum(p.numel() for p in layer.adapters.parameters())
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "scaling": config.scaling,
        "targets": [
            {"name": name, "modules": count, "shape": list(shape), "parameters": sizes[name, shape]}
            for (name, shape), count in modules.items()
        ],
        **count_parameters(model),
    }


def _padding(job: Job) -> float:
    """Share of the positions of an epoch's forward passes that are padding; 0 where rows lie end to end."""
    lengths, grouping = lengths_of(job.rows), job.plan.grouping
    if can_pack(job.model):
        return 0.0
    groups = grouping.epoch(lengths, job.plan.seed, 0)
    return 1 - sum(lengths) / sum(len(group) * max(lengths[i] for i in group) for group in groups)


def _samples(job: Job, before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """The first held-out rows with what the base and the adapter answered."""
    scored = [evaluation.answers for evaluation in (before, after) if evaluation and evaluation.answers]
    if not scored or job.held_out is None:
        return []
    return [
        {
            "prompt": sample.prompt[-1].content,
            "reference": sample.reference,
            "before": before.answers[i] if before and before.answers else None,
            "after": after.answers[i] if after and after.answers else None,
        }
        for i, sample in enumerate(job.held_out.samples[:_SAMPLES])
    ]
