"""Routing: which adapters a row goes through; in backward passes, recomputed, compiled, and copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.adapters.attach import (
    activate,
    adapter_layers,
    attach,
    carriers,
    merge,
    remove_adapter,
    route,
    unmerge,
)
from lorakit.adapters.spec import LoRAConfig
from lorakit.errors import ConflictError, UsageError

NAMES = ("law", "med", "art")
ROWS: list[Any] = ["law", None, "med", ("law", "med"), "law", "art"]


class Net(nn.Module):
    """Several hosts in a row: embedding, linear, convolution, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.first = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5, bias=False)
        self.recompute: bool | None = None  # use_reentrant, or no activation checkpointing

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(torch.tanh(self.first(x)).transpose(1, 2))).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.recompute is None:
            return self.last(self.block(x))
        if not x.requires_grad:  # as transformers' enable_input_require_grads does
            x.requires_grad_()
        return self.last(checkpoint(self.block, x, use_reentrant=self.recompute))


def make(method: str = "lora", names: tuple[str, ...] = NAMES, dtype: torch.dtype = torch.float64) -> Net:
    """Three adapters, each on its own layers, with random values everywhere."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    targets = {"law": "first,conv,embed", "med": "first,last", "art": "conv,last"}
    for name in names:
        attach(model, LoRAConfig(r=2, target_modules=targets[name], method=method), name)
    with torch.no_grad():
        for carrier in carriers(model).values():
            for parameter in carrier.adapters.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.to(dtype)


def batch(rows: int = len(ROWS)) -> Tensor:
    return torch.randint(12, (rows, 4), generator=torch.Generator().manual_seed(1))


def row_by_row(model: nn.Module, ids: Tensor, rows: list[Any]) -> Tensor:
    outputs = []
    for number, names in enumerate(rows):
        activate(model, *([names] if isinstance(names, str) else names or ()))
        outputs.append(model(ids[number : number + 1]))
    return torch.cat(outputs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    zero = torch.zeros(())
    assert expected
    for name in found.keys() | expected.keys():
        a, b = found.get(name, zero), expected.get(name, zero)
        assert (a - b).abs().max() <= 1e-10, name


# -------------------------------------------------------------------------------------------------- names


def test_a_sum_is_the_sum_of_the_updates() -> None:
    model = make()
    layer = model.first
    x = torch.randn(3, 6, dtype=torch.float64)
    outputs = {}
    for names in ((), ("law",), ("med",), ("law", "med"), ("med", "law"), NAMES):
        activate(model, *names)
        outputs[names] = layer(x)
    base = outputs[()]
    assert torch.equal(base, layer.base(x))
    torch.testing.assert_close(outputs["law", "med"], outputs[("law",)] + outputs[("med",)] - base)
    torch.testing.assert_close(outputs["med", "law"], outputs["law", "med"])
    assert torch.equal(outputs[NAMES], outputs["law", "med"])  # art is on other layers
    assert (outputs[("law",)] - outputs[("med",)]).abs().max() > 0.1


def test_merged_is_the_sum_too() -> None:
    model, ids = make(), batch()
    activate(model, *NAMES)
    expected = model(ids)
    merge(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-6, atol=1e-6)
    unmerge(model)
    activate(model)
    base = model(ids)
    merge(model, ["law", "art"])
    merged = model(ids)
    unmerge(model)
    assert torch.equal(model(ids), base)
    activate(model, "law", "art")
    torch.testing.assert_close(model(ids), merged, rtol=1e-6, atol=1e-6)


def test_deleting_takes_one_out_of_the_sum() -> None:
    model, ids = make(), batch()
    activate(model, "law", "art")
    expected = model(ids)
    activate(model, *NAMES)
    remove_adapter(model, "med")
    assert torch.equal(model(ids), expected)
    for name in ("law", "art"):
        remove_adapter(model, name)
    assert not carriers(model)
    torch.manual_seed(0)
    assert torch.equal(model(ids), Net().double().requires_grad_(False)(ids))


@pytest.mark.parametrize("use", [activate, lambda model, *names: route(model, [names]).__enter__()])
def test_unknown_names_change_nothing(use: Callable[..., Any]) -> None:
    model, ids = make(), batch(1)
    activate(model, "law")
    before = model(ids)
    with pytest.raises(UsageError, match="there is no adapter called 'mde'\nattached adapters: law, med"):
        use(model, "law", "mde")
    assert torch.equal(model(ids), before)


def test_dora_cannot_be_summed() -> None:
    model = make("dora")
    for action in (
        lambda: activate(model, "law", "med"),
        lambda: merge(model, ["law", "med"]),
        lambda: route(model, ["law", ("med", "law")]).__enter__(),
    ):
        with pytest.raises(
            ConflictError, match=r"module first: DoRA rescales the whole weight.*cannot be summed"
        ):
            action()
    assert not any(carrier.merged for carrier in carriers(model).values())


# --------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_each_row_uses_its_adapter(method: str) -> None:
    rows = [name if isinstance(name, str) else None for name in ROWS] if method == "dora" else ROWS
    if method == "adalora":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        for name in NAMES:
            attach(model, LoRAConfig(r=2, method=method), name)
        with torch.no_grad():
            for carrier in carriers(model).values():
                for parameter in carrier.adapters.parameters():
                    parameter += torch.randn(parameter.shape)
        x = torch.randn(len(rows), 3, 6, dtype=torch.float64)
    else:
        model, x = make(method), batch()
    expected = row_by_row(model, x, rows)
    activate(model, "art")
    alone = model(x)
    with route(model, rows):
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(model(x), alone)  # the route ends with the block
    assert (found[0] - alone[0]).abs().max() > 0.05


def test_gradients_come_from_the_rows_of_each_adapter_alone() -> None:
    model, ids = make(), batch()
    weights = torch.randn(len(ROWS), 4, 5, dtype=torch.float64)
    (row_by_row(model, ids, ROWS) * weights).sum().backward()
    expected = gradients(model)
    with route(model, ROWS):
        (model(ids) * weights).sum().backward()
    assert_equal(gradients(model), expected)
    with route(model, ["law", None, "law"]):
        model(batch(3)).sum().backward()
    found = gradients(model)
    assert found
    assert all(".law." in name for name in found)


def test_rows_and_batch_must_agree() -> None:
    model = make()
    with route(model, ["law", "med"]), pytest.raises(UsageError, match="adapters for 2 rows, the input has 6"):
        model(batch())
    with route(model, ["law"] * 6):
        with pytest.raises(ConflictError, match="the rows use different adapters"):
            merge(model)
        model(batch())
    merge(model, ["law"])
    with route(model, ["law"] * 6), pytest.raises(ConflictError, match="merged"):
        model(batch())


def test_a_route_ends_when_its_block_fails() -> None:
    model = make()
    activate(model, "med")
    before = model(batch())
    with pytest.raises(ZeroDivisionError), route(model, ["law"] * 6):
        raise ZeroDivisionError
    assert torch.equal(model(batch()), before)


# ------------------------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_recomputing_gives_the_same_gradients(reentrant: bool, rows: list[Any] | None) -> None:
    """Also if the route changes between the forward and the backward pass."""
    model, ids = make(), batch()
    model.train()

    def forward() -> Tensor:
        if rows is None:
            activate(model, "law", "med")
            return model(ids)
        with route(model, rows):
            return model(ids)

    forward().square().sum().backward()
    expected = gradients(model)
    model.recompute = reentrant
    for change in (lambda: None, lambda: activate(model, "art"), lambda: activate(model)):
        loss = forward().square().sum()
        change()
        loss.backward()
        assert_equal(gradients(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_routes_waiting_for_one_backward_pass_are_refused(reentrant: bool) -> None:
    model, ids = make(), batch()
    model.train()
    model.recompute = reentrant
    losses = []
    for name in ("law", "med"):
        activate(model, name)
        losses.append(model(ids).square().sum())
    with pytest.raises(ConflictError, match="several routes were used since the last backward pass"):
        sum(losses).backward()
    model.zero_grad()
    for name in ("law", "med"):  # the refusal leaves nothing behind
        activate(model, name)
        model.recompute = None
        model(ids).square().sum().backward()
        expected = gradients(model)
        model.recompute = reentrant
        model(ids).square().sum().backward()
        assert_equal(gradients(model), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_passes_without_recomputation_leave_nothing_behind(reentrant: bool, training: bool) -> None:
    model, ids = make(), batch()
    for mode, recompute in ((True, None), (training, None), (training, reentrant)):
        for names in (("law",), ("law", "art"), NAMES):
            model.train(mode).recompute = recompute
            activate(model, *names)
            model(ids).square().sum().backward()
            found = gradients(model)
    activate(model, *NAMES)
    model.recompute = None
    model(ids).square().sum().backward()
    assert_equal(found, gradients(model))


def test_one_pass_after_the_other_may_change_the_route() -> None:
    model, ids = make(), batch()
    model.train()
    for reentrant in (True, False):
        for name in ("law", "med", "law"):
            activate(model, name)
            model.recompute = None
            model(ids).square().sum().backward()
            expected = gradients(model)
            model.recompute = reentrant
            model(ids).square().sum().backward()
            assert_equal(gradients(model), expected)


# ---------------------------------------------------------------------------- compiled, autocast, copied


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_compiled(method: str, backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    for name in ("law", "med"):
        attach(model, LoRAConfig(r=2, method=method), name)
    with torch.no_grad():
        for carrier in carriers(model).values():
            for parameter in carrier.adapters.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 6)
    outputs = []
    for name in ("law", "med"):  # another route is another graph, never a stale one
        activate(model, name)
        expected = model(x)
        expected.square().sum().backward()
        grads = gradients(model)
        found = compiled(x)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        for key, value in gradients(model).items():
            torch.testing.assert_close(value, grads[key], rtol=1e-4, atol=1e-5)
        outputs.append(found)
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
    activate(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        activate(model, "law")
        merge(model)
        torch.testing.assert_close(compiled(x), outputs[0].detach(), rtol=1e-4, atol=1e-5)


def test_compiled_with_rows() -> None:
    model, ids = make(dtype=torch.float32), batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with route(model, ROWS):
        torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_autocast(method: str) -> None:
    model = make(method, ("law",), torch.float32)
    ids = batch()
    exact = model(ids)
    exact.square().sum().backward()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 0.03 * exact.abs().max()
    found.float().square().sum().backward()
    rounded = gradients(model)
    assert rounded.keys() == expected.keys()
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).abs().max() <= 0.1 * expected[name].abs().max(), name


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_on_their_own(clone: Callable[[Net], Net]) -> None:
    model, ids = make(), batch()
    activate(model, "law", "art")
    before = model(ids)
    again = clone(model)
    assert torch.equal(again(ids), before)
    activate(again, "med")
    with torch.no_grad():
        for layer in adapter_layers(again).values():
            layer.base.weight.add_(1.0)
    assert torch.equal(model(ids), before)
    merge(model)
    merged = clone(model)
    assert torch.equal(merged(ids), model(ids))
    unmerge(merged)
    assert torch.equal(merged(ids), before)


def test_no_grad_and_evaluation_leave_no_trace() -> None:
    """Generation between two training steps must not make their recomputation ambiguous."""
    model, ids = make(), batch()
    model.train()
    model.recompute = False
    activate(model, "law")
    loss = model(ids).square().sum()
    model.eval()
    with torch.no_grad():
        activate(model, "med")
        model(ids)
    model.train()
    loss.backward()
    found = gradients(model)
    model.recompute = None
    activate(model, "law")
    model(ids).square().sum().backward()
    assert_equal(found, gradients(model))
