"""Loads a model one tensor after the other, with its linear layers quantised on the way if that is wished.

Memory never holds more than the result and the tensor at hand. Renaming, fusing and tying are left to
transformers' own loader, through two doors it has for others: a state dict, here of tensors that are read when
it asks for them (`Stored`), and a quantiser (`_Streamer`), which packs a weight as soon as it is read. The
packed weight depends on the file alone: it is taken in the file's number format, whatever the model's is.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakit.config.quantization import Quantization
from lorakit.errors import ModelError
from lorakit.hardware import give_back_memory
from lorakit.models.gguf import gguf_weights
from lorakit.models.quantized import DTYPES, Packed, format_of, is_linear, is_transposed, place, quantisable
from lorakit.models.sources import weight_files
from lorakit.quant.formats import from_file
from lorakit.quant.modules import QuantLinear

_NAME = "lorakit"
# bitsandbytes' names of what belongs to a quantised weight
_CONSTANT = re.compile(r"(.+\.)(weight\.\w*(?:absmax|quant_map)|weight\.quant_state\.\w+|SCB|weight_format)")


class Stored:
    """A tensor in a file, as transformers' loader takes it: indexed, then moved to where it belongs.

    ``packed`` says that the file has it quantised; ``exact`` that it is not to be cast.
    """

    def __init__(self, name: str, read: Callable[[], Tensor | Packed], *, packed: bool = False) -> None:
        self.name, self.packed, self.exact = name, packed, packed
        self._read = read

    def __getitem__(self, _: object) -> Stored:
        return self

    def to(self, *, device: torch.device | str, dtype: torch.dtype | None) -> Tensor | Packed:
        """Read it; ``ModelError`` if a number in it is not finite."""
        value = self._read()
        if not isinstance(value, Tensor):
            return value
        check_finite(self.name, value)
        return value.to(device=device, dtype=None if self.exact or not value.is_floating_point() else dtype)


def check_finite(name: str, tensor: Tensor) -> None:
    """``ModelError`` if a number is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    lowest, highest = tensor.aminmax()  # one pass without a copy; both are NaN if any number is
    if not (lowest.isfinite() and highest.isfinite()):
        raise ModelError(
            f"the weights hold NaN or infinity in {name}",
            remedy="download the model again; if it is published like this, use another",
        )


def stored_gguf(path: Path, model: PreTrainedModel) -> dict[str, Stored]:
    """The tensors of a GGUF file by ``model``'s names, none of them read."""
    return {name: Stored(name, read) for name, read in gguf_weights(path, model).items()}


