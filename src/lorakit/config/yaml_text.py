"""Values as YAML 1.2 on one line, for the files that lorakit writes."""

from __future__ import annotations

import json
import re
from typing import Any

_PLAIN_TEXT = re.compile(r"[A-Za-z/][A-Za-z0-9_./+-]*")
_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # YAML 1.1's, too


def scalar(value: Any) -> str:
    """A value of a configuration; a text is quoted where it could be read as something else."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, tuple):
        return f"[{', '.join(scalar(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)


def _quoted(text: str) -> str:
    if _PLAIN_TEXT.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    escapes = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'
