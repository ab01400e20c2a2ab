"""The one shape that every data format becomes: a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Sample:
    """A conversation of at least one assistant turn, and the place it was read from (``file:row``)."""

    messages: tuple[Message, ...]
    place: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last assistant turn."""
        return self.messages[: self._last]

    @property
    def reference(self) -> str:
        """The last assistant turn: what a model should answer to `prompt`."""
        return self.messages[self._last].content

    @property
    def system(self) -> str | None:
        """The system message, if the conversation opens with one."""
        first = self.messages[0]
        return first.content if first.role == "system" else None

    @property
    def _last(self) -> int:
        return max(i for i, message in enumerate(self.messages) if message.role == "assistant")


def shared_system(samples: list[Sample]) -> str | None:
    """The system message that every sample has, so that generation can use the same one; else None."""
    systems = {sample.system for sample in samples}
    return systems.pop() if len(systems) == 1 else None
