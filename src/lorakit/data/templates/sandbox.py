"""Jinja templates that come with a model, rendered within bounds: time, size, depth.

A chat template is a program by somebody else. It runs in jinja2's immutable sandbox, as transformers runs it,
and here every loop turn also looks at the clock, every text that is built is measured, and numbers that would
blow one up are refused. What a template may call is what transformers gives it, so that both write the same.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinMethodType
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
MAX_CHARACTERS = 64_000_000  # a row of 10 MB must pass, tool descriptions and all
_MAX_POWER = 64
_SIZED = (str, list, tuple)
_WIDE = re.compile(r"[0-9]{6}|%[^%]*\*")


class TemplateRefusedError(Exception):
    """The template could not be rendered; the message says why, in words for the user."""


def render_jinja(source: str, variables: Mapping[str, Any]) -> str:
    """The text that ``source`` writes.

    Raises:
        TemplateRefusedError: it is no template, raises an error, or breaks a bound.
    """
    try:
        environment, template = _compiled(source)
        environment.start()
        pieces, size = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            environment.check(size)
        return "".join(pieces)
    except RecursionError:
        raise TemplateRefusedError("it calls itself without end") from None
    except MemoryError:
        raise TemplateRefusedError("it asks for more memory than there is") from None
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise TemplateRefusedError(str(error) or type(error).__name__) from error


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox with a clock and a measure."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._deadline = 0.0
        self.filters |= {"tojson": _to_json, "format": _format, "join": self._join, "replace": self._replace}
        self.filters |= {_TICK: self._ticking, _MEASURE: self._measured}
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }

    def start(self) -> None:
        """Wind the clock up."""
        self._deadline = time.monotonic() + MAX_SECONDS

    def check(self, size: int) -> None:
        """Refuse a text of this size, and a template that has run for too long."""
        if size > MAX_CHARACTERS:
            raise SecurityError(f"it writes more than {MAX_CHARACTERS // 1_000_000} million characters")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} seconds")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measure before computing: a product of a text and a number is refused before it exists."""
        if operator == "+":
            if isinstance(left, _SIZED) and isinstance(right, _SIZED):
                # The most frequent operation of all: no call, and no look at the clock.
                size = len(left) + len(right)
                if size > MAX_CHARACTERS:
                    self.check(size)
            return left + right
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, _SIZED) and isinstance(times, int):
                    self.check(len(repeated) * times)
        elif operator == "**" and isinstance(right, int) and abs(right) > _MAX_POWER:
            raise SecurityError("it raises a number to a power that is too high")
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call, with no huge number as an argument and no huge text as the result."""
        for value in (*args, *kwargs.values()):
            self._measured(value)
        if isinstance(obj, BuiltinMethodType) and isinstance(obj.__self__, str):
            if obj.__name__ == "replace":
                self._replace(obj.__self__, *args)
            elif obj.__name__ == "join":
                self.check(len(obj.__self__) * len(list(*args)))
        return self._measured(super().call(context, obj, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """What the sandbox allows; it need not look into ``loop``, which most templates ask each turn."""
        if isinstance(obj, LoopContext) and not attribute.startswith("_"):
            return Environment.getattr(self, obj, attribute)
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's ``"…".format``, for a text without enormous widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def _ticking(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check(0)
            yield item

    def _measured(self, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > MAX_CHARACTERS:
            raise SecurityError("it works with a number that is too large")
        self.check(len(value) if isinstance(value, _SIZED) else 0)
        return value

    def _join(self, items: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
        texts = [str(item if attribute is None else self.getitem(item, attribute)) for item in items]
        self.check(len(between) * len(texts) + sum(map(len, texts)))
        return between.join(texts)

    def _replace(self, text: str, old: str, new: str, *count: int) -> str:
        self.check(text.count(old) * len(new))
        return text.replace(old, new, *count)


_TICK, _MEASURE = "lorakit_tick", "lorakit_measure"


class _Instrument(NodeTransformer):
    """Puts the clock into every loop, and the measure around every joined text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # jinja2's naming
        self.generic_visit(node)
        node.iter = _wrapped(_TICK, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  # jinja2's naming
        self.generic_visit(node)
        return _wrapped(_MEASURE, node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802  # jinja2's naming
        self.generic_visit(node)
        node.args = [_wrapped(_MEASURE, argument) for argument in node.args]
        return node if node.node is None else _wrapped(_MEASURE, node)


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}`` mark what the assistant says; the text is the same."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _wrapped(function: str, inner: nodes.Node) -> nodes.Expr:
    """As a filter: the template calls these without the sandbox in between, which would cost more than they."""
    assert isinstance(inner, nodes.Expr)
    return nodes.Filter(inner, function, [], [], None, None, lineno=inner.lineno)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[_Bounded, Any]:
    environment = _Bounded()
    tree = _Instrument().visit(environment.parse(source))
    code = environment.compile(tree)
    # A plain dictionary: make_globals() gives a ChainMap, which every rendering copies, slowly.
    return environment, environment.template_class.from_code(environment, code, dict(environment.globals))


def _check_widths(form: str) -> None:
    """Refuse a field as wide as a book: the text would be built before it can be measured."""
    if _WIDE.search(form):
        raise SecurityError("it formats text with a width that is too large")


def _format(form: str, *values: Any, **named: Any) -> str:
    _check_widths(form)
    return form % (named or values)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that jinja2 adds for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
