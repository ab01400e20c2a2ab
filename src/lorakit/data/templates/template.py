"""A chat template ready to use: the tokenizer's own, or a named family's, with the user's settings written in.

Whatever was chosen ends as the text of one jinja template. Training renders it, the adapter's folder keeps it
(``chat_template.jinja``), and generation renders the kept one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.sample import Message
from lorakit.data.templates.families import FAMILIES, quoted, to_jinja
from lorakit.data.templates.sandbox import TemplateRefusedError, render_jinja
from lorakit.data.templates.tools import TOOL_FORMATS
from lorakit.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "auto"  # the name of the tokenizer's own template
TEMPLATE_FILE = "chat_template.jinja"
TOOL_TEMPLATE_FILE = "chat_template_tools.jinja"


@dataclass(frozen=True)
class Template:
    """How conversations become text.

    Attributes:
        name: ``auto`` or a family's.
        source: the jinja template; empty where the tokenizer has none, which plain text does not need.
        tool_source: another one for conversations with tools, where the tokenizer has two.
        cuts: whether an answer is tokenised apart from what stands before it, as named families are: where
            no special token parts them, a token could otherwise reach across, which generation never sees.
        variables: the special tokens that templates may write.
    """

    name: str
    source: str
    tool_source: str | None = None
    cuts: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        ask: bool = False,
        place: str | None = None,
    ) -> str:
        """The conversation as text; with ``ask``, ended by what makes the model answer.

        Raises:
            DataError: the template refuses the conversation, or breaks a bound.
        """
        source = self.tool_source if tools and self.tool_source else self.source
        if not source:
            raise DataError(
                "the model's tokenizer has no chat template",
                place=place,
                remedy="name one with template: chatml (or another), or take an instruction-tuned model",
            )
        values = {
            **self.variables,
            "messages": [_turn(message) for message in messages],
            "tools": [_tool(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": ask,
        }
        try:
            return render_jinja(source, values)
        except TemplateRefusedError as error:
            raise DataError(
                f"the chat template refuses this conversation: {error}",
                place=place,
                remedy="repair the row, or choose another template",
            ) from error

    def files(self) -> dict[str, str]:
        """What an adapter's folder keeps of the template; `kept_template` reads it."""
        kept = {TEMPLATE_FILE: self.source, TOOL_TEMPLATE_FILE: self.tool_source}
        return {name: source for name, source in kept.items() if source}

    def notes(self) -> dict[str, Any]:
        """What else must be known of it."""
        return {"name": self.name, "cuts": self.cuts}

    def into(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make this the tokenizer's own template, which is saved with it."""
        pair = {"default": self.source, "tool_use": self.tool_source}
        tokenizer.chat_template = pair if self.tool_source else self.source


def find_template(
    tokenizer: PreTrainedTokenizerBase,
    name: str = OWN,
    *,
    default_system: str | None = None,
    enable_thinking: bool | None = None,
    tool_format: str | None = None,
) -> Template:
    """The template of that name with the settings written in.

    Args:
        tokenizer: whose template ``auto`` means, and whose special tokens are written.
        name: ``auto`` or a family (`FAMILIES`).
        default_system: system message of conversations that bring none.
        enable_thinking: what templates with reasoning are told; None leaves it to them.
        tool_format: how a named family words tools, if not in its own way (`TOOL_FORMATS`).

    Raises:
        DataError: the tokenizer has several templates, and none of them is the main one.
        UsageError: no such family or tool format.
    """
    if name == OWN:
        template = _own(tokenizer)
        if default_system and template.source:
            template = _prefixed(template, _SYSTEM.format(quoted(default_system)))
    else:
        family = _chosen(FAMILIES, name, "template")
        if default_system is not None:
            family = replace(family, default_system=default_system)
        if tool_format is not None:
            _chosen(TOOL_FORMATS, tool_format, "tool_format")
            family = replace(family, tool_format=tool_format)
        template = Template(name, to_jinja(family), cuts=True, variables=_special_tokens(tokenizer))
    if enable_thinking is not None and template.source:
        template = _prefixed(template, f"{{% set enable_thinking = {str(enable_thinking).lower()} +%}}")
    return template


def kept_template(
    tokenizer: PreTrainedTokenizerBase, folder: Path, notes: Mapping[str, Any]
) -> Template | None:
    """The template that an adapter's folder keeps, or None; ``notes`` are those of `Template.notes`."""
    try:
        source = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        second = folder / TOOL_TEMPLATE_FILE
        tool_source = second.read_text(encoding="utf-8") if second.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None
    return Template(
        str(notes.get("name", OWN)),
        source,
        tool_source,
        cuts=notes.get("cuts") is True,
        variables=_special_tokens(tokenizer),
    )


# Written before a tokenizer's own template; "+%}" leaves a line break that may follow alone.
_SYSTEM = (
    "{{% if messages[0].role != 'system' %}}"
    "{{% set messages = [{{'role': 'system', 'content': {}}}] + messages %}}{{% endif +%}}"
)


def _own(tokenizer: PreTrainedTokenizerBase) -> Template:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise DataError("the tokenizer has several chat templates, but none is called default")
        return Template(OWN, own["default"], own.get("tool_use"), variables=_special_tokens(tokenizer))
    return Template(OWN, own or "", variables=_special_tokens(tokenizer))


def _prefixed(template: Template, prefix: str) -> Template:
    tool_source = template.tool_source and prefix + template.tool_source
    return replace(template, source=prefix + template.source, tool_source=tool_source)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def _chosen(table: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise UsageError(f"there is no {key} called {name}", remedy=f"known: {', '.join(sorted(table))}")
    return table[name]


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it: what OpenAI's interface would hold."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking is not None:
        turn["reasoning_content"] = message.thinking
    if message.tool_calls:
        turn["tool_calls"] = [{"type": "function", "function": dict(call)} for call in message.tool_calls]
    return turn


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