def stored_weights(folder: Path) -> dict[str, Stored]:
    """All tensors of a model's safetensors files, none read; bitsandbytes' constants join their weight."""
    reads: dict[str, Callable[[], Tensor]] = {}
    for path in weight_files(folder):
        # Not mapped into memory: pages of a map count as ours until the file is closed.
        file = safe_open(path, framework="pt", backend="pread")
        reads |= {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
    groups: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for constant in filter(None, map(_CONSTANT.fullmatch, list(reads))):
        groups.setdefault(constant[1], {})[constant[2]] = reads.pop(constant[0])
    stored = {}
    for prefix, group in groups.items():
        name = f"{prefix}weight"
        if name not in reads:
            raise ModelError(
                f"the weights hold constants of {name}, but not it", remedy="download the model again"
            )
        group["weight"] = reads.pop(name)
        stored[name] = Stored(name, functools.partial(_packed, name, group), packed=True)
    return {name: Stored(name, read) for name, read in reads.items()} | stored


def _packed(name: str, reads: Mapping[str, Callable[[], Tensor]]) -> Packed:
    try:
        return Packed(*from_file({part: read() for part, read in reads.items()}))
    except ModelError as error:
        raise ModelError(f"{name}: {error.message}", place=error.place, remedy=error.remedy) from error


def dense_weight_reader(folder: Path, model: PreTrainedModel) -> Callable[[str], Tensor]:
    """A function from the path of a module of ``model`` to the weight [out, in] that its file has for it.

    Raises:
        ModelError: (the function) there is no such tensor: the file has it under parts or fused with others.
    """
    parameters = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    stored = {
        rename_source_key(name, renamings, [], model.base_model_prefix, parameters)[0]: weight
        for name, weight in stored_weights(folder).items()
    }

    def read(path: str) -> Tensor:
        module, weight = model.get_submodule(path), stored.get(f"{path}.weight")
        if weight is None or weight.packed:
            raise ModelError(
                "the file does not have the weight of this module as one dense tensor",
                place=f"module {path}",
                remedy="take another init_lora_weights than loftq",
            )
        value = weight.to(device="cpu", dtype=torch.float32)
        assert isinstance(value, Tensor)
        return value.T if isinstance(module, QuantLinear) and module.transposed else value

    return read


def stream(
    folder: Path,
    weights_for: Callable[[PreTrainedModel], dict[str, Stored]],
    quantization: Quantization | None,
    *,
    only_stored: bool = False,
    dtype: torch.dtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model from a configuration and stored weights, and transformers' account of the loading.

    Args:
        folder: has config.json.
        weights_for: gives the weights of a model (which has none yet) by their names in the file.
        quantization: how to quantise the linear layers, and who computes with them; None for a dense model.
        only_stored: take the layers that the file has quantised, and quantise no other.
        dtype: number format of everything else.
        device: where packed weights go.
        trust_remote_code: run code that comes with the model.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    weights = weights_for(empty)
    plan = quantization and _Plan(
        weights=weights, quantization=quantization, only_stored=only_stored, dtype=dtype, device=device
    )
    generation = (folder / "generation_config.json").is_file()
    model, info = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        quantization_config=plan,
        generation_config=GenerationConfig.from_pretrained(folder) if generation else None,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    give_back_memory()  # what was read to be cast
    model.name_or_path = model.config.name_or_path = str(folder)
    misshapen = plan.misshapen if plan else []
    return model, {**info, "mismatched_keys": {*info["mismatched_keys"], *misshapen}}


@register_quantization_config(_NAME)
@dataclass
class _Plan(QuantizationConfigMixin):
    """What `_Streamer` is given, and where it leaves what it made."""

    weights: dict[str, Stored] = field(default_factory=dict)
    quantization: Quantization = field(default_factory=Quantization)
    only_stored: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    packed: dict[str, Packed] = field(default_factory=dict)  # by path of the module
    targets: set[str] = field(default_factory=set)  # names of their weights
    misshapen: list[tuple[str, torch.Size, torch.Size]] = field(default_factory=list)  # name, found, expected
    quant_method: str = _NAME  # type: ignore[assignment]  # the base lists transformers' own

    def __deepcopy__(self, memo: object) -> _Plan:
        return self  # transformers copies configurations; open files cannot be


@register_quantizer(_NAME)
class _Streamer(HfQuantizer):
    """Packs each weight of a quantised layer as it is read, and puts the layers in when all is loaded."""

    quantization_config: _Plan

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Find out, before anything is read, which tensors of the file become quantised layers."""
        plan = self.quantization_config
        linear = quantisable(model, plan.quantization.skip)
        parameters = model.state_dict()
        conversions = copy.deepcopy(weight_conversions)  # being asked changes them
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        for name, weight in plan.weights.items():
            key, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
            path = key.removesuffix(".weight")
            if weight.packed and key in parameters and not is_linear(model.get_submodule(path)):
                raise ModelError(
                    f"{name} is quantised, but not of a linear layer", remedy="use the original model"
                )
            weight.exact = weight.packed or (not plan.only_stored and key != path and path in linear)
            if weight.exact:
                plan.targets.add(key)
        if not plan.targets:
            raise ModelError(
                "config.json says that the weights are quantised, but none of them is",
                remedy="remove quantization_config from it, or download the weights again",
            )
        return weight_conversions

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether it is the weight of a layer to quantise."""
        return param_name in self.quantization_config.targets

    def get_quantize_ops(self) -> ConversionOps:
        """What the loader calls with each such weight."""
        return _Pack(self.quantization_config)

    def postprocess_model(self, model: PreTrainedModel, **_: Any) -> None:
        """Put the layers in, and leave no trace of this class on the model."""
        plan = self.quantization_config
        compute, method = plan.quantization.compute, plan.quantization.method
        place(model, plan.packed, compute_dtype=DTYPES[compute] if compute else plan.dtype, method=method)
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        """Saving is not this class's."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


class _Pack(ConversionOps):
    """Packs a weight and keeps it back: the module in its place stays without one until `place`."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan

    def convert(self, input_dict: dict[str, Any], *_: Any, **loader: Any) -> dict[str, list[Tensor]]:
        """Takes weights by name; returns none for the loader to put in."""
        model: PreTrainedModel = loader["model"]
        form = format_of(self.plan.quantization)
        for name, found in input_dict.items():
            value = found[0] if isinstance(found, list) else found
            path = name.removesuffix(".weight")
            module = model.get_submodule(path)
            weight: Any = module.get_parameter("weight")
            loader["missing_keys"].discard(name)
            weight._is_hf_initialized = True  # nothing to be filled at random
            turned = is_transposed(module)
            # A packed weight is [out, in], whatever the layer's own order.
            expected = weight.shape[::-1] if turned and isinstance(value, Packed) else weight.shape
            if tuple(value.shape) != tuple(expected):
                self.plan.misshapen.append((name, torch.Size(value.shape), torch.Size(expected)))
            elif isinstance(value, Packed):
                # How to multiply with 8 bits is not in the file.
                self.plan.packed[path] = replace(value, form=form) if value.form.name == "int8" else value
            else:
                W = (value.T if turned else value).to(self.plan.device)
                self.plan.packed[path] = Packed(form, form.quantize(W), tuple(W.shape))
            give_back_memory()
        return {}
