"""bitsandbytes' layers as stores, and lorakit's as bitsandbytes' layers; nothing is copied either way.

Views are found by the type's full name, so that bitsandbytes is imported only to make its layers. Its CUDA
kernels were not run on a GPU for this; its CPU kernels are what the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError, UsageError
from lorakit.ops.frozen import back, times
from lorakit.ops.products import FourBits
from lorakit.quant.blockwise import CONSTANTS_BLOCK, FourBit, kernel_fits
from lorakit.quant.codebooks import codebook
from lorakit.quant.formats import Format
from lorakit.quant.int8 import Int8
from lorakit.quant.kernels import installed
from lorakit.quant.modules import QuantLinear

# What can be viewed, by full type name.
BITSANDBYTES = tuple(
    f"bitsandbytes.nn.modules.{name}" for name in ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt")
)
_LANES = 32  # output units that bitsandbytes interleaves for its product on a CPU


class BitsandbytesView:
    """The weight of a ``Linear4bit`` or ``Linear8bitLt`` as a store."""

    lossless: ClassVar[bool] = False

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def name(self) -> str:
        """nf4, fp4 or int8."""
        return self.parts()[0].name

    @property
    def bits_per_parameter(self) -> float:
        """Bits that one number takes, constants included."""
        return 8 * sum(tensor.nbytes for tensor in self.parts()[1].values()) / math.prod(self.shape)

    @property
    def fusable(self) -> bool:
        """Not on a GPU, where its kernels multiply; nor in 8 bits, where it decides how."""
        return "compute_dtype" in self._layer.__dict__ and self._layer.weight.device.type == "cpu"

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the products; an 8-bit layer takes its input's, for which its bias stands here."""
        layer = self._layer
        if "compute_dtype" in layer.__dict__:
            dtype: torch.dtype = layer.compute_dtype or layer.weight.quant_state.dtype
            return dtype
        return torch.float32 if layer.bias is None else layer.bias.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self._layer.out_features, self._layer.in_features

    def parts(self) -> tuple[Format, dict[str, Tensor]]:
        """Format and tensors: the layer's own objects, but those that it has reordered for a CPU's product."""
        layer = self._layer
        eight = "compute_dtype" not in layer.__dict__
        form, tensors = _eight_bit(layer) if eight else _four_bit(layer, self.shape)
        if form is None:
            raise ModelError(
                f"this {type(layer).__name__} is not quantised yet",
                remedy="move the model to its device first: bitsandbytes quantises then",
            )
        if isinstance(form, FourBit):
            _check_kernel(form, layer.in_features, layer.weight.device)
        return form, tensors

    def read(self) -> Tensor:
        """The dense weight [out, in]."""
        form, tensors = self.parts()
        return form.dequantize(tensors, self.shape, self.compute_dtype)

    def times(self, x_NI: Tensor) -> Tensor:
        """x Wᵀ [N, out]."""
        return times(self._blocks(x_NI.dtype), x_NI, self.shape[0])

    def back(self, g_NO: Tensor) -> Tensor:
        """g W [N, in]."""
        return back(self._blocks(g_NO.dtype), g_NO)

    def factor(self) -> FourBits | None:
        """The weight as products by matrix units take it, if it is kept in four bits."""
        form, tensors = self.parts()
        return form.factor(tensors, self.shape) if isinstance(form, FourBit) else None

    def _blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        form, tensors = self.parts()
        return form.blocks(tensors, self.shape, dtype)

    def write(self, W: Tensor) -> None:
        """Quantise another weight in this one's place, into the layer's own tensors."""
        form, tensors = self.parts()
        if tensors["weight"].data_ptr() != self._layer.weight.data_ptr():
            raise ModelError(
                "bitsandbytes has reordered this weight for inference and rounded its constants",
                remedy="load the model again",
            )
        for key, tensor in form.quantize(W).items():
            tensors[key].copy_(tensor)


def view_of(module: nn.Module) -> BitsandbytesView | None:
    """A view of the weight if ``module`` is bitsandbytes' linear layer."""
    kind = type(module)
    return BitsandbytesView(module) if f"{kind.__module__}.{kind.__qualname__}" in BITSANDBYTES else None


