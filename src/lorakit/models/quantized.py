"""Models whose frozen linear layers are quantised: made from dense ones, undone, and described."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.attach import adapter_layers
from lorakit.adapters.targets import output_head
from lorakit.config.quantization import Bits, Method, Quantization
from lorakit.errors import TargetError, UsageError
from lorakit.hardware import Precision
from lorakit.log import logger
from lorakit.quant.blockwise import FourBit
from lorakit.quant.formats import Format
from lorakit.quant.int8 import Int8
from lorakit.quant.interop import bitsandbytes_linear, view_of
from lorakit.quant.modules import QuantLinear, quantized

DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class Packed:
    """A quantised weight: its format, codes and constants, and its shape [out, in]."""

    form: Format
    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]


def format_of(quantization: Quantization) -> Format:
    """The format of the numbers that the settings ask for."""
    if quantization.kind == "int8":
        return Int8(quantization.threshold, quantization.integer)
    return FourBit(quantization.kind, double=quantization.double)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer that is known: by exact type, for what a subclass computes is not."""
    return type(module) in (nn.Linear, Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D`` (GPT-2), a linear layer whose weight is [in, out]."""
    return type(module) is Conv1D


def quantisable(model: nn.Module, skip: Collection[str] = ()) -> dict[str, nn.Module]:
    """The linear layers to quantise, by path: all but the output head, shared weights and what ``skip`` names.

    A name means a module, wherever it is, with everything in it.

    Raises:
        TargetError: a name that is nowhere in the model, or nothing is left.
    """
    paths = [f".{path}." for path, _ in model.named_modules()]
    for name in skip:
        if not any(f".{name}." in path for path in paths):
            raise TargetError(f"llm_int8_skip_modules: the model has no module {name!r}")
    head = output_head(model)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = {
        path: module
        for path, module in model.named_modules()
        if is_linear(module) and module is not head and uses[id(module.weight)] == 1
        and not any(f".{name}." in f".{path}." for name in skip)
    }  # fmt: skip
    if not found:
        raise TargetError("the model has no linear layer to quantise")
    return found


def place(
    model: nn.Module, packed: Mapping[str, Packed], *, compute_dtype: torch.dtype, method: Method = "native"
) -> None:
    """Put quantised layers with these weights in the place of dense ones, whose biases they take over."""
    for path, weight in packed.items():
        dense = model.get_submodule(path)
        bias = dense._parameters["bias"]
        out, features = weight.shape
        layer = QuantLinear(
            features, out, weight.form, bias=bias is not None, compute_dtype=compute_dtype,
            transposed=is_transposed(dense), device="meta",
        )  # fmt: skip
        layer.put(weight.form, weight.tensors)
        layer.bias = bias
        made = layer if method == "native" else bitsandbytes_linear(layer)
        model.set_submodule(path, made.train(dense.training))


def quantize_model(
    model: nn.Module,
    bits: Bits = 4,
    *,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double: bool = True,
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    integer: bool = True,
    skip: Collection[str] = (),
) -> nn.Module:
    """Quantise the linear layers of any model, in place; returns the model, ready for `add_lora_to_model`.

    The output head of a transformers model, shared weights, convolutions, embeddings and attention that reads
    its weights past its layers (``nn.MultiheadAttention``) stay dense; the log says how much that is.

    Args:
        model: any PyTorch model.
        bits: 4 or 8.
        quant_type: with 4 bits, ``nf4`` or ``fp4``.
        double: with 4 bits, keep the constants in 8 bits, too.
        compute_dtype: of products with the quantised weights; each layer's own if not given.
        threshold: with 8 bits, inputs of at least this magnitude are not rounded; 0 for none.
        integer: with 8 bits, multiply on integers where that is fast and accurate.
        skip: names of modules to leave as they are, with everything in them.

    Raises:
        TargetError: nothing to quantise, or a name in ``skip`` that is not there.
        ModelError: a weight that is not finite. The model is then as it was.
    """
    if bits not in (4, 8):
        raise UsageError(f"weights cannot be kept in {bits} bits", remedy="4 or 8")
    form: Format = Int8(threshold, integer) if bits == 8 else FourBit(quant_type, double=double)
    layers = quantisable(model, skip)
    made = {path: quantized(layer, form, compute_dtype) for path, layer in layers.items()}
    for path, layer in made.items():
        model.set_submodule(path, layer)
    tell_quantized(model)
    return model


@contextlib.contextmanager
def quantized_for_now(model: nn.Module, quantization: Quantization) -> Iterator[None]:
    """Within the block the linear layers are quantised; afterwards the very objects are back."""
    layers = quantisable(model, quantization.skip)
    try:
        for path, layer in layers.items():
            model.set_submodule(path, quantized(layer, format_of(quantization)))
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def tell_quantized(model: nn.Module) -> None:
    """Log how many layers are quantised, and what stays dense."""
    layers: list[Any] = [module for module in model.modules() if kept_as(module)]
    packed = sum(module.in_features * module.out_features for module in layers)
    dense: Counter[str] = Counter()
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in set(module.parameters(recurse=False)) - seen:
            seen.add(parameter)
            if parameter.is_floating_point():
                dense[type(module).__name__] += parameter.numel()
    logger.info(
        "%d linear layers in %s; %.3g %% of the parameters stay dense (%s)",
        len(layers), kept_as(layers[0]), 100 * dense.total() / (dense.total() + packed),
        ", ".join(name for name, _ in dense.most_common(3)),
    )  # fmt: skip


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put dense layers in the place of lorakit's quantised ones: the numbers they stand for, in ``dtype``.

    Active adapters on them end: they are merged into the dense weight, in float32.
    """
    for path, layer in adapter_layers(model).items():
        if isinstance(layer.base, QuantLinear):
            model.set_submodule(path, _dense(layer.base, layer.merged_weight(), dtype))
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            W = module.form.dequantize(module.tensors(), module.shape, dtype)
            model.set_submodule(path, _dense(module, W, dtype))
    return model


@dataclass(frozen=True)
class Rounding:
    """What quantising merged weights again has cost, over all layers together (Frobenius norms).

    Attributes:
        weight_error: difference to the merged weights, relative to these.
        update_error: the same difference relative to what the adapters change.
    """

    weight_error: float
    update_error: float


@torch.no_grad()
def requantize_model(model: nn.Module) -> Rounding:
    """Merge the active adapters into lorakit's quantised layers, which rounds, and take them off."""
    lost = weights = updates = 0.0
    for path, layer in adapter_layers(model).items():
        if isinstance(layer.base, QuantLinear):
            before, merged = layer.dense_weight(), layer.merged_weight()
            layer.base.write(merged)
            lost += float((layer.dense_weight() - merged).square().sum())
            weights += float(merged.square().sum())
            updates += float((merged - before).square().sum())
            model.set_submodule(path, layer.base)
    tiny = 1e-30  # an adapter that changes nothing
    return Rounding((lost / max(weights, tiny)) ** 0.5, (lost / max(updates, tiny)) ** 0.5)


def quantization_of(model: nn.Module) -> Quantization | None:
    """How the linear layers of a model are kept, from the first that is quantised; None if none is."""
    return next(filter(None, map(kept_as, model.modules())), None)


def kept_as(module: nn.Module) -> Quantization | None:
    """How one layer is kept; None if it is not quantised."""
    view = module if isinstance(module, QuantLinear) else view_of(module)
    if view is None:
        return None
    form = view.form if isinstance(view, QuantLinear) else view.parts()[0]
    method: Method = "native" if view is module else "bitsandbytes"
    if isinstance(form, FourBit):
        return Quantization(kind=form.kind, double=form.double, method=method)
    assert isinstance(form, Int8)
    return Quantization(
        kind="int8", double=False, method=method, threshold=form.threshold, integer=form.integer
    )


def _dense(layer: QuantLinear, W: Tensor, dtype: torch.dtype) -> nn.Module:
    """A dense twin with the weight W [out, in]."""
    bias = layer.bias
    with torch.device("meta"):
        if layer.transposed:
            dense: Any = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias is not None)
    W = (W.T if layer.transposed else W).to(dtype).contiguous()
    dense.weight = nn.Parameter(W, requires_grad=False)
    dense.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    return dense.train(layer.training)
