"""Codebooks and blocks: derived from papers, equal to bitsandbytes' to the last bit, and accurate as said."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.quant import blockwise
from lorakit.quant.blockwise import FourBit, dequantize_dynamic, dequantize_reference, quantize_dynamic
from lorakit.quant.codebooks import codebook, nearest, pairs, quick
from lorakit.quant.int8 import Int8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole blocks, a last block cut short, odd counts, more than one block of constants, more than one chunk.
SHAPES = ((64, 64), (7, 9), (1, 1), (1, 3), (1000, 77), (3, 5, 7), (513, 520))
FORMS = [
    FourBit(kind, size, double) for kind in ("nf4", "fp4") for size in (64, 128) for double in (False, True)
]
theirs_uncompiled: Any = _dequantize_4bit_compute.__wrapped__


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Blocks of very different sizes, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()
    W.view(-1)[:64] *= 0.0 if W.numel() > 1000 else 1.0
    return W.to(dtype)


# ------------------------------------------------------------------------------------------------- codebooks


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_four_bit_codebook_is_bitsandbytes_to_the_bit(kind: str) -> None:
    assert torch.equal(codebook(kind), bnb.get_4bit_type(kind, device="cpu"))
    assert codebook(kind).dtype == torch.float32
    assert codebook(kind).abs().max() == 1.0


def test_the_dynamic_codebook_is_bitsandbytes_to_the_bit() -> None:
    assert torch.equal(codebook("dynamic8"), bnb.create_dynamic_map())


def test_nf4_has_equal_shares_of_the_normal_distribution() -> None:
    """Each inner value is the quantile in the middle of its share; on either side the shares are equal."""
    p = torch.special.ndtr(codebook("nf4").double() * torch.special.ndtri(torch.tensor(0.9677083).double()))
    for side in (p[:8], p[7:]):
        assert torch.allclose(side.diff(), side.diff().mean(), atol=1e-7)


def test_pairs_are_two_codes() -> None:
    for kind in ("nf4", "fp4"):
        byte = torch.arange(256)
        assert torch.equal(pairs(kind), torch.stack([codebook(kind)[byte >> 4], codebook(kind)[byte & 15]], 1))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_quick_look_up_is_the_nearest_value(kind: str) -> None:
    bounds, _ = nearest(kind)
    edges = [bounds, *(torch.nextafter(bounds, bounds + side) for side in (-1, 1)), bounds * (1 + 1e-3)]
    tiny = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-30, -1e-30, 1.0, -1.0])
    x = torch.cat([*edges, tiny, torch.rand(200_000) * 2 - 1]).clamp(-1, 1)
    found = blockwise._quick_codes(x, kind)[: len(x)]
    assert torch.equal(found, blockwise._codes(x, kind))
    distance = (codebook(kind)[None] - x[:5000, None].double()).abs()
    assert (distance.gather(1, found[:5000, None].long())[:, 0] <= distance.amin(1) + 1e-7).all()
    assert quick(kind)[0].isfinite().sum() <= 2 * len(bounds)


# ----------------------------------------------------------------------------------------- against bitsandbytes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_constants_and_values_are_those_of_bitsandbytes(form: FourBit, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        W = weight(shape, dtype)
        found = form.quantize(W)
        packed, state = bnb.quantize_4bit(
            W, blocksize=form.blocksize, compress_statistics=form.double, quant_type=form.kind
        )
        expected = {"weight": packed, "absmax": state.absmax}
        absmax = state.absmax
        if form.double:
            expected |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        assert found.keys() == expected.keys() == form.empty(shape).keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype == form.empty(shape)[key].dtype
            assert found[key].shape == tensor.shape == form.empty(shape)[key].shape
            assert torch.equal(found[key], tensor), f"{shape} {key}"
        for out in (dtype, torch.float32):
            values = theirs_uncompiled(packed.view(-1), absmax, state.code, form.blocksize, shape, out)
            assert torch.equal(form.dequantize(found, shape, out), values.view(shape)), f"{shape} to {out}"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_kernel_of_bitsandbytes_reads_the_same(kind: Any, dtype: torch.dtype) -> None:
    form, W = FourBit(kind), weight((24, 256), dtype)
    packed, state = bnb.quantize_4bit(W, quant_type=kind, compress_statistics=True)
    assert torch.equal(form.dequantize(form.quantize(W), W.shape, dtype), bnb.dequantize_4bit(packed, state))


def test_constants_are_those_of_bitsandbytes_in_every_case() -> None:
    """Among others one number, all zeros, and numbers near the smallest there are."""
    for x in (
        torch.zeros(1), torch.zeros(300), torch.tensor([0.0, 1e-30]), torch.tensor([1e-39, -2e-39]),
        torch.randn(100_000), torch.rand(257) - 0.5,
    ):  # fmt: skip
        codes, state = bnb.quantize_blockwise(x, blocksize=256)
        found, absmax = quantize_dynamic(x)
        assert torch.equal(found, codes)
        assert torch.equal(absmax, state.absmax)
        assert torch.equal(dequantize_dynamic(found, absmax), bnb.dequantize_blockwise(codes, state))


def test_int8_is_bitsandbytes_where_that_does_not_round_first() -> None:
    for shape in ((33, 77), (1, 5)):
        W = weight(shape, torch.float16)
        codes, scale, _ = bnb.int8_vectorwise_quant(W)
        found = Int8().quantize(W)
        assert torch.equal(found["weight"], codes)
        assert torch.equal(found["SCB"], scale)
        values = bnb.int8_vectorwise_dequant(codes, scale)
        assert torch.allclose(Int8().dequantize(found, shape, torch.float32), values, rtol=1e-6)


# ------------------------------------------------------------------------------------------ by the definition


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 200), kind=st.sampled_from(["nf4", "fp4"]),
    size=st.sampled_from([32, 64, 256]), double=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_size_reads_as_defined(
    rows: int, columns: int, kind: Any, size: int, double: bool, seed: int
) -> None:
    form, shape = FourBit(kind, size, double), (rows, columns)
    W = weight(shape, seed=seed)
    tensors = form.quantize(W)
    expected = dequantize_reference(form, tensors, shape, torch.float32)
    assert torch.equal(form.dequantize(tensors, shape, torch.float32), expected)
    assert torch.equal(torch.cat(list(form.blocks(tensors, shape, torch.float32))), expected)
    absmax = form.absmax(tensors).repeat_interleave(size)[: W.numel()].view(shape)
    widest = codebook(kind).sort().values.diff().max() / 2
    slack = 0.02 * tensors["nested_absmax"].max() if double else 0.0  # the constant's own error
    assert ((W - expected).abs() <= widest * absmax + slack + 1e-6).all()


def test_blocks_of_rows_are_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a block end where a block of constants ends, whatever the width."""
    monkeypatch.setattr(blockwise, "_CHUNK", 256)
    monkeypatch.setattr(blockwise, "_BLOCK", 512)
    for shape in ((100, 24), (37, 63), (5, 1024), (70, 1)):
        for form in (FourBit(), FourBit("fp4", double=False)):
            W = weight(shape)
            tensors = form.quantize(W)
            parts = list(form.blocks(tensors, shape, torch.bfloat16))
            assert torch.equal(torch.cat(parts), dequantize_reference(form, tensors, shape, torch.bfloat16))
            assert torch.equal(tensors["weight"], FourBit(form.kind, 64, form.double).quantize(W)["weight"])


