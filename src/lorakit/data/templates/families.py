"""The conversation formats of common model families, by LLaMA-Factory's names: one row of data each.

A row says how each kind of turn is written: ``{content}`` is the text, ``{bos}`` and ``{eos}`` the model's own
tokens. `to_jinja` turns a row into an ordinary chat template, so that one renderer serves them all and any
other program can use what was trained with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lorakit.data.templates.tools import TOOL_FORMATS


@dataclass(frozen=True)
class Family:
    """How one family writes a conversation.

    Attributes:
        user: a question.
        ask: what makes the model answer, written before each answer.
        answer: an answer with the token that ends it.
        system: the system message.
        tool: what a tool returned; written like a question if None.
        call: an answer that calls tools; written like any other if None.
        prefix: stands at the very beginning.
        default_system: used where the conversation brings no system message.
        system_in_user: the system message is part of the first question.
        thought: what opens and closes the reasoning before an answer; None if the family has none.
        tool_format: how tools and calls are worded.
    """

    user: str
    ask: str = ""
    answer: str = "{content}{eos}"
    system: str = "{content}"
    tool: str | None = None
    call: str | None = None
    prefix: str = ""
    default_system: str = ""
    system_in_user: bool = False
    thought: tuple[str, str] | None = None
    tool_format: str = "default"


_CHATML = Family(
    user="<|im_start|>user\n{content}<|im_end|>\n",
    ask="<|im_start|>assistant\n",
    answer="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    tool="<|im_start|>tool\n{content}<|im_end|>\n",
)
_QWEN = replace(
    _CHATML,
    tool="<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n",
    tool_format="qwen",
)
_THOUGHT = ("<think>\n", "\n</think>\n\n")
_GEMMA = Family(
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    ask="<start_of_turn>model\n",
    answer="{content}<end_of_turn>\n",
    system="{content}\n\n",
    tool="<start_of_turn>tool\n{content}<end_of_turn>\n",
    prefix="{bos}",
    system_in_user=True,
)
_LLAMA3 = Family(
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    ask="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{content}<|eot_id|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    tool="<|start_header_id|>ipython<|end_header_id|>\n\n{content}<|eot_id|>",
    prefix="{bos}",
    tool_format="llama3",
)
_DEEPSEEK3 = Family(user="<｜User｜>{content}", ask="<｜Assistant｜>", prefix="{bos}")  # noqa: RUF001
_MINISTRAL = Family(
    user="[INST]{content}[/INST]",
    system="{content}\n\n",
    tool='[TOOL_RESULTS]{"content": {content}}[/TOOL_RESULTS]',
    call="[TOOL_CALLS]{content}{eos}",
    prefix="{bos}",
    system_in_user=True,
    tool_format="mistral",
)

FAMILIES: dict[str, Family] = {
    "alpaca": Family(
        user="### Instruction:\n{content}\n\n",
        ask="### Response:\n",
        answer="{content}{eos}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "chatml": _CHATML,
    "cohere": Family(
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        ask="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        prefix="{bos}",
    ),
    "cpm3": replace(_CHATML, prefix="{bos}"),
    "deepseek": Family(user="User: {content}\n\n", ask="Assistant:", system="{content}\n\n", prefix="{bos}"),
    "deepseek3": _DEEPSEEK3,
    "deepseekr1": replace(_DEEPSEEK3, thought=_THOUGHT),
    "default": Family(
        user="Human: {content}{eos}\n",
        ask="Assistant:",
        answer="{content}{eos}\n",
        system="System: {content}{eos}\n",
    ),
    "exaone": Family(
        user="[|user|]{content}\n",
        ask="[|assistant|]",
        answer="{content}{eos}\n",
        system="[|system|]{content}[|endofturn|]\n",
    ),
    "falcon_h1": replace(_CHATML, prefix="{bos}"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "granite3": Family(
        user="<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n",
        ask="<|start_of_role|>assistant<|end_of_role|>",
        answer="{content}<|end_of_text|>\n",
        system="<|start_of_role|>system<|end_of_role|>{content}<|end_of_text|>\n",
    ),
    "llama2": Family(
        user="{bos}[INST] {content} [/INST]",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
    ),
    "llama3": _LLAMA3,
    "llama4": Family(
        user="<|header_start|>user<|header_end|>\n\n{content}<|eot|>",
        ask="<|header_start|>assistant<|header_end|>\n\n",
        answer="{content}<|eot|>",
        system="<|header_start|>system<|header_end|>\n\n{content}<|eot|>",
        tool="<|header_start|>ipython<|header_end|>\n\n{content}<|eot|>",
        prefix="{bos}",
        tool_format="llama3",
    ),
    "ministral": _MINISTRAL,
    "mistral": replace(
        _MINISTRAL,
        user="[INST] {content}[/INST]",
        answer=" {content}{eos}",
        tool='[TOOL_RESULTS] {"content": {content}}[/TOOL_RESULTS]',
        call="[TOOL_CALLS] {content}{eos}",
    ),
    "mistral_small": replace(
        _MINISTRAL, system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]", system_in_user=False
    ),
    "openchat": Family(user="GPT4 Correct User: {content}{eos}", ask="GPT4 Correct Assistant:", prefix="{bos}"),
    "phi": Family(
        user="<|user|>\n{content}<|end|>\n",
        ask="<|assistant|>\n",
        answer="{content}<|end|>\n",
        system="<|system|>\n{content}<|end|>\n",
    ),
    "phi4": Family(
        user="<|im_start|>user<|im_sep|>{content}<|im_end|>",
        ask="<|im_start|>assistant<|im_sep|>",
        answer="{content}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
    ),
    "qwen": replace(
        _QWEN, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "qwen3": replace(_QWEN, thought=_THOUGHT),
    "qwen3_nothink": _QWEN,
    "smollm": _CHATML,
    "smollm2": replace(
        _CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."
    ),
    "vicuna": Family(
        user="USER: {content} ",
        ask="ASSISTANT:",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": _CHATML,
    "zephyr": Family(
        user="<|user|>\n{content}{eos}",
        ask="<|assistant|>\n",
        system="<|system|>\n{content}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
}


# What all families share. A thought is kept only in answers to the last question, and an empty one is written
# where there is none, as the models with thoughts expect it.
_START = """
{%- set ns = namespace(system=default_system, query=-1) -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
{%- set turns = messages[1:] -%}
{%- set ns.system = messages[0].content or default_system -%}
{%- endif -%}
{%- if tools -%}
{%- set ns.system = ns.system ~ describe(tools) -%}
{%- endif -%}
"""
_SYSTEM_FIRST = """
{{- prefix ~ (system(ns.system) if ns.system else '') -}}
{%- for message in turns -%}
{%- set content = message.content -%}
"""
_SYSTEM_IN_USER = """
{{- prefix -}}
{%- for message in turns -%}
{%- set content = message.content -%}
{%- if loop.first and ns.system -%}
{%- if message.role != 'user' -%}
{{- raise_exception('the system message goes into the first question, but the first turn is none') -}}
{%- endif -%}
{%- set content = system(ns.system) ~ content -%}
{%- endif -%}
"""
_TURN = """
{%- if message.role == 'user' -%}
{{- user(content) -}}
{%- elif message.role == 'tool' -%}
{{- tool(content) -}}
{%- elif message.role == 'assistant' -%}
{{- ask -}}
"""
_THINK = """
{%- set thinking = message.reasoning_content or '' -%}
{%- if not thinking and closing in content -%}
{%- set thinking = content.split(closing)[0].rstrip('\\n').split(opening)[-1].lstrip('\\n') -%}
{%- set content = content.split(closing)[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.query and (loop.last or thinking) -%}
{{- opens ~ ('' if silent else thinking.strip('\\n')) ~ closes -}}
{%- set content = content.lstrip('\\n') -%}
{%- endif -%}
"""
_ANSWER = """
{%- if message.tool_calls -%}
{{- call(content ~ ('\\n' if content else '') ~ calls(message.tool_calls)) -}}
{%- else -%}
{{- answer(content) -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
"""
_QUERY = """
{%- set silent = enable_thinking is defined and not enable_thinking -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{%- set ns.query = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
"""


def to_jinja(family: Family) -> str:
    """The row as a chat template."""
    opens, closes = family.thought or ("", "")
    values = {"default_system": family.default_system, "prefix": family.prefix, "ask": family.ask}
    if family.thought:
        values |= {"opens": opens, "closes": closes, "opening": opens.strip(), "closing": closes.strip()}
    macros = {
        "system": family.system,
        "user": family.user,
        "tool": family.tool or family.user,
        "answer": family.answer,
        "call": family.call or family.answer,
    }
    parts = [
        *(f"{{%- set {name} = {_expression(text)} -%}}" for name, text in values.items()),
        *(
            f"{{%- macro {name}(content) -%}}{{{{- {_expression(text)} -}}}}{{%- endmacro -%}}"
            for name, text in macros.items()
        ),
        TOOL_FORMATS[family.tool_format],
        _START,
        _QUERY if family.thought else "",
        _SYSTEM_IN_USER if family.system_in_user else _SYSTEM_FIRST,
        _TURN,
        _THINK if family.thought else "",
        _ANSWER,
        "{{- ask ~ (opens ~ closes if silent else '') -}}" if family.thought else "{{- ask -}}",
        "{%- endif -%}",
    ]
    return "\n".join(part.strip("\n") for part in parts if part)


def quoted(text: str) -> str:
    """A text as a literal of jinja."""
    for raw, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(raw, escaped)
    return f"'{text}'"


def _expression(slot: str) -> str:
    """``"{bos}[INST] {content}"`` as ``bos_token ~ '[INST] ' ~ content``."""
    names = {"{content}": "content", "{bos}": "(bos_token or '')", "{eos}": "eos_token"}
    parts = [part for part in re.split(r"(\{content\}|\{bos\}|\{eos\})", slot) if part]
    return " ~ ".join(names.get(part) or quoted(part) for part in parts) or "''"
