"""`QuantLinear`: a linear layer whose frozen weight is kept in four or eight bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.ops import int8, products
from lorakit.ops.frozen import back, times
from lorakit.ops.linear import frozen_linear
from lorakit.quant.blockwise import FourBit
from lorakit.quant.formats import Format, from_file, to_file
from lorakit.quant.int8 import Int8


def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook that changes nothing: ``nn.TransformerEncoderLayer`` reads weights past a layer that has none."""


class QuantLinear(nn.Module):
    """y = x Wᵀ + b with W [out, in] in a few bits a number. The module is the store of its weight.

    ``weight`` holds the codes, as a parameter that never trains, and the constants are buffers; `read` gives
    the dense weight. Products run in ``compute_dtype``, whatever the dtype of x, and y has the dtype of x.
    Casting the module changes ``compute_dtype`` and the bias, never codes or constants. In files it looks like
    bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``.

    Args:
        transposed: the layer stands for one whose dense weight is [in, out] (transformers' ``Conv1D``).
        device: ``meta`` makes an empty layer to be filled by `write`, `put` or ``load_state_dict``.
    """

    lossless: ClassVar[bool] = False
    fusable: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: Format,
        *,
        bias: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        transposed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        self.transposed = transposed
        self.tally = int8.Tally()
        self.put(form, form.empty(self.shape, device))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=compute_dtype, device=device)) if bias else None
        )
        self.requires_grad_(False)
        self.register_forward_pre_hook(keep)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features

    @property
    def name(self) -> str:
        """The format's: nf4, fp4 or int8."""
        return self.form.name

    @property
    def bits_per_parameter(self) -> float:
        """Bits that one number takes, constants included."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors().values()) / math.prod(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Codes and constants by their names in the format."""
        return {"weight": self.weight.detach(), **{key: self.get_buffer(key) for key in self._buffers}}

    def put(self, form: Format, tensors: Mapping[str, Tensor]) -> None:
        """Take these codes and constants, without copying."""
        for key in list(self._buffers):
            delattr(self, key)
        self.form = form
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        for key, tensor in tensors.items():
            if key != "weight":
                self.register_buffer(key, tensor, persistent=False)

    def read(self) -> Tensor:
        """The dense weight [out, in] in ``compute_dtype``."""
        return self.form.dequantize(self.tensors(), self.shape, self.compute_dtype)

    def write(self, W: Tensor) -> None:
        """Quantise another weight [out, in] in this one's place."""
        if tuple(W.shape) != self.shape:
            raise ModelError(f"a weight {tuple(W.shape)} does not fit a layer {self.shape}")
        self.put(self.form, self.form.quantize(W))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]; the dense weight is not kept for the backward pass."""
        return frozen_linear(x, self, self.bias)

    def times(self, x_NI: Tensor) -> Tensor:
        """x Wᵀ [N, out]; on integers where they are good enough."""
        if isinstance(self.form, Int8) and self.form.integer:
            y_NO = int8.times(
                x_NI, self.weight, self.get_buffer("SCB") * (1 / 127), self.tally, self.form.threshold
            )
            if y_NO is not None:
                return y_NO
        if (factor := self.factor()) is not None and products.fits(pair := (x_NI, factor)):
            return products.times_by_units(pair)
        return times(self._blocks(x_NI.dtype), x_NI, self.out_features)

    def back(self, g_NO: Tensor) -> Tensor:
        """g W [N, in]; on integers where they are good enough."""
        if isinstance(self.form, Int8) and self.form.integer:
            gx_NI = int8.back(g_NO, self.weight, self.get_buffer("SCB") * (1 / 127), self.tally)
            if gx_NI is not None:
                return gx_NI
        if (factor := self.factor()) is not None and products.fits(pair := (g_NO, factor)):
            return products.back_by_units(pair)
        return back(self._blocks(g_NO.dtype), g_NO)

    def factor(self) -> products.FourBits | None:
        """The weight as products by matrix units take it, if it is kept in four bits."""
        return self.form.factor(self.tensors(), self.shape) if isinstance(self.form, FourBit) else None

    def _blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        return self.form.blocks(self.tensors(), self.shape, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move codes and constants, but cast neither."""
        fixed = {id(tensor) for tensor in (self.weight, *self.buffers())}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in fixed and moved.dtype != tensor.dtype else moved

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device)).dtype
        super()._apply(move, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        named = to_file(self.form, self.tensors(), self.shape, self.compute_dtype)
        destination.update({prefix + key: tensor for key, tensor in named.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Format and tensors come from the file; that they fit the layer's shape is checked."""
        _, missing, _, errors = rest
        own = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)}
        bias = own.pop("bias", None)
        if (bias is None) != (self.bias is None):
            errors.append(f"{prefix}bias: {'missing in' if bias is None else 'only in'} the file")
            return
        if "weight" not in own:
            missing.append(f"{prefix}weight")
            return
        try:
            form, tensors, shape = from_file(own)
            if shape != self.shape:
                raise ModelError(f"a weight {shape} does not fit a layer {self.shape}")
        except ModelError as error:
            errors.append(f"{prefix}weight: {error}")
            return
        if isinstance(form, Int8) and isinstance(self.form, Int8):
            form = self.form  # files do not say how to multiply
        here = self.weight.device
        assign = here.type == "meta" or local_metadata.get("assign_to_params_buffers", False)
        self.put(form, tensors if assign else {key: t.to(here, copy=True) for key, t in tensors.items()})
        if bias is not None and self.bias is not None:
            self.bias = nn.Parameter(bias if assign else bias.to(self.bias, copy=True), requires_grad=False)

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.name}, compute_dtype={self.compute_dtype}"
        )


def quantized(layer: nn.Module, form: Format, compute_dtype: torch.dtype | None = None) -> QuantLinear:
    """A quantised twin of an ``nn.Linear``, or of a layer such as ``Conv1D`` whose weight is [in, out].

    Without ``compute_dtype`` products run in the dtype of the dense weight.
    """
    transposed = not isinstance(layer, nn.Linear)
    weight = layer.get_parameter("weight")
    W = weight.T if transposed else weight
    bias = layer._parameters["bias"]
    twin = QuantLinear(
        W.shape[1], W.shape[0], form, bias=bias is not None,
        compute_dtype=compute_dtype or weight.dtype, transposed=transposed, device="meta",
    )  # fmt: skip
    twin.write(W)
    if bias is not None:
        twin.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return twin.train(layer.training)
