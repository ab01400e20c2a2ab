"""Loading: file and overrides become one checked ``Run``, or one error that tells every problem at once."""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from lorakit.config.keys import ALIASES, OTHER_NAMES, UNBUILT
from lorakit.config.presets import PRESETS
from lorakit.config.problems import Place, Problem, config_error
from lorakit.config.quantization_rules import QUANTIZATION_CONTRADICTIONS, QUANTIZATION_WARNINGS
from lorakit.config.rules import CONTRADICTIONS, WARNINGS
from lorakit.config.schema import TrainConfig, help_texts
from lorakit.config.source import (
    ProblemFoundError,
    Setting,
    merge,
    read_file,
    read_mapping,
    read_override,
)
from lorakit.config.yaml_text import scalar

_FIELDS = tuple(TrainConfig.model_fields)
_PRESET = "preset "
_ONE_CHOICE = ("stage", "finetuning_type")
_SWITCHES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@dataclass(frozen=True)
class Run:
    """A checked configuration, the setting behind each key that was written, and what to warn of."""

    config: TrainConfig
    settings: Mapping[str, Setting]
    file: Path | None
    base_dir: Path
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """What an error calls it."""
        return _name(self.file)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read and check a YAML file; ``key=value`` overrides win over it.

    Raises:
        ConfigError: with every problem of the file and the overrides.
    """
    path = Path(path)
    try:
        written = read_file(path)
    except ProblemFoundError as error:
        raise config_error([error.problem], str(path)) from error
    return _check(written, overrides, path, path.absolute().parent)


def load_mapping(values: Mapping[str, Any], base_dir: Path, overrides: Sequence[str] = ()) -> Run:
    """Check values given in Python; relative paths start from ``base_dir``.

    Raises:
        ConfigError: with every problem of the values and the overrides.
    """
    return _check(read_mapping(values, base_dir.absolute()), overrides, None, base_dir.absolute())


def _check(written: Sequence[Setting], overrides: Sequence[str], file: Path | None, base_dir: Path) -> Run:
    settings, problems = merge(written)
    arguments = []
    for override in overrides:
        try:
            arguments.append(read_override(override, Path.cwd()))
        except ProblemFoundError as error:
            problems.append(error.problem)
    given, doubled = merge(arguments)
    problems += doubled
    settings |= given
    problems += _spell(settings)
    settings |= _preset_settings(settings, base_dir)
    name = _name(file)
    known = {key: setting for key, setting in settings.items() if key in _FIELDS}
    problems += [problem for key, at in settings.items() if key not in _FIELDS for problem in _refuse(at)]
    config, invalid = _validate(known, name)
    problems += invalid
    unsure = {problem.key for problem in invalid}
    for rule in (*CONTRADICTIONS, *QUANTIZATION_CONTRADICTIONS):
        if unsure.isdisjoint(rule.keys) and rule.broken(config):
            places = tuple(known[key].key_place for key in rule.keys if key in known)
            hint = rule.hint + "".join(_undone(known[key]) for key in rule.keys if key in known)
            problems.append(Problem(rule.message, rule.keys[0], places, hint))
    if problems:
        raise config_error(problems, name)
    warnings = tuple(
        f"{known[rule.keys[0]].origin}: {rule.message}: {rule.hint}"
        for rule in (*WARNINGS, *QUANTIZATION_WARNINGS)
        if rule.broken(config)
    )
    return Run(config, known, file, base_dir, warnings)


def _spell(settings: dict[str, Setting]) -> list[Problem]:
    """Write every alias as its key; a problem for each that stands beside it."""
    problems = []
    for alias in [key for key in settings if key in ALIASES]:
        setting, key = settings.pop(alias), ALIASES[alias]
        if key in settings:
            places = (settings[key].key_place, setting.key_place)
            problems.append(Problem(f"`{key}` and `{alias}` are the same key", key, places, "keep one of them"))
        else:
            settings[key] = replace(setting, key=key)
    return problems


def _preset_settings(settings: Mapping[str, Setting], base: Path) -> dict[str, Setting]:
    """What the key ``preset`` brings for keys that nobody wrote; an unknown name is refused as any value is."""
    name = settings["preset"].value if "preset" in settings else None
    if not isinstance(name, str) or name not in PRESETS:
        return {}
    found = {}
    for key, value in PRESETS[name].values.items():
        line = f"{key}: {scalar(value)}"
        at_key = Place(f"{_PRESET}{name}", None, 1, line, len(key))
        at_value = Place(f"{_PRESET}{name}", None, len(key) + 3, line, len(line) - len(key) - 2)
        if key not in settings:
            found[key] = Setting(key, value, at_key, at_value, base)
    return found


def _undone(setting: Setting) -> str:
    """How a value is got rid of that a preset brought."""
    if setting.key_place.line is not None or not setting.key_place.file.startswith(_PRESET):
        return ""
    default = TrainConfig.model_fields[setting.key].get_default()
    return f"; `{setting.key}: {scalar(default)}` undoes the preset's"


def _name(file: Path | None) -> str:
    return str(file) if file else "the arguments"


def _refuse(setting: Setting) -> list[Problem]:
    """The problem of a key that is not in the schema; none if it is known and asks for nothing."""
    key, places = setting.key, (setting.key_place,)
    unbuilt = UNBUILT.get(key)
    if unbuilt is not None:
        if unbuilt.accepts(setting.value):
            return []
        return [Problem(f"`{key}` is known but not built yet: {unbuilt.reason}", key, places)]
    nearest = difflib.get_close_matches(key, [*_FIELDS, *UNBUILT], n=1, cutoff=0.7)
    meant = OTHER_NAMES.get(key.lower()) or next(iter(nearest), None)
    hint = f"did you mean `{meant}`?" if meant else None
    return [Problem(f"unknown key `{key}`", key, places, hint, () if meant else _FIELDS)]


def _validate(settings: Mapping[str, Setting], name: str) -> tuple[TrainConfig, list[Problem]]:
    """The configuration, with stand-ins for the keys that have a problem, so that rules see the rest."""
    values = {key: setting.value for key, setting in settings.items()}
    try:
        return TrainConfig(**values), []
    except ValidationError as error:
        wrong = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors(include_url=False))
    problems = [_explain(settings[key]) if key in settings else _missing(key, name) for key in wrong]
    stand_ins = {key: "?" for key in wrong if TrainConfig.model_fields[key].is_required()}
    sound = {key: value for key, value in values.items() if key not in wrong}
    return TrainConfig(**{**sound, **stand_ins}), problems


def _missing(key: str, name: str) -> Problem:
    hint = f"add `{key}: …`: {help_texts()[key]}"
    return Problem(f"the key `{key}` is missing", key, (Place(name),), hint)


def _explain(setting: Setting) -> Problem:
    """Why a value does not fit: what the key takes, from the schema, and what was found."""
    key, value = setting.key, setting.value
    options = [option for option in _options(key) if option.get("type") != "null"]
    choices = tuple(str(choice) for option in options for choice in option.get("enum", ()))
    message = f"`{key}` must be {' or '.join(_describe(option) for option in options)}, not {_shown(value)}"
    return Problem(message, key, (setting.value_place,), _advice(key, value, options, choices), choices)


def _advice(key: str, value: Any, options: Sequence[Mapping[str, Any]], choices: Sequence[str]) -> str | None:
    kinds = {option.get("type") for option in options}
    default = TrainConfig.model_fields[key].get_default()
    if key in _ONE_CHOICE:
        return "the other choices are not built yet"
    if value is None and default not in (None, PydanticUndefined):
        return f"remove the key to get the default, {_shown(default)}"
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return f"write {int(value)}"
    return _advice_on_text(value, kinds, choices) if isinstance(value, str) else None


def _advice_on_text(text: str, kinds: Set[str | None], choices: Sequence[str]) -> str | None:
    if kinds & {"integer", "number"} and _is_number(text):
        return "write it without quotes"
    if "boolean" in kinds and text.lower() in _SWITCHES:
        return f"write {_shown(_SWITCHES[text.lower()])}"
    near = difflib.get_close_matches(text, choices, n=1)
    return f"did you mean `{near[0]}`?" if near else None


@functools.cache
def _properties() -> dict[str, Any]:
    properties: dict[str, Any] = TrainConfig.model_json_schema()["properties"]
    return properties


def _options(key: str) -> list[dict[str, Any]]:
    """The alternatives of a key's type, as JSON schema."""
    field = _properties()[key]
    options: list[dict[str, Any]] = field.get("anyOf", [field])
    return options


