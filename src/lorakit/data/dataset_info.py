"""LLaMA-Factory's registry: ``dataset_info.json`` beside the data names data sets and tells their layout.

Keys that ask for what is not built (preferences, images) are refused by name, unknown keys with a suggestion.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.data.formats import alpaca, openai, sharegpt, text
from lorakit.data.formats.common import Format, RowData
from lorakit.data.formats.sharegpt import TAGS, Tags
from lorakit.data.hub import HubSet
from lorakit.data.sample import Sample
from lorakit.data.sources import REGISTRY
from lorakit.errors import DataError

_KEYS = {
    "file_name", "hf_hub_url", "formatting", "columns", "tags",
    "subset", "split", "num_samples", "folder", "ranking",
}  # fmt: skip
_FORMATTING = ("alpaca", "sharegpt", "openai")
_COLUMNS = {"prompt", "query", "response", "history", "messages", "system", "tools"}
_ALPACA_KEYS = {
    "prompt": "instruction", "query": "input", "response": "output",
    "history": "history", "system": "system", "tools": "tools",
}  # fmt: skip
_ALPACA_DEFAULT = {"prompt": "instruction", "query": "input", "response": "output"}
_PREFERENCES = "it belongs to preference training, which is not built yet"
_MEDIA = "only text is trained on"
_OTHER_HUBS = "download the files and give file_name"
_REFUSED = {
    "script_url": "loading scripts are code and are not run; convert the data to JSONL and give file_name",
    "ms_hub_url": _OTHER_HUBS,
    "om_hub_url": _OTHER_HUBS,
    "cloud_file_name": _OTHER_HUBS,
    "chosen": _PREFERENCES,
    "rejected": _PREFERENCES,
    "kto_tag": _PREFERENCES,
    "images": _MEDIA,
    "videos": _MEDIA,
    "audios": _MEDIA,
}


@dataclass(frozen=True)
class Entry:
    """One data set of a registry: a file, folder or pattern, or a hub data set; its format; how many rows."""

    name: str
    files: Path | None
    hub: HubSet | None
    format: Format
    num_samples: int | None


def read_registry(folder: Path) -> Mapping[str, Any]:
    """What ``dataset_info.json`` of a folder holds; empty if there is none.

    Raises:
        DataError: it is not a JSON object of objects.
    """
    path = folder / REGISTRY
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the registry: {error}", place=str(path)) from error
    if not isinstance(entries, dict):
        raise DataError("the registry must be an object of data sets", place=str(path))
    return entries


def find_entry(folder: Path, name: str) -> Entry | None:
    """The data set of this name in the registry of the folder, if there is one.

    Raises:
        DataError: the entry asks for something that is not known or not built.
    """
    described = read_registry(folder).get(name)
    if described is None:
        return None
    place = f"{folder / REGISTRY}: {name}"
    entry = _checked(described, _KEYS, place)
    if entry.get("ranking") not in (None, False):
        raise DataError(f"ranking: {_PREFERENCES}", place=place)
    samples = entry.get("num_samples")
    if samples is not None and (type(samples) is not int or samples < 1):
        raise DataError("num_samples must be a whole number of at least 1", place=place)
    texts = {key: _text(entry, key, place) for key in ("file_name", "hf_hub_url", "subset", "split", "folder")}
    if texts["hf_hub_url"]:
        hub = HubSet(texts["hf_hub_url"], texts["subset"], texts["split"] or "train", texts["folder"])
        local = folder / hub.name
        files = local if local.exists() else None
    elif texts["file_name"]:
        files, hub = folder / texts["file_name"], None
    else:
        raise DataError("the entry names no data: give file_name or hf_hub_url", place=place)
    return Entry(name, files, None if files else hub, _format(entry, place), samples)


def _format(entry: Mapping[str, Any], place: str) -> Format:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FORMATTING:
        raise DataError(f"formatting must be one of {', '.join(_FORMATTING)}, not {formatting!r}", place=place)
    columns = _checked(entry.get("columns") or {}, _COLUMNS, f"{place}: columns")
    names = {key: name for key in columns if (name := _text(columns, key, f"{place}: columns"))}
    if formatting == "alpaca":
        return _alpaca(names, place)
    messages = names.pop("messages", "messages" if formatting == "openai" else "conversations")
    needed = frozenset({messages})
    kept = {messages: messages, **{names[key]: key for key in ("system", "tools") if key in names}}
    if formatting == "openai":
        convert = partial(openai.convert, key=messages)
    else:
        convert = partial(sharegpt.convert, tags=_tags(entry.get("tags") or {}, place), key=messages)
    return Format(formatting, needed | kept.keys(), partial(_renamed, kept, convert))


def _alpaca(names: Mapping[str, str], place: str) -> Format:
    """Alpaca under other names; a prompt without an answer is text for continued pre-training."""
    names = names or _ALPACA_DEFAULT
    if set(names) == {"prompt"}:
        return Format(
            "text", frozenset(names.values()), partial(_renamed, {names["prompt"]: "text"}, text.convert)
        )
    if not {"prompt", "response"} <= names.keys():
        raise DataError("alpaca needs the columns prompt and response", place=place)
    kept = {names[key]: _ALPACA_KEYS[key] for key in _ALPACA_KEYS if key in names}
    needed = {name for name in kept if name != "input"} if names is _ALPACA_DEFAULT else kept.keys()
    return Format("alpaca", frozenset(needed), partial(_renamed, kept, alpaca.convert))


def _renamed(kept: Mapping[str, str], convert: Any, row: RowData, place: str) -> Sample:
    sample: Sample = convert({ours: row.get(theirs) for theirs, ours in kept.items()}, place)
    return sample


def _tags(written: Any, place: str) -> Tags:
    known = {f"{field.name}_tag": field.name for field in fields(Tags)}
    tags = _checked(written, known, f"{place}: tags")
    names = {known[key]: name for key in tags if (name := _text(tags, key, f"{place}: tags"))}

    def role(key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        return (names[key],) if key in names else default

    return Tags(
        role=names.get("role", TAGS.role),
        content=names.get("content", TAGS.content),
        user=role("user", TAGS.user),
        assistant=role("assistant", TAGS.assistant),
        observation=role("observation", TAGS.observation),
        function=role("function", TAGS.function),
        system=role("system", TAGS.system),
    )


def _checked(value: Any, known: Collection[str], place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"must be an object, not {type(value).__name__}", place=place)
    for key in value.keys() - known:
        if value[key] is None or value[key] is False:
            continue
        if key in _REFUSED:
            raise DataError(f"{key} is known but not built: {_REFUSED[key]}", place=place)
        near = difflib.get_close_matches(key, known, n=1)
        raise DataError(
            f"unknown key {key}",
            place=place,
            remedy=f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}",
        )
    return value


def _text(entry: Mapping[str, Any], key: str, place: str) -> str | None:
    value = entry.get(key)
    if not isinstance(value, str | None):
        raise DataError(f"{key} must be text, not {type(value).__name__}", place=place)
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is written twice")
    return dict(pairs)
