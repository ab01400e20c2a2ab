"""Chat templates: the tokenizer's own and those of common families, rendered within bounds."""

from lorakit.data.templates.template import Template, find_template, kept_template

__all__ = ["Template", "find_template", "kept_template"]
