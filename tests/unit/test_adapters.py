"""Adapters on plain PyTorch models: what they are, where they go, what they leave alone, how they merge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.adapters.attach import (
    activate,
    adapter_layers,
    add_lora_to_model,
    attach,
    count_parameters,
    detach,
    freeze_backbone_params,
)
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.manager import LoRAManager
from lorakit.errors import ConflictError, TargetError, UsageError


class Block(nn.Module):
    """A small net with repeated names, a convolution, and a head that it knows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(6, 6), "v_proj": nn.Linear(6, 6, bias=False)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 10, bias=False)
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["v_proj"](torch.tanh(layer["q_proj"](x)))
        return self.lm_head(self.norm(x))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def inputs(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fill(model: nn.Module, seed: int = 7) -> None:
    """Give every B (zero at the start) random values."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for adapter in layer.adapters.values():
            adapter.lora_B.data.normal_(generator=generator)


# ------------------------------------------------------------------------------------------------ targets


def attached(model: nn.Module, targets: Any) -> list[str]:
    add_lora_to_model(model, target_modules=targets)
    return list(adapter_layers(model))


def test_all_leaves_the_head_out(block: Block) -> None:
    every = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
    assert attached(block, "all") == every


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (["v_proj"], ["layers.0.v_proj", "layers.1.v_proj"]),
        ("lm_head", ["lm_head"]),
        ("layers.1.q_proj", ["layers.1.q_proj"]),
        ("1.q_proj,lm_head", ["layers.1.q_proj", "lm_head"]),
        (["lm_head", "q_proj"], ["layers.0.q_proj", "layers.1.q_proj", "lm_head"]),
    ],
)
def test_targets_by_name(block: Block, targets: Any, paths: list[str]) -> None:
    assert attached(block, targets) == paths


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_porj", "target 'q_porj' matches no module of the model\ndid you mean q_proj (2 modules)"),
        ("proj", "target 'proj' matches no module of the model\ndid you mean"),
        (["q_proj", "zzz"], "target 'zzz' matches no module of the model\ndid you mean q_proj (2 modules), "),
        ("norm", "module norm: a LayerNorm cannot carry an adapter\nsupported layers: Linear"),
        ("layers", "module layers: a ModuleList cannot carry an adapter"),
    ],
)
def test_targets_that_cannot_be(block: Block, targets: Any, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        attached(block, targets)
    assert str(caught.value).startswith(message)
    assert not adapter_layers(block)
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(TargetError, match="the model has no linear layer"):
        attached(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()), "all")


def test_attention_of_torch_is_never_taken_silently() -> None:
    """`nn.MultiheadAttention` reads its projection past forward: an adapter on it would do nothing."""
    assert attached(nn.TransformerEncoderLayer(8, 2, 16), "all") == ["linear1", "linear2"]
    with pytest.raises(TargetError, match="a NonDynamicallyQuantizableLinear cannot carry an adapter"):
        attached(nn.TransformerEncoderLayer(8, 2, 16), "out_proj")


def test_encoder_layer_uses_its_adapters_in_evaluation() -> None:
    """torch's fast path would read the base weights past the adapters."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    add_lora_to_model(model, r=2, seed=1)
    fill(model)
    x = inputs(2, 5, 8)
    trained = model.train()(x)
    with torch.no_grad():
        evaluated = model.eval()(x)
        LoRAManager(model).disable_adapters()
        base = model(x)
    torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-5)
    assert (evaluated - base).abs().max() > 0.1


def test_an_adapter_on_one_of_two_tied_weights_changes_that_one() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 6), "head": nn.Linear(6, 10)})
    model["head"].weight = model["embedding"].weight
    assert attached(model, "head") == ["head"]
    fill(model)
    ids, x = torch.arange(10), inputs(3, 6)
    rows, scores = model["embedding"](ids), model["head"](x)
    LoRAManager(model).merge_lora_weights()
    assert torch.equal(model["embedding"](ids), rows)
    torch.testing.assert_close(model["head"](x), scores, rtol=1e-5, atol=1e-5)
    assert model["head"].weight is not model["embedding"].weight
    detach(model)
    assert model["head"].weight is model["embedding"].weight