@pytest.mark.parametrize("form", [FourBit(), FourBit("fp4", double=False), Int8()])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(form: Any, bad: float) -> None:
    for place in (0, 70, 99):
        W = torch.randn(2, 50)
        W.view(-1)[place] = bad
        with pytest.raises(ModelError, match="the weight holds NaN or infinity"):
            form.quantize(W)


def test_formats_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ModelError, match="there is no 4-bit format 'nf5' with blocks of 64"):
        FourBit("nf5")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="with blocks of 48"):
        FourBit("nf4", 48)


def test_nothing_is_lost_by_storing_what_was_read() -> None:
    """What was read is a fixed point of quantising, while constants are exact."""
    for form in (FourBit(double=False), FourBit("fp4", double=False), Int8()):
        read = form.dequantize(form.quantize(weight((50, 96))), (50, 96), torch.float32)
        assert torch.allclose(form.dequantize(form.quantize(read), (50, 96), torch.float32), read, rtol=1e-6)


# --------------------------------------------------------------------------------------------------- accuracy


def relative_error(W: Tensor, read: Tensor) -> float:
    return ((W - read).norm() / W.norm()).item()


def test_on_gaussian_weights_nf4_beats_fp4_beats_int4() -> None:
    """The order of QLoRA's table 2. Int4: 15 even steps over a row's maximum, as `Int8` has 255.

    In blocks of 64, as fine as FP4's, even steps are between NF4 and FP4.
    """
    W = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    shape = (512, 1024)
    errors = {
        kind: relative_error(W, form.dequantize(form.quantize(W), shape, torch.float32))
        for kind, form in (("nf4", FourBit(double=False)), ("fp4", FourBit("fp4", double=False)))
    }
    for name, rows in (("int4", W), ("int4 blocks", W.view(-1, 64))):
        step = rows.abs().amax(1, keepdim=True) / 7
        errors[name] = relative_error(W, ((rows / step).round() * step).view(shape))
    errors["nf4 double"] = relative_error(W, FourBit().dequantize(FourBit().quantize(W), shape, torch.float32))
    assert errors["nf4"] < errors["int4 blocks"] < errors["fp4"] < errors["int4"], errors
    assert errors["nf4 double"] < 1.01 * errors["nf4"]
    assert relative_error(W, Int8().dequantize(Int8().quantize(W), shape, torch.float32)) < 0.01


def test_double_quantisation_saves_more_than_a_third_of_a_bit() -> None:
    """Counted in bytes: 0.5 − 0.127 = 0.373 bits a weight, as the paper says (§3)."""
    shape = (1024, 1024)
    W = torch.randn(shape)
    bits = {
        double: 8 * sum(t.nbytes for t in FourBit(double=double).quantize(W).values()) / W.numel()
        for double in (False, True)
    }
    assert bits[False] == 4.5
    assert bits[False] - bits[True] == pytest.approx(0.373, abs=0.0005)
