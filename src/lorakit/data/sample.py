"""The one shape that every data format becomes: a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks.
        content: the text.
        tool_calls: what the assistant asks for, as OpenAI writes it: ``{"name": …, "arguments": {…}}`` each.
        train: whether the turn carries loss; None leaves it to the policy (assistant turns do).
        thinking: reasoning that stands before the answer, for templates that know it.
    """

    role: Role
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    train: bool | None = None
    thinking: str | None = None


@dataclass(frozen=True)
class Sample:
    """A conversation of at least one assistant turn, and the place it was read from (``file:row``).

    Attributes:
        messages: the turns.
        place: ``file:row``.
        tools: descriptions of the tools that the assistant may call (JSON schema, as OpenAI writes them).
        kind: chat is rendered by a template; completion is prompt and answer as they stand; text is all answer.
        label: the class of a classification row.
    """

    messages: tuple[Message, ...]
    place: str
    tools: tuple[Mapping[str, Any], ...] = ()
    kind: Literal["chat", "completion", "text"] = "chat"
    label: str | None = None

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