def bitsandbytes_linear(layer: QuantLinear) -> nn.Module:
    """bitsandbytes' layer with the codes, constants and bias of ``layer``.

    Raises:
        UsageError: bitsandbytes is not installed.
        ModelError: its kernel on this device gets this layer's width wrong.
    """
    bnb = _library()
    make = _made_four_bit if isinstance(layer.form, FourBit) else _made_eight_bit
    made: Any = make(bnb, layer)
    made.bias = layer.bias
    return made.train(layer.training)


def _made_four_bit(bnb: Any, layer: QuantLinear) -> nn.Module:
    form, tensors, device, dtype = layer.form, layer.tensors(), layer.weight.device, layer.compute_dtype
    assert isinstance(form, FourBit)
    _check_kernel(form, layer.in_features, device)
    QuantState = bnb.functional.QuantState
    state = QuantState(
        tensors["absmax"], torch.Size(layer.shape), codebook(form.kind).to(device, copy=True),
        form.blocksize, form.kind, dtype,
    )  # fmt: skip
    if form.double:
        code = codebook("dynamic8").to(device, copy=True)
        state.state2 = QuantState(
            tensors["nested_absmax"], code=code, blocksize=CONSTANTS_BLOCK, dtype=torch.float32
        )
        state.nested, state.offset = True, tensors["offset"]
    made: Any = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, dtype, form.double, form.kind,
        device="meta",
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit(
        tensors["weight"], False, state, form.blocksize, form.double, form.kind, module=made, bnb_quantized=True
    )
    made.quant_state = state
    # Else its first forward pass in evaluation rounds the constants to bf16, and no gradient passes after.
    made.support_avx512bf16_for_cpu = False
    return made


def _made_eight_bit(bnb: Any, layer: QuantLinear) -> nn.Module:
    form, tensors = layer.form, layer.tensors()
    assert isinstance(form, Int8)
    made: Any = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False,
        threshold=form.threshold, device="meta",
    )  # fmt: skip
    codes = tensors["weight"]
    made.weight = bnb.nn.Int8Params(codes, False, has_fp16_weights=False, CB=codes, SCB=tensors["SCB"])
    return made


def _library() -> Any:
    if not installed():
        raise UsageError(
            "quantization_method bitsandbytes needs that package",
            remedy="pip install bitsandbytes, or take quantization_method: native",
        )
    import bitsandbytes

    return bitsandbytes


def _four_bit(layer: Any, shape: tuple[int, int]) -> tuple[FourBit | None, dict[str, Tensor]]:
    state = layer.weight.__dict__.get("quant_state") or layer.quant_state
    if state is None:
        return None, {}
    weight, nested = layer.weight.data.view(torch.uint8).view(-1, 1), state.nested
    tensors = {"weight": weight, "absmax": state.absmax}
    if state.__dict__.get("packing_format_for_cpu", False):
        tensors = {"weight": _in_order(weight, shape), "absmax": state.absmax.T.float().reshape(-1)}
    elif nested:
        tensors |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    return FourBit(state.quant_type, state.blocksize, double=nested), tensors


def _eight_bit(layer: Any) -> tuple[Int8 | None, dict[str, Tensor]]:
    """Its first forward pass moves the constants from the weight to the state."""
    scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    if layer.weight.dtype != torch.int8 or scale is None:
        return None, {}
    return Int8(layer.state.threshold), {"weight": layer.weight.data, "SCB": scale}


def _in_order(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bytes that bitsandbytes has interleaved over 32 output units, in the order of the weight again."""
    out, features = shape
    halves = packed.view(-1, _LANES)
    codes = torch.cat([halves & 15, halves >> 4], dim=1)
    codes = codes.view(out // _LANES, features // 2, _LANES, 2).transpose(1, 2).reshape(-1, 2)
    return ((codes[:, :1] << 4) | codes[:, 1:]).contiguous()


def _check_kernel(form: FourBit, features: int, device: torch.device) -> None:
    if device.type != "meta" and not kernel_fits(form, features, device):
        raise ModelError(
            f"bitsandbytes' kernel on this device misreads rows of {features} numbers in blocks of "
            f"{form.blocksize}",
            remedy="load the model with quantization_method: native",
        )