_KINDS = {
    "boolean": "true or false",
    "array": "a text or list of texts",
    "object": "a mapping of names to numbers",
}


def _describe(option: Mapping[str, Any]) -> str:
    if "const" in option:
        return f"`{option['const']}`" if isinstance(option["const"], str) else _shown(option["const"])
    if "enum" in option:
        return "one of the allowed values"
    kind, item = option["type"], option.get("items", {}).get("type")
    if kind in ("integer", "number"):
        return f"{'a whole number' if kind == 'integer' else 'a number'}{_range(option)}"
    if kind == "array" and item == "integer":
        return "a list of whole numbers"
    if kind == "array" and item == "number":
        return "a number or list of numbers"
    return _KINDS.get(kind, "non-empty text")


def _range(option: Mapping[str, Any]) -> str:
    if "minimum" in option and "maximum" in option:
        return f" between {option['minimum']} and {option['maximum']}"
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most"}
    words["exclusiveMaximum"] = "below"
    bounds = [f"{word} {option[name]}" for name, word in words.items() if name in option]
    return f" {' and '.join(bounds)}" if bounds else ""


def _shown(value: Any) -> str:
    match value:
        case dict():
            return "a mapping"
        case list() | tuple() if len(repr(value)) > 60:
            return "this list"
        case float() if not math.isfinite(value):
            return str(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:60] + "…"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
