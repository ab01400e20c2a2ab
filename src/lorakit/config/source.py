"""Reading: a YAML file, ``key=value`` arguments or a mapping become settings that know where they stand.

YAML 1.2 through ruamel's node tree, which has the positions and runs nothing: ``1e-4`` is a float, ``yes``
and ``on`` are texts, a tag such as ``!!python/object`` is an error, and so are anchors and aliases (a flat
file has no use for them, an alias bomb has).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from lorakit.config.problems import Place, Problem

SIZE_LIMIT = 1024 * 1024
COMMAND_LINE = "command line"

_CORE = "tag:yaml.org,2002:"
_CORE_TAGS = {
    _CORE + name for name in ("str", "null", "bool", "int", "float", "seq", "map", "timestamp", "merge")
}
_SYNTAX_HINTS = (
    ("'\\t'", "indent with spaces, not tabs"),
    ("alias", "put text that starts with `*` or `&` in quotes"),
    ("mapping values", "put text that holds `: ` in quotes"),
    ("expected ',' or", "close the bracket"),
    ("quoted scalar", "close the quotes"),
    ("another document", "remove the `---`: a configuration is one document"),
)


@dataclass(frozen=True)
class Setting:
    """One key with its value, the places of both, and the folder its relative paths start from."""

    key: str
    value: Any
    key_place: Place
    value_place: Place
    base: Path

    @property
    def origin(self) -> str:
        """``sft.yaml:12`` or ``command line``."""
        line = self.key_place.line
        return f"{Path(self.key_place.file).name}:{line}" if line else self.key_place.file


class ProblemFoundError(Exception):
    """Leaves the reader when nothing more can be read."""

    def __init__(self, message: str, place: Place, hint: str | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(message, None, (place,), hint)


class _PlainComposer(Composer):
    """Builds the node tree; no node is shared, so that its size is bounded by the file's."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if event.anchor is not None:
            raise ComposerError(None, None, "anchors and aliases are not allowed here", event.start_mark)
        return super().compose_node(parent, index)


def read_file(path: Path) -> list[Setting]:
    """The settings of a file, duplicates included; ``ProblemFoundError`` if it cannot be read."""
    name = str(path)
    text = _decode(_read_bytes(path), name)
    root = _compose(text, Place(name))
    if root is None or (isinstance(root, ScalarNode) and root.tag == _CORE + "null"):
        raise ProblemFoundError("the file is empty", Place(name), "it needs `key: value` lines")
    lines = text.splitlines()
    if not isinstance(root, MappingNode):
        place = _place(root, Place(name), lines)
        raise ProblemFoundError(f"the file holds {_kind(root)}, not `key: value` lines", place)
    base = path.absolute().parent
    settings = []
    for key, value in root.value:
        key_place = _place(key, Place(name), lines)
        value_place = _place(value, Place(name), lines) if _is_written(value) else key_place
        settings.append(Setting(_text(key), _plain(value, Place(name), lines), key_place, value_place, base))
    return settings


def read_override(argument: str, base: Path) -> Setting:
    """The setting of one ``key=value`` argument; the value is YAML."""
    place = Place(COMMAND_LINE, None, 1, argument, max(len(argument), 1))
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise ProblemFoundError(f'"{argument}" is not an override', place, "write key=value")
    start = len(key) + 1
    at_value = Place(COMMAND_LINE, None, start + 1, argument, max(len(text), 1))
    node = _compose(text, at_value)
    value = None if node is None else _plain(node, at_value, [])
    at_key = Place(COMMAND_LINE, None, 1, argument, len(key))
    return Setting(key.strip(), value, at_key, at_value, base)


def read_mapping(values: Mapping[str, Any], base: Path) -> list[Setting]:
    """The settings of a Python mapping, shown as ``key=value``."""
    settings = []
    for key, given in values.items():
        value = os.fspath(given) if isinstance(given, os.PathLike) else given
        source = f"{key}={value!r}"
        at_key = Place("argument", None, 1, source, len(str(key)))
        at_value = Place("argument", None, len(str(key)) + 2, source, len(source) - len(str(key)) - 1)
        settings.append(Setting(str(key), value, at_key, at_value, base))
    return settings


