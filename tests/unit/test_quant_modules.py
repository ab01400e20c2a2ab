"""`QuantLinear`, and bitsandbytes' layers beside it: files, casts, moves, copies, views of the same bytes."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import ModelError, UsageError
from lorakit.ops import products
from lorakit.quant import interop
from lorakit.quant.blockwise import FourBit
from lorakit.quant.formats import Format, from_file, to_file
from lorakit.quant.int8 import Int8
from lorakit.quant.interop import bitsandbytes_linear, view_of
from lorakit.quant.modules import QuantLinear, quantized
from lorakit.quant.store import DenseStore, quantized_weights, store_of

FORMS: dict[str, Format] = {
    "nf4": FourBit(),
    "nf4-single": FourBit(double=False),
    "fp4": FourBit("fp4", 128),
    "int8": Int8(integer=False),
}
EVERY = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def dense(features: int = 96, out: int = 40, *, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(features, out, bias=bias)


def inputs(features: int = 96) -> Tensor:
    return torch.randn(3, 5, features, generator=torch.Generator().manual_seed(1))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(t, second[key]) and t.dtype == second[key].dtype for key, t in first.items()
    )


# ------------------------------------------------------------------------------------------------ the layer


@EVERY
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_as_a_linear_layer_with_the_weight_that_it_reads(form: Format, bias: bool) -> None:
    plain = dense(bias=bias)
    layer = quantized(plain, form)
    assert (layer.read() - plain.weight).norm() < 0.13 * plain.weight.norm()
    x, reference = inputs().requires_grad_(), inputs().double().requires_grad_()
    y = layer(x)
    expected = F.linear(reference, layer.read().double(), None if layer.bias is None else layer.bias.double())
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(x.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in layer.parameters())


@EVERY
@pytest.mark.parametrize(("features", "out"), [(96, 64), (64, 352), (1056, 32)])
def test_matrix_units_decode_what_read_gives(form: Format, features: int, out: int) -> None:
    """Rows of the identity pick out single weights, which no sum rounds."""
    layer = quantized(dense(features, out).bfloat16(), form)
    W = layer.read()
    with products.by_units():
        assert torch.equal(layer.times(torch.eye(features).bfloat16()), W.T)
        assert torch.equal(layer.back(torch.eye(out).bfloat16()), W)
        x, g = torch.randn(70, features).bfloat16(), torch.randn(70, out).bfloat16()
        y, gx = x.double() @ W.double().T, g.double() @ W.double()
        assert (layer.times(x) - y).norm() < 3e-3 * y.norm()
        assert (layer.back(g) - gx).norm() < 3e-3 * gx.norm()


@EVERY
def test_nothing_as_large_as_the_weight_is_kept_for_the_backward_pass(form: Format) -> None:
    layer, kept = quantized(dense(256, 256), form), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(inputs(256).requires_grad_()).sum().backward()
    assert sum(t.numel() for t in kept) < 256 * 256 / 2


@EVERY
def test_the_input_keeps_its_dtype_and_products_run_in_another(form: Format) -> None:
    plain = dense()
    layer = quantized(plain, form, torch.bfloat16)
    assert layer.read().dtype == torch.bfloat16
    y = layer(inputs())
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float()), "rounded to bf16 on the way"
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(plain, form)(inputs()).dtype == torch.bfloat16


@EVERY
@pytest.mark.parametrize("cast", ["double", "bfloat16", "half", "float"])
def test_casts_change_the_products_and_never_the_numbers(form: Format, cast: str) -> None:
    layer = quantized(dense(), form)
    before = {key: tensor.clone() for key, tensor in layer.tensors().items()}
    expected = layer.form.dequantize(before, layer.shape, getattr(torch.ones(1), cast)().dtype)
    getattr(nn.Sequential(layer), cast)()
    assert same(layer.tensors(), before)
    assert torch.equal(layer.read(), expected)
    assert layer.bias is not None
    assert layer.bias.dtype == layer.compute_dtype == expected.dtype
    layer.to(torch.float64).type(torch.float32)
    assert same(layer.tensors(), before)


@EVERY
def test_copies_compute_the_same_and_share_nothing(form: Format) -> None:
    layer = quantized(dense(), form)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(inputs()), layer(inputs()))
        assert again.weight.data_ptr() != layer.weight.data_ptr()
        assert again.form == layer.form


@EVERY
def test_it_can_be_made_empty_and_filled(form: Format) -> None:
    layer, W = QuantLinear(96, 40, form, device="meta"), dense().weight
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    layer.put(form, form.quantize(W))
    assert torch.equal(layer.read(), quantized(dense(), form).read().bfloat16())
    moved = QuantLinear(96, 40, form, device="meta").to_empty(device="cpu")
    moved.write(W)
    assert same(moved.tensors(), layer.tensors())
    with pytest.raises(ModelError, match=r"a weight \(96, 40\) does not fit a layer \(40, 96\)"):
        moved.write(W.T)


def test_a_transposed_layer_is_quantised_as_its_matrix() -> None:
    plain = Conv1D(40, 96)
    layer = quantized(plain, FourBit())
    assert layer.transposed
    assert layer.shape == (40, 96)
    assert same(layer.tensors(), FourBit().quantize(plain.weight.T.contiguous()))
    assert (layer(inputs()) - plain(inputs())).abs().max() < 0.2


def test_an_encoder_layer_of_pytorch_does_not_read_past_it() -> None:
    """In evaluation `nn.TransformerEncoderLayer` hands the weights of its layers to one fused function."""
    encoder = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).eval()
    encoder.linear1 = quantized(encoder.linear1, FourBit())
    x = inputs(64)
    with torch.no_grad():
        fast = encoder(x)
    assert torch.allclose(fast, encoder.train()(x), atol=1e-5)


def test_bytes_are_counted_as_numbers() -> None:
    layer = quantized(dense(), FourBit())
    assert quantized_weights(nn.Sequential(layer, dense())) == {id(layer.weight): 96 * 40}
    assert layer.bits_per_parameter == pytest.approx(4 + 8 / 64 + 32 / (40 * 96) * 2)
    assert store_of(layer) is layer
    plain = store_of(dense().bfloat16())
    assert isinstance(plain, DenseStore)
    assert (plain.bits_per_parameter, plain.shape, plain.lossless) == (16.0, (40, 96), True)


# ------------------------------------------------------------------------------------------------- in files


@EVERY
def test_files_keep_every_bit_whatever_the_layer_was(form: Format) -> None:
    layer = quantized(dense(), form)
    state = load(save(layer.state_dict()))
    targets = [
        QuantLinear(96, 40, FourBit(), compute_dtype=torch.float32, device=device) for device in ("meta", "cpu")
    ]
    for target in targets:
        assert target.load_state_dict(state).missing_keys == []
        assert same(target.tensors(), layer.tensors())
        assert torch.equal(target.read(), layer.read())
    assert targets[1].weight.data_ptr() != state["weight"].data_ptr()
    targets[1].load_state_dict(state, assign=True)
    assert targets[1].weight.data_ptr() == state["weight"].data_ptr()


def test_how_an_int8_layer_multiplies_is_its_own_affair() -> None:
    layer = QuantLinear(96, 40, Int8(6.0, integer=False))
    layer.load_state_dict(quantized(dense(), Int8()).state_dict())
    assert layer.form == Int8(6.0, integer=False)


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(key)


def replaced(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: value})


BLOB = "weight.quant_state.bitsandbytes__nf4"


def blob(**changes: Any) -> Tensor:
    """The description of ``dense()`` in NF4, with something else in it."""
    state = json.loads(bytes(quantized(dense(), FourBit()).state_dict()[BLOB].tolist()))
    return torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)


DAMAGED: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (without("weight"), r'Missing key\(s\) in state_dict: "weight"'),
    (without("bias"), "bias: missing in the file"),
    (without("weight.absmax"), "weight.absmax is missing"),
    (without("weight.nested_absmax"), "weight.nested_absmax is missing"),
    (without("weight.quant_map"), "weight.quant_map is missing"),
    (without(BLOB), "0 entries weight.quant_state.bitsandbytes__… instead of one"),
    (replaced(BLOB, torch.zeros(5, dtype=torch.uint8)), "bitsandbytes__nf4 cannot be read"),
    (replaced(BLOB, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "bitsandbytes__nf4 cannot be read"),
    (
        replaced(BLOB, torch.tensor(list(b'{"quant_type":"nf4"}'), dtype=torch.uint8)),
        "cannot be read: KeyError",
    ),
    (replaced(BLOB, blob(shape=[])), r"1920 bytes cannot be a weight \(\)"),
    (replaced(BLOB, blob(shape=[-40, -96])), r"1920 bytes cannot be a weight \(-40, -96\)"),
    (replaced(BLOB, blob(shape=[10**30, 96])), "1920 bytes cannot be a weight"),
    (replaced(BLOB, blob(blocksize=48)), "there is no 4-bit format 'nf4' with blocks of 48"),
    (replaced(BLOB, blob(blocksize=math.inf)), "bitsandbytes__nf4 cannot be read: OverflowError"),
    (replaced(BLOB, blob(quant_type=["nf4"])), "there is no 4-bit format"),
    (replaced(BLOB, blob(nested_offset=math.nan)), "offset holds NaN or infinity"),
    (
        replaced(BLOB, blob(nested_blocksize=128)),
        "constants in blocks of 128 float32: only 256 float32 are known",
    ),
    (replaced("weight.nested_absmax", torch.tensor([math.inf])), "nested_absmax holds NaN or infinity"),
    (replaced("weight.more", torch.zeros(1)), "weight.more is not part of a weight in nf4"),
    (replaced("weight", torch.zeros(3, 1, dtype=torch.uint8)), r"3 bytes cannot be a weight \(40, 96\)"),
    (replaced("weight.absmax", torch.zeros(60)), r"absmax has 60 numbers \(torch.float32\)"),
    (replaced("weight.quant_map", torch.zeros(16)), "weight.quant_map is not the codebook nf4"),
    (replaced("weight.nested_quant_map", torch.zeros(256)), "nested_quant_map is not the codebook dynamic8"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_damaged_file_is_refused_and_changes_nothing(
    damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    layer = quantized(dense(), FourBit())
    state, before = layer.state_dict(), layer(inputs())
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer(inputs()), before)


def test_a_file_of_another_layer_is_refused() -> None:
    state = quantized(dense(64, 40), FourBit()).state_dict()
    with pytest.raises(RuntimeError, match=r"a weight \(40, 64\) does not fit a layer \(40, 96\)"):
        quantized(dense(), FourBit()).load_state_dict(state)
    with pytest.raises(RuntimeError, match="bias: only in the file"):
        quantized(dense(64, 40, bias=False), FourBit()).load_state_dict(state)
    rotated = {**Int8().quantize(dense().weight), "weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(ModelError, match="an 8-bit weight in another order than rows"):
        from_file(rotated)
    with pytest.raises(ModelError, match=r"SCB has 3 numbers \(torch.float32\)"):
        from_file({**rotated, "weight_format": torch.tensor([0]), "SCB": torch.zeros(3)})


# --------------------------------------------------------------------------------------------- bitsandbytes


def theirs(kind: str, *, double: bool = True, features: int = 128) -> Any:
    """A layer that bitsandbytes has quantised."""
    plain = dense(features, 64)
    if kind == "int8":
        layer: Any = Linear8bitLt(features, 64, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict(plain.state_dict())
        return layer.to("cpu")
    layer = Linear4bit(features, 64, compute_dtype=torch.float32, quant_type=kind, compress_statistics=double)
    weight = plain.weight.detach().clone()
    layer.weight = Params4bit(weight, False, quant_type=kind, compress_statistics=double, module=layer)
    layer.bias = plain.bias
    return layer.to("cpu")


THEIRS = pytest.mark.parametrize(
    ("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]
)


@THEIRS
def test_a_layer_of_bitsandbytes_is_viewed_and_not_copied(kind: str, double: bool) -> None:
    layer = theirs(kind, double=double)
    view = view_of(layer)
    assert view is not None
    form, tensors = view.parts()
    assert tensors["weight"].data_ptr() == layer.weight.data_ptr()
    constants = layer.weight.SCB if kind == "int8" else layer.weight.quant_state.absmax
    assert tensors["SCB" if kind == "int8" else "absmax"] is constants
    assert (view.name, view.shape, view.lossless) == (kind, (64, 128), False)
    native = quantized(dense(128, 64), form)
    if kind == "int8":  # theirs rounds to float16 first
        assert (view.read() - native.read()).abs().max() < 0.001
    else:
        assert same(tensors, native.tensors())
        assert torch.equal(view.read(), native.read())
    assert torch.allclose(layer(inputs(128)), F.linear(inputs(128), view.read(), layer.bias), atol=1e-5)
    view.write(2 * dense(128, 64).weight)
    assert tensors["weight"].data_ptr() == layer.weight.data_ptr()
    assert torch.allclose(view.read(), 2 * native.read(), atol=0.01)
    assert torch.allclose(layer(inputs(128)), F.linear(inputs(128), view.read(), layer.bias), atol=1e-5)


@pytest.mark.parametrize("form", [FourBit(), FourBit(double=False), FourBit("fp4", 128), Int8(6.0)])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_our_layer_becomes_one_of_bitsandbytes_and_its_file_is_theirs(form: Format) -> None:
    ours = quantized(dense(128, 64), form)
    made = bitsandbytes_linear(ours)
    assert made.weight.data_ptr() == ours.weight.data_ptr()
    assert same(made.state_dict(), ours.state_dict())
    x = inputs(128).requires_grad_()
    expected = F.linear(x, ours.read(), ours.bias)
    assert torch.allclose(made(x), expected, atol=1e-5)
    made.eval()
    with torch.no_grad():
        assert (made(x) - expected).abs().max() < 0.05
    assert same(made.state_dict(), ours.state_dict()), "evaluation reorders nothing"
    made.train()(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("form", [FourBit(), FourBit("fp4", 128, double=False)])
def test_bitsandbytes_reads_our_file(form: FourBit) -> None:
    """By the door through which transformers hands it the tensors of a quantised checkpoint."""
    state = load(save(quantized(dense(128, 64), form).state_dict()))
    constants = {key: tensor for key, tensor in state.items() if key.startswith("weight.")}
    read = Params4bit.from_prequantized(state["weight"], constants, device="cpu")
    layer = Linear4bit(128, 64, compute_dtype=torch.float32)
    layer.weight, layer.bias = read, nn.Parameter(state["bias"])
    expected = F.linear(inputs(128), quantized(dense(128, 64), form).read(), state["bias"])
    assert torch.allclose(layer(inputs(128)), expected, atol=1e-5)


@THEIRS
def test_their_file_is_read(kind: str, double: bool) -> None:
    layer = theirs(kind, double=double)
    state = load(save(layer.state_dict()))
    ours = QuantLinear(128, 64, FourBit(), compute_dtype=torch.float32, device="meta")
    ours.load_state_dict(state)
    view = view_of(layer)
    assert view is not None
    assert torch.equal(ours.read(), view.read())
    assert same(ours.state_dict(), state)
    state.pop("bias")
    form, tensors, shape = from_file(state)
    assert same(to_file(form, tensors, shape, torch.float32), state)


def test_packed_bytes_in_another_dtype_are_read() -> None:
    """bitsandbytes' quant_storage, which FSDP needs."""
    layer = Linear4bit(128, 64, False, torch.float32, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    assert layer.weight.dtype == torch.bfloat16
    form, tensors, shape = from_file(dict(layer.state_dict()))
    view = view_of(layer)
    assert view is not None
    assert torch.equal(form.dequantize(tensors, shape, torch.float32), view.read())
    assert quantized_weights(layer) == {id(layer.weight): 64 * 128}


@pytest.mark.parametrize("double", [True, False])
def test_a_weight_that_bitsandbytes_has_reordered_is_read_as_it_now_is(double: bool) -> None:
    """On a CPU with AVX-512 BF16 its first forward pass in evaluation does that, and rounds the constants."""
    layer = theirs("nf4", double=double)
    view = view_of(layer)
    assert view is not None
    before = view.read()
    layer.eval()
    with torch.no_grad():
        y = layer(inputs(128))
    assert torch.allclose(y, F.linear(inputs(128), view.read(), layer.bias), atol=0.02)
    assert torch.allclose(view.read(), before, rtol=2**-8)
    if layer.weight.quant_state.__dict__.get("packing_format_for_cpu", False):
        with pytest.raises(ModelError, match="bitsandbytes has reordered this weight"):
            view.write(before)


@pytest.mark.parametrize("layer", [Linear4bit(64, 8), Linear8bitLt(64, 8, has_fp16_weights=False)])
def test_a_layer_that_is_not_quantised_yet_is_refused(layer: Any) -> None:
    view = view_of(layer)
    assert view is not None
    with pytest.raises(ModelError, match="is not quantised yet\nmove the model to its device first"):
        view.read()


def test_widths_that_their_kernel_gets_wrong_are_refused() -> None:
    """Whichever those are on this machine: what is not refused computes right."""
    for features in (48, 64, 72, 96, 100, 192):
        ours = quantized(dense(features, 8), FourBit())
        try:
            made = bitsandbytes_linear(ours)
        except ModelError as error:
            assert "misreads rows of" in error.message
            assert features % 64
        else:
            assert torch.allclose(made(inputs(features)), ours(inputs(features)), atol=1e-5)


def test_bitsandbytes_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop, "installed", lambda: False)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        bitsandbytes_linear(quantized(dense(), FourBit()))