def test_one_module_in_two_places_has_one_adapter_in_both() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert attached(model, "all") == ["0"]
    fill(model)
    assert model[0] is model[2]
    once = adapter_layers(model)["0"]
    x = inputs(3, 6)
    expected = once(torch.relu(once(x)))
    assert torch.equal(model(x), expected)
    assert (expected - shared(torch.relu(shared(x)))).abs().max() > 0.1
    LoRAManager(model).merge_lora_weights()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    detach(model)
    assert model[0] is model[2] is shared


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a.b", "-a", "a b", "é", "a\n", "a" * 65, "keys", "values", "pop"]
)
def test_names_that_cannot_be(name: str, block: Block) -> None:
    with pytest.raises(UsageError, match="cannot name an adapter"):
        attach(block, LoRAConfig(), name)
    assert not adapter_layers(block)
    assert all(parameter.requires_grad for parameter in block.parameters())


# --------------------------------------------------------------------------------------- attach and detach


def test_attaching_changes_no_output_and_freezes_the_base(block: Block) -> None:
    x = inputs(4, 6)
    before = block(x)
    assert add_lora_to_model(block, r=2) is block
    assert torch.equal(block(x), before)
    trainable = [name for name, parameter in block.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 8
    assert all(".adapters.default.lora_" in name for name in trainable)
    block(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in block.parameters())


def test_detach_gives_the_very_same_modules_back(block: Block) -> None:
    x = inputs(4, 6)
    before = block(x)
    modules, tensors = dict(block.named_modules()), dict(block.named_parameters())
    add_lora_to_model(block, r=2, target_modules=["q_proj", "lm_head"])
    fill(block)
    assert not torch.equal(block(x), before)
    LoRAManager(block).merge_lora_weights()
    assert detach(block) is block
    after, tensors_after = dict(block.named_modules()), dict(block.named_parameters())
    assert list(after) == list(modules)
    assert all(after[path] is module for path, module in modules.items())
    assert all(tensors_after[path] is tensor for path, tensor in tensors.items())
    assert torch.equal(block(x), before)


def test_an_adapter_layer_still_looks_like_its_base(block: Block) -> None:
    weight, bias = block.layers[0]["q_proj"].weight, block.layers[0]["q_proj"].bias
    add_lora_to_model(block)
    layer = block.layers[0]["q_proj"]
    assert layer.weight is weight
    assert layer.bias is bias
    assert block.layers[0]["v_proj"].bias is None
    assert "r=8, scaling=2, dropout=0" in repr(block)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_seed_neither_reads_nor_moves_the_global_random_state(init: str) -> None:
    starts = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32))
        state = torch.get_rng_state()
        add_lora_to_model(model, r=4, seed=3, init_lora_weights=init)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append([layer.adapter("default").lora_A.data for layer in adapter_layers(model).values()])
    assert all(torch.equal(first, second) for first, second in zip(*starts, strict=True))
    assert not torch.equal(starts[0][0][:, :8], starts[0][1])


def test_without_a_seed_the_global_random_state_decides() -> None:
    def start() -> torch.Tensor:
        model = add_lora_to_model(nn.Sequential(nn.Linear(8, 8)), r=2)
        return adapter_layers(model)["0"].adapter("default").lora_A.data

    torch.manual_seed(4)
    first, second = start(), start()
    torch.manual_seed(4)
    assert torch.equal(start(), first)
    assert not torch.equal(first, second)