def merge(settings: Sequence[Setting]) -> tuple[dict[str, Setting], list[Problem]]:
    """Settings by key, and a problem for each key that is written twice."""
    merged: dict[str, Setting] = {}
    problems = []
    for setting in settings:
        first = merged.setdefault(setting.key, setting)
        if first is not setting:
            places = (first.key_place, setting.key_place)
            lines = [str(place.line) for place in places if place.line]
            where = f": lines {' and '.join(lines)}" if lines else ""
            problems.append(
                Problem(f"`{setting.key}` is written twice{where}", setting.key, places, "keep one of them")
            )
    return merged, problems


def near_names(path: Path) -> list[str]:
    """Names in the folder of ``path`` that look like it."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return difflib.get_close_matches(path.name, names, n=3)


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(SIZE_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        near = near_names(path)
        hint = f"did you mean {' or '.join(near)}?" if near else None
        raise ProblemFoundError(f"cannot read the file: {reason}", Place(str(path)), hint) from error
    if len(data) > SIZE_LIMIT:
        raise ProblemFoundError("the file is larger than 1 MiB: not a configuration", Place(str(path)))
    return data


def _decode(data: bytes, name: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ProblemFoundError("the file is UTF-16, not UTF-8", Place(name), "save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"the file is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ProblemFoundError(message, Place(name, line)) from error


def _compose(text: str, at: Place) -> Node | None:
    """The node tree of a text that stands at ``at`` (a file's name, or the value of an argument)."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _PlainComposer
    lines = text.splitlines()
    try:
        return yaml.compose(text)
    except RecursionError as error:
        raise ProblemFoundError("lists or mappings are nested too deeply", at) from error
    except MarkedYAMLError as error:
        message = (error.problem or error.context or "cannot be read").removeprefix("but ")
        hint = next((hint for sign, hint in _SYNTAX_HINTS if sign in f"{message} {error.context}"), None)
        mark = error.problem_mark or error.context_mark
        place = _point(mark, at, lines) if mark else at
        raise ProblemFoundError(f"not valid YAML: {message}", place, hint) from error
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n"), error.position - (before.rfind("\n") + 1)
        message = f"not plain text: it holds the character {ord(text[error.position]):#06x}"
        raise ProblemFoundError(message, _at(at, line, column, 1, lines)) from error
    except YAMLError as error:
        raise ProblemFoundError(f"not valid YAML: {error}", at) from error


def _plain(node: Node, at: Place, lines: Sequence[str]) -> Any:
    """The Python value of a node."""
    if node.tag not in _CORE_TAGS:
        tag = str(node.tag).replace(_CORE, "!!")
        raise ProblemFoundError(f"the tag `{tag}` is not allowed", _place(node, at, lines), "remove it")
    if isinstance(node, SequenceNode):
        return [_plain(item, at, lines) for item in node.value]
    if isinstance(node, MappingNode):
        return {_text(key): _plain(value, at, lines) for key, value in node.value}
    return _scalar(node.tag.removeprefix(_CORE), node.value)


def _scalar(kind: str, text: str) -> Any:
    """A scalar by YAML 1.2's core schema; what does not fit its tag stays text and fails the type check."""
    if kind == "null":
        return None
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        if kind == "int":
            return int(text, 0) if text[:2] in {"0x", "0o"} else int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return text
    return text


def _text(key: Node) -> str:
    return key.value if isinstance(key, ScalarNode) else _kind(key)


def _kind(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, MappingNode) else "one text"


def _is_written(node: Node) -> bool:
    """False for the empty value of ``key:``, whose mark stands behind the line."""
    return not isinstance(node, ScalarNode) or bool(node.value) or node.style is not None


def _place(node: Node, at: Place, lines: Sequence[str]) -> Place:
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 10**6
    return _point(start, at, lines, width)


def _point(mark: StringMark, at: Place, lines: Sequence[str], width: int = 1) -> Place:
    return _at(at, mark.line, mark.column, width, lines)


def _at(at: Place, line: int, column: int, width: int, lines: Sequence[str]) -> Place:
    """A place inside the text that stands at ``at``; an argument is shown whole, a file by its line."""
    if at.column is not None:
        rest = len(at.source) - (at.column - 1) - column
        return Place(at.file, None, at.column + column, at.source, min(width, max(rest, 1)))
    source = lines[line] if line < len(lines) else ""
    return Place(at.file, line + 1, column + 1, source, min(width, max(len(source) - column, 1)))
