"""Products on 8-bit integers with a frozen weight W[o, i] = codes[o, i] · scale[o].

Activations are rounded to 8 bits row by row as they come (LLM.int8, arXiv 2208.07339, §2.1), products are
summed exactly in 32 bits, and the scales are multiplied in afterwards. Processors with integer matrix
instructions do this at twice the rate of bf16. `times` is x Wᵀ, `back` is g W: there scale[o] stands on the
axis that is summed over, so it goes into g before that is rounded.

Rounding costs precision where a row has outliers: few large entries leave few steps to all others. In language
models they stand in the same few columns for all tokens, so the `_OUTLIERS` largest columns are multiplied in
the dtype of x instead (the mixed decomposition of LLM.int8, §3, with a count in place of its threshold): 1.6 %
of the work at 2048 columns, and a third to a tenth of the error.

Every product is first tried on a sample of rows and columns. If that is off by more than `BOUND` there is none,
the caller multiplies with the dense weight, and the layer's `Tally` says how often that was. Nothing is decided
for good: the same input gives the same product, also when activation checkpointing computes it again.

Shapes: x [N, I], g [N, O], codes int8 [O, I], scale float32 [O].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit import hardware
from lorakit.log import logger
from lorakit.ops import buffers, native

BOUND = 0.05  # relative error of a product; on SmolLM2 0.002 to 0.03 forwards, 0.002 to 0.05 backwards
_ROWS, _COLUMNS = 16, 48  # the sample that is measured
_OUTLIERS = 32  # columns, of at least eight times as many
_FEW, _NARROW = 32, 512  # rows; the narrowest weight that pays for more of them
_COMPILED_FROM = 1 << 18  # numbers in a tensor for which a compiled pass is worth its call


@dataclass
class Tally:
    """How the integer products of one layer went."""

    calls: int = 0
    dense: int = 0  # how many of them were left to the dense weight
    worst: float = 0.0  # the largest relative error seen

    def note(self, error: float) -> bool:
        """Count one product; whether its error is acceptable (NaN is not)."""
        self.calls += 1
        self.worst = max(self.worst, error)
        good = error <= BOUND
        self.dense += not good
        return good


def times(
    x_NI: Tensor, codes_OI: Tensor, scale_O: Tensor, tally: Tally, threshold: float = 0.0
) -> Tensor | None:
    """x Wᵀ [N, O] in the dtype of x, or None where integers do not serve or are too far off.

    With ``threshold`` outliers are the columns of x that hold an entry of at least this magnitude.
    """
    if not _usable(x_NI, codes_OI):
        return None
    if threshold:
        outliers = (x_NI.abs().amax(0) >= threshold).nonzero()[:, 0]
    else:
        outliers = _largest(x_NI[_sample(len(x_NI), _ROWS)])
    weigh_I = x_NI.new_ones(x_NI.shape[1], dtype=torch.float32).index_fill_(0, outliers, 0.0)
    o = _sample(len(scale_O), _COLUMNS)
    if not tally.note(_error(x_NI, weigh_I, outliers, (codes_OI[o] * scale_O[o, None]).T)):
        return None
    if _whole(x_NI, outliers):
        return _product(x_NI, weigh_I, outliers, codes_OI, scale_O, back=False)
    x8_NI, step_N = _rounded(x_NI, weigh_I)
    y_NO: Tensor = _rescaled(torch._int_mm(x8_NI, codes_OI.T), step_N, scale_O, x_NI)
    W_OK: Tensor = _pass(columns, x_NI)(codes_OI, scale_O, outliers, x_NI.dtype)
    return y_NO.addmm_(x_NI[:, outliers], W_OK.T)


def back(g_NO: Tensor, codes_OI: Tensor, scale_O: Tensor, tally: Tally) -> Tensor | None:
    """g W [N, I] in the dtype of g, or None as `times`."""
    if not _usable(g_NO, codes_OI):
        return None
    outliers = _largest(g_NO[_sample(len(g_NO), _ROWS)] * scale_O)
    weigh_O = scale_O.index_fill(0, outliers, 0.0)
    i = _sample(codes_OI.shape[1], _COLUMNS)
    if not tally.note(_error(g_NO, weigh_O, outliers, codes_OI[:, i] * scale_O[:, None])):
        return None
    if _whole(g_NO, outliers):
        return _product(g_NO, weigh_O, outliers, codes_OI, scale_O, back=True)
    g8_NO, step_N = _rounded(g_NO, weigh_O)
    gx_NI: Tensor = _rescaled(torch._int_mm(g8_NO, codes_OI), step_N, None, g_NO)
    W_KI = codes_OI[outliers] * scale_O[outliers, None]
    return gx_NI.addmm_(g_NO[:, outliers], W_KI.to(g_NO.dtype))


def _usable(x_NI: Tensor, codes_OI: Tensor) -> bool:
    """Whether integers pay here: instructions for them, and on a GPU the sizes that its product takes.

    The GPU's conditions are those of `torch._int_mm`'s documentation; they were not run on one.
    """
    if x_NI.dtype == torch.float64 or not hardware.integer_products():
        return False
    if x_NI.device.type != "cpu":
        return len(x_NI) > 16 and not any(size % 8 for size in codes_OI.shape)
    # Rounding is a pass over the input, however narrow the weight. A few rows, as in generation, are cheap to
    # round, and would else unpack the whole weight.
    return len(x_NI) <= _FEW or min(codes_OI.shape) >= _NARROW


def _whole(x_NI: Tensor, outliers: Tensor) -> bool:
    """Whether matrix units make the product in one C++ pass, rounding, scales and outliers included."""
    few = len(outliers) <= _OUTLIERS
    return few and x_NI.dtype == torch.bfloat16 and native.fits(x_NI) and native.matrix_units()


def _product(
    x_NI: Tensor, weigh_I: Tensor, outliers: Tensor, codes: Tensor, scale: Tensor, *, back: bool
) -> Tensor:
    """What `_rounded`, the integer product, `_rescaled` and the outliers' product give together."""
    rows, depth = x_NI.shape
    columns = codes.shape[1 if back else 0]
    padded = -(-rows // 32) * 32
    places = outliers.new_full((_OUTLIERS,), -1)
    places[: len(outliers)] = outliers
    tiles = buffers.empty((padded * (-(-depth // 64) * 64),), torch.int8)
    step_N = buffers.empty((padded,), torch.float32)
    beside_NK = buffers.empty((padded, _OUTLIERS), x_NI.dtype)
    y = buffers.empty((rows, columns), x_NI.dtype)
    space = (tiles, step_N, beside_NK)
    given = (x_NI, weigh_I.float(), places, codes, scale, *space)
    native.run("int8_product", x_NI.dtype, *given, y, rows, depth, columns, int(back))
    return y


def quantise_rows(x_NI: Tensor, weigh_I: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, I] in ±127 and the step [N, 1] of each row, so that x · weigh ≈ codes · step."""
    weighed = x_NI.float() * weigh_I
    step_N = (weighed.abs().amax(1, keepdim=True) * (1 / 127)).clamp_min(1e-38)
    return (weighed / step_N).round().to(torch.int8), step_N


def rescale(sums: Tensor, step_N: Tensor, scale_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Integer sums [N, O] times the scales of their row and column."""
    wide = sums.float() * step_N
    return (wide if scale_O is None else wide * scale_O).to(dtype)


def _rounded(x_NI: Tensor, weigh_I: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows`, by a C++ pass where there is one."""
    if not native.fits(x_NI):
        rounded: tuple[Tensor, Tensor] = _pass(quantise_rows, x_NI)(x_NI, weigh_I)
        return rounded
    codes_NI, step_N = (
        buffers.empty_like(x_NI, torch.int8),
        buffers.empty((len(x_NI), 1), torch.float32),
    )
    native.run("quantise_rows", x_NI.dtype, x_NI, weigh_I.float(), codes_NI, step_N, *x_NI.shape)
    return codes_NI, step_N


def _rescaled(sums: Tensor, step_N: Tensor, scale_O: Tensor | None, like: Tensor) -> Tensor:
    """`rescale` to the dtype of ``like``, by a C++ pass where there is one."""
    if not native.fits(like):
        scaled: Tensor = _pass(rescale, like)(sums, step_N, scale_O, like.dtype)
        return scaled
    y = buffers.empty_like(sums, like.dtype)
    native.run("rescale", like.dtype, sums, step_N, scale_O, y, *sums.shape)
    return y


def columns(codes_OI: Tensor, scale_O: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """The chosen columns of the dense weight."""
    return (codes_OI[:, chosen] * scale_O[:, None]).to(dtype)


def _pass(function: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    """``function``, for large tensors compiled into one pass over memory."""
    worth = like.numel() >= _COMPILED_FROM and not torch.compiler.is_compiling()
    return _compiled(function) if worth and hardware.compiler() else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function compiled; should the compiler fail, the function as it is."""
    fast = torch.compile(function, dynamic=True)
    broken = False

    def run(*operands: Any) -> Any:
        nonlocal broken
        if not broken:
            try:
                return fast(*operands)
            except RuntimeError as error:
                broken = True
                logger.warning("8-bit passes stay uncompiled, which is slower: %.200s", error)
        return function(*operands)

    return run


def _sample(size: int, count: int, *, between: bool = False) -> slice:
    """At most ``count`` of ``size`` places, evenly spread; ``between`` gives others, if there are any."""
    step = max(1, -(-size // count))
    return slice(step // 2 if between else 0, None, step)


def _largest(x: Tensor) -> Tensor:
    """The columns with the largest entries: always the same number of them, so that timings do not jump."""
    return x.abs().amax(0).topk(min(_OUTLIERS, x.shape[1] // 8)).indices if len(x) else x.new_empty(0).long()


def _error(x_NI: Tensor, weigh_I: Tensor, outliers: Tensor, W_IK: Tensor) -> float:
    """What rounding changes in x W on a sample of rows: root mean square of the rows' relative errors.

    W_IK is in the units of x; ``weigh_I`` may hold a scale of its rows.
    """
    # Not the rows that chose the outliers: those know theirs.
    x = x_NI[_sample(len(x_NI), _ROWS, between=True)].float()
    if not len(x):
        return 0.0
    codes, step = quantise_rows(x, weigh_I)
    rounded = codes * step / weigh_I.where(weigh_I != 0, 1.0)
    rounded[:, outliers] = x[:, outliers]
    off, exact = (torch.cat([rounded - x, x]) @ W_IK).square().sum(1).chunk(2)
    return float((off / exact.clamp_min(1e-38)).mean().sqrt())