def test_initialisers() -> None:
    """He's rule is uniform in ±1/√in (std 1/√(3·in)), gaussian has std 1/r; B is zero."""
    for init, bound, deviation in (("kaiming", 0.05, 0.05 / math.sqrt(3)), ("gaussian", math.inf, 1 / 64)):
        model = add_lora_to_model(nn.Sequential(nn.Linear(400, 50)), r=64, init_lora_weights=init, seed=0)
        adapter = adapter_layers(model)["0"].adapter("default")
        assert adapter.lora_A.abs().max() <= bound
        assert adapter.lora_A.std().item() == pytest.approx(deviation, rel=0.02)
        assert not adapter.lora_B.any()
        assert (adapter.lora_A.shape, adapter.lora_B.shape) == ((64, 400), (50, 64))


def test_adapters_are_float32_on_a_bf16_base(block: Block) -> None:
    x = inputs(4, 6).bfloat16()
    block.bfloat16()
    before = block(x)
    add_lora_to_model(block, r=2)
    assert {p.dtype for p in block.parameters() if p.requires_grad} == {torch.float32}
    assert block(x).dtype == torch.bfloat16
    assert torch.equal(block(x), before)


def test_an_adapter_name_is_used_once(block: Block) -> None:
    """Also on other layers: one name with two settings could not be saved."""
    attach(block, LoRAConfig(r=2, target_modules="q_proj"))
    fill(block)
    x = inputs(4, 6)
    before = block(x)
    with pytest.raises(ConflictError, match="an adapter called 'default' is already there"):
        attach(block, LoRAConfig(r=4, target_modules="v_proj"))
    assert list(adapter_layers(block)) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert torch.equal(block(x), before)


def test_freeze_backbone_params(block: Block) -> None:
    add_lora_to_model(block, r=2)
    own = [p for layer in adapter_layers(block).values() for p in layer.adapters.parameters()]
    freeze_backbone_params(block, freeze=False)
    assert all(p.requires_grad for p in block.parameters())
    x = inputs(4, 6)
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    freeze_backbone_params(block)
    assert {id(p) for p in block.parameters() if p.requires_grad} == {id(p) for p in own}


# --------------------------------------------------------------------------------------------------- count


@pytest.mark.parametrize(
    ("size", "r", "trainable", "total"),
    [(4096, 8, 65_536, 16_842_752), (100, 4, 800, 10_800), (1000, 4, 8_000, 1_008_000)],
)
def test_count_parameters(size: int, r: int, trainable: int, total: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(size, size, bias=False))
    assert count_parameters(model) == {"trainable": size**2, "total": size**2, "percent": 100.0}
    add_lora_to_model(model, r=r)
    percent = pytest.approx(100 * trainable / total, rel=1e-12)
    assert count_parameters(model) == {"trainable": trainable, "total": total, "percent": percent}


