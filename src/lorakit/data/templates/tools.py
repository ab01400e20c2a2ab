"""How tools are described to a model and how it calls them, by LLaMA-Factory's names: two jinja macros each.

``describe(tools)`` is added to the system message; ``calls(items)`` is what the assistant says. Both get what
OpenAI writes: ``{"type": "function", "function": {…}}``.
"""

from __future__ import annotations

_DEFAULT = r"""
{%- macro describe(tools) -%}
{{- 'You have access to the following tools:\n' -}}
{%- for tool in tools -%}
{%- set function = tool.function -%}
{%- set parameters = function.parameters or {} -%}
{{- '> Tool Name: ' ~ function.name ~ '\nTool Description: ' ~ (function.description or '') -}}
{{- '\nTool Args:\n' -}}
{%- for name, parameter in (parameters.properties or {}).items() -%}
{{- '  - ' ~ name ~ ' (' ~ (parameter.type or '') -}}
{{- (', required' if name in (parameters.required or []) else '') ~ '): ' ~ (parameter.description or '') -}}
{{- (', should be one of [' ~ parameter.enum | join(', ') ~ ']') if parameter.enum else '' -}}
{{- (', where each item should be ' ~ (parameter.get('items').type or '')) if parameter.get('items') else '' -}}
{{- '\n' -}}
{%- endfor -%}
{{- '\n' -}}
{%- endfor -%}
{{- 'Use the following format if using a tool:\n```\nAction: tool name (one of [' -}}
{{- tools | map(attribute='function.name') | join(', ') -}}
{{- '])\nAction Input: the input to the tool, in a JSON format representing the kwargs ' -}}
{{- '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n' -}}
{%- endmacro -%}
{%- macro calls(items) -%}
{%- for item in items -%}
{{- '' if loop.first else '\n' -}}
{{- 'Action: ' ~ item.function.name ~ '\nAction Input: ' ~ item.function.arguments | tojson -}}
{%- endfor -%}
{%- endmacro -%}
"""

# The date is the one that Llama 3.1's own template falls back on: today's would make each day another prompt.
_LLAMA3 = r"""
{%- macro describe(tools) -%}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' -}}
{{- 'You have access to the following functions. To call a function, please respond with JSON for a ' -}}
{{- 'function call. Respond in the format {"name": function name, "parameters": dictionary of argument ' -}}
{{- 'name and its value}. Do not use variables.\n\n' -}}
{%- for tool in tools -%}
{{- tool | tojson(indent=4) ~ '\n\n' -}}
{%- endfor -%}
{%- endmacro -%}
{%- macro calls(items) -%}
{{- '[' if items | length > 1 else '' -}}
{%- for item in items -%}
{{- '' if loop.first else ', ' -}}
{{- {'name': item.function.name, 'parameters': item.function.arguments} | tojson -}}
{%- endfor -%}
{{- ']' if items | length > 1 else '' -}}
{%- endmacro -%}
"""

_MISTRAL = r"""
{%- macro describe(tools) -%}
{{- '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}
{%- endmacro -%}
{%- macro calls(items) -%}
{{- '[' -}}
{%- for item in items -%}
{{- '' if loop.first else ', ' -}}
{{- {'name': item.function.name, 'arguments': item.function.arguments} | tojson -}}
{%- endfor -%}
{{- ']' -}}
{%- endmacro -%}
"""

_QWEN = r"""
{%- macro describe(tools) -%}
{{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
{%- for tool in tools -%}
{{- '\n' ~ tool | tojson -}}
{%- endfor -%}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' -}}
{{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, ' -}}
{{- '"arguments": <args-json-object>}\n</tool_call>' -}}
{%- endmacro -%}
{%- macro calls(items) -%}
{%- for item in items -%}
{{- '' if loop.first else '\n' -}}
{{- '<tool_call>\n' -}}
{{- {'name': item.function.name, 'arguments': item.function.arguments} | tojson -}}
{{- '\n</tool_call>' -}}
{%- endfor -%}
{%- endmacro -%}
"""

TOOL_FORMATS: dict[str, str] = {"default": _DEFAULT, "llama3": _LLAMA3, "mistral": _MISTRAL, "qwen": _QWEN}