@pytest.fixture(scope="module")
def llama_7b() -> nn.Module:
    """Llama-2-7B's shapes without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [
        ("q_proj,v_proj", 4_194_304),
        ("q_proj,k_proj,v_proj,o_proj", 8_388_608),
        ("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", 19_988_480),
        ("all", 19_988_480),
    ],
)
def test_count_parameters_of_llama_7b(llama_7b: nn.Module, targets: str, trainable: int) -> None:
    add_lora_to_model(llama_7b, r=8, target_modules=targets)
    counted = count_parameters(llama_7b)
    detach(llama_7b)
    assert (counted["trainable"], counted["total"]) == (trainable, 6_738_415_616 + trainable)


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model)["total"] == 16


def test_nothing_to_count() -> None:
    assert count_parameters(nn.ReLU()) == {"trainable": 0, "total": 0, "percent": 0.0}


# ------------------------------------------------------------------------------------------------- forward


def test_one_layer_by_hand() -> None:
    torch.manual_seed(0)
    model = add_lora_to_model(nn.Sequential(nn.Linear(6, 5)).double(), r=2, lora_alpha=3, use_rslora=True)
    fill(model)
    layer = adapter_layers(model)["0"]
    adapter, base = layer.adapter("default"), layer.base
    x = inputs(4, 6, dtype=torch.float64)
    update = adapter.lora_B.double() @ adapter.lora_A.double()
    expected = x @ (base.weight + 3 / math.sqrt(2) * update).T + base.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_is_there_in_training_only(block: Block) -> None:
    add_lora_to_model(block, r=2, lora_dropout=0.5, seed=0)
    plain = add_lora_to_model(Block(), r=2, seed=0)
    fill(block)
    plain.load_state_dict(block.state_dict())
    x = inputs(4, 6)
    assert torch.equal(block.eval()(x), block(x))
    torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.manual_seed(1)
    first, second = block.train()(x), block(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(block(x), first)


def test_dropout_keeps_the_mean() -> None:
    model = add_lora_to_model(nn.Sequential(nn.Linear(64, 4)), r=4, lora_dropout=0.25, seed=0)
    fill(model)
    x = inputs(1, 64)
    exact = model.eval()(x)
    torch.manual_seed(2)
    draws = model.train()(x.expand(20000, 64))
    deviation = draws.std(0) / math.sqrt(20000)
    assert deviation.min() > 0
    assert ((draws.mean(0) - exact).abs() < 5 * deviation).all()


def test_a_module_in_evaluation_mode_gets_an_adapter_in_that_mode(block: Block) -> None:
    block.eval()
    add_lora_to_model(block, lora_dropout=0.5)
    assert not any(module.training for module in block.modules())


def test_two_adapters_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    manager = LoRAManager(model)
    manager.add_adapter("law", LoRAConfig(r=2, lora_alpha=3), seed=1)
    manager.add_adapter("med", LoRAConfig(r=3, lora_alpha=5), seed=2)
    fill(model)
    x = inputs(4, 6, dtype=torch.float64)
    outputs: dict[str, torch.Tensor] = {}
    for names in ("law", "med"):
        manager.set_adapter(names)
        outputs[names] = model(x)
    manager.disable_adapters()
    base = model(x)
    manager.set_adapter(["law", "med"])
    torch.testing.assert_close(model(x), outputs["law"] + outputs["med"] - base, rtol=1e-12, atol=1e-12)
    assert (outputs["law"] - outputs["med"]).abs().max() > 0.1
    assert torch.equal(base, model[0].base(x))
    assert manager.adapter_names == ("law", "med")


def test_the_newest_adapter_is_active_and_deleting_goes_back(block: Block) -> None:
    x = inputs(4, 6)
    base = block(x)
    manager = LoRAManager(block)
    manager.add_adapter("law", LoRAConfig(r=2, target_modules="q_proj"))
    fill(block, seed=1)
    law = block(x)
    manager.add_adapter("med", LoRAConfig(r=2, target_modules="v_proj"))
    assert torch.equal(block(x), base)  # its B is still zero
    manager.set_adapter("law")
    assert torch.equal(block(x), law)
    manager.delete_adapter("law")
    assert list(adapter_layers(block)) == ["layers.0.v_proj", "layers.1.v_proj"]
    assert torch.equal(block(x), base)
    manager.delete_adapter("med")
    assert not adapter_layers(block)


def test_unknown_adapters_are_named(block: Block) -> None:
    manager = LoRAManager(add_lora_to_model(block, adapter_name="law"))
    for action in (manager.set_adapter, manager.delete_adapter):
        with pytest.raises(UsageError, match="there is no adapter called 'med'\nattached adapters: law"):
            action("med")
    with pytest.raises(UsageError, match="attached adapters: none"):
        activate(nn.Sequential(nn.Linear(2, 2)), "law")


def test_forward_hooks_of_the_base_still_run() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    seen: list[torch.Size] = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    add_lora_to_model(model, r=2)
    model(inputs(4, 6))
    assert seen == [(4, 5)]


# ------------------------------------------------------------------------------------------- merge, unmerge


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("names", [("law",), ("law", "med")])
def test_merged_is_the_same_function(dtype: torch.dtype, tolerance: float, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10, bias=False)).to(dtype)
    manager = LoRAManager(model)
    manager.add_adapter("law", LoRAConfig(r=3, use_rslora=True), seed=1)
    manager.add_adapter("med", LoRAConfig(r=5, target_modules="1"), seed=2)
    for layer in adapter_layers(model).values():
        for adapter in layer.adapters.values():
            nn.init.normal_(adapter.lora_B, std=0.1)
    manager.set_adapter(list(names))
    x = inputs(8, 20, dtype=dtype)
    before = model(x)
    manager.merge_lora_weights()
    merged = model(x)
    torch.testing.assert_close(merged, before, rtol=tolerance, atol=tolerance)
    assert merged.dtype == dtype
    manager.unmerge_lora_weights()
    manager.disable_adapters()
    assert (model(x) - merged).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit_and_object(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = add_lora_to_model(Block(dtype), r=2, seed=1)
    fill(model)
    weights = {path: layer.base.weight for path, layer in adapter_layers(model).items()}
    copies = {path: weight.clone() for path, weight in weights.items()}
    manager = LoRAManager(model)
    for _ in range(3):
        manager.merge_lora_weights()
        assert not any(layer.base.weight is weights[path] for path, layer in adapter_layers(model).items())
        manager.unmerge_lora_weights()
    for path, layer in adapter_layers(model).items():
        assert layer.base.weight is weights[path]
        assert torch.equal(layer.base.weight, copies[path])
    manager.unmerge_lora_weights()  # nothing left to do


def test_a_merged_bf16_weight_is_the_exact_one_rounded_once() -> None:
    torch.manual_seed(0)
    model = add_lora_to_model(nn.Sequential(nn.Linear(16, 16)).bfloat16(), r=2, seed=1)
    fill(model)
    layer = adapter_layers(model)["0"]
    adapter = layer.adapter("default")
    exact = layer.base.weight.double() + 2 * (adapter.lora_B.double() @ adapter.lora_A.double())
    LoRAManager(model).merge_lora_weights()
    one_rounding = exact.abs() * 2**-8 + 1e-6
    assert ((layer.base.weight.double() - exact).abs() <= one_rounding).all()


def test_merging_named_adapters(block: Block) -> None:
    manager = LoRAManager(block)
    manager.add_adapter("law", LoRAConfig(r=2, target_modules="q_proj"), seed=1)
    fill(block)
    x = inputs(4, 6)
    law = block(x)
    manager.add_adapter("med", LoRAConfig(r=2), seed=2)
    manager.merge_lora_weights(["law"])
    torch.testing.assert_close(block(x), law, rtol=1e-5, atol=1e-5)
    manager.unmerge_lora_weights()
    with pytest.raises(UsageError, match="there is no adapter called 'lwa'"):
        manager.merge_lora_weights(["law", "lwa"])
    assert not any(layer.merged for layer in adapter_layers(block).values())


def test_while_merged_nothing_that_would_have_no_effect_is_accepted(block: Block) -> None:
    manager = LoRAManager(add_lora_to_model(block, r=2))
    manager.merge_lora_weights()
    for action in (
        manager.merge_lora_weights,
        manager.disable_adapters,
        lambda: manager.set_adapter("default"),
        lambda: manager.add_adapter("law", LoRAConfig()),
    ):
        with pytest.raises(ConflictError, match=r"merged.*\ncall unmerge_lora_weights\(\) first"):
            action()
    assert manager.adapter_names == ("default",)
    assert all(layer.merged for layer in adapter_layers(block).values())


def test_deleting_unmerges(block: Block) -> None:
    x = inputs(4, 6)
    base = block(x)
    manager = LoRAManager(block)
    manager.add_adapter("law", LoRAConfig(r=2, target_modules="q_proj"))
    manager.add_adapter("med", LoRAConfig(r=2, target_modules="v_proj"))
    fill(block)
    manager.set_adapter(["law", "med"])
    manager.merge_lora_weights()
    manager.delete_adapter("law")
    assert not any(layer.merged for layer in adapter_layers(block).values())
    manager.delete_adapter("med")
    assert torch.equal(block(x), base)
    assert not any(isinstance(module, AdapterLayer) for module in block.modules())
