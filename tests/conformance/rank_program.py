"""One rank of the runs that `test_ranks` starts: ``python rank_program.py SCENARIO OUT [ARGUMENTS]``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.checkpoint.state import State
from lorakit.errors import DataError, LorakitError, UsageError
from lorakit.ops.loss import cross_entropy_sum
from lorakit.parallel import watch
from lorakit.parallel.ddp import sum_gradients
from lorakit.parallel.make import make_strategy
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World, check_same_everywhere, join

UPDATES = 5
CUT = 3  # updates before the run is saved and begun again
PASSES = 5  # micro-batches of an update: uneven for two ranks
CLIP = 0.05
RATE, DECAY = 0.01, 0.1


class Uint8Linear(nn.Module):
    """A frozen weight of which only bytes are stored, as that of a quantised base."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", weight.abs().max() / 127)
        self.weight = nn.Parameter((weight / self.scale + 128).round().to(torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.to(x.dtype) - 128) * self.scale)


def model_of(
    *, base: torch.dtype = torch.float32, checkpointing: bool = False, quantised: bool = False
) -> nn.Module:
    """A tiny Llama with an adapter on some layers; sizes that two ranks cannot share evenly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorakit.adapters.attach import add_lora_to_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=24, intermediate_size=41, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(base)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if quantised:
        for layer in model.model.layers:
            layer.mlp.up_proj = Uint8Linear(layer.mlp.up_proj.weight.detach())
    add_lora_to_model(model, r=3, target_modules="q_proj,v_proj,down_proj", seed=1)
    return model.train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW in two groups, as LoRA+ has them."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if "lora_B" not in n], "lr": RATE},
        {"params": [p for n, p in trained if "lora_B" in n], "lr": 4 * RATE},
    ]
    return torch.optim.AdamW(groups, weight_decay=DECAY, fused=True)


def data(step: int) -> list[Tensor]:
    """The micro-batches of an update: ids of different lengths."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randint(67, (2, 4 + (step + i) % 5), generator=generator) for i in range(PASSES)]


def loss_of(forward: nn.Module, ids: Tensor) -> Tensor:
    logits = forward(input_ids=ids, use_cache=False).logits
    return cross_entropy_sum(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def accumulate(strategy: Strategy, step: int, *, stop_after: int = PASSES) -> float:
    """The update's passes on this rank, as many as on any other; ``stop_after`` so many, it is given up."""
    world = strategy.world
    groups = [data(step)[rank :: world.size] for rank in range(world.size)]
    mine, passes = groups[world.rank], max(map(len, groups))
    (tokens,) = world.sum(sum(ids[:, 1:].numel() for ids in mine))
    total = 0.0
    for number in range(min(passes, stop_after)):
        ids = mine[number] if number < len(mine) else groups[0][0]
        loss = (1 / tokens if number < len(mine) else 0.0) * loss_of(strategy.forward, ids)
        strategy.backward(loss, last=number == passes - 1)
        total += loss.item()
    return world.sum(total)[0]


def update(strategy: Strategy, step: int) -> float:
    """Forward, backward, clip, step, as the training loop does it; returns the mean loss."""
    loss = accumulate(strategy, step)
    strategy.reduce()
    norm = strategy.norm()
    strategy.scale(min(CLIP / norm, 1.0))
    clipped = sum(each**2 for each in strategy.norms().values()) ** 0.5
    assert abs(clipped - min(CLIP, norm)) < 1e-5 * CLIP, (clipped, norm)
    strategy.step()
    strategy.discard()
    return loss


def give_up(strategy: Strategy, step: int) -> None:
    """Two updates that leave no trace: one stopped in the middle, one refused at its end."""
    accumulate(strategy, step, stop_after=1)
    strategy.discard()
    accumulate(strategy, step)
    strategy.reduce()
    strategy.scale(0.5)
    strategy.discard()


def settings(stage: int, **more: Any) -> dict[str, Any]:
    """As `zero_config.fill` gives them."""
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **more},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


OFFLOAD = {"device": "cpu", "pin_memory": False}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "deepspeed": settings(1)},
    "zero2": {"kind": "deepspeed", "deepspeed": settings(2)},
    "zero3": {"kind": "deepspeed", "deepspeed": settings(3)},
    "zero2-offload": {"kind": "deepspeed", "deepspeed": settings(2, offload_optimizer=OFFLOAD)},
    "zero3-offload": {
        "kind": "deepspeed",
        "deepspeed": settings(3, offload_optimizer=OFFLOAD, offload_param=OFFLOAD),
    },
}


def begin(name: str, world: World, **model: Any) -> Strategy:
    """A fresh model under a strategy; ``none`` is one process, whatever the world."""
    made = model_of(**model)
    alone = name not in STRATEGIES
    how = {"kind": "none"} if alone else STRATEGIES[name]
    return make_strategy(model=made, optimizer=optimizer_of(made), world=World() if alone else world, **how)


def kept(strategy: Strategy) -> State:
    """The collected state as a checkpoint would give it back, to every rank."""
    state, world = strategy.collect(), strategy.world
    copied = State({name: tensor.detach().clone() for name, tensor in state.tensors.items()}, state.values)
    found: State = world.gather(copied if world.first else None)[0]
    return found


def trajectories(world: World, out: Path, *names: str) -> None:
    """For each strategy: losses, the states in the middle and at the end, what came of going on from there."""
    first: State | None = None
    for name in names:
        strategy, losses, middle = begin(name, world), [], State()
        for step in range(UPDATES):
            if step == CUT:
                middle = kept(strategy)
            losses.append(update(strategy, step))
        end = kept(strategy)
        first = first or middle
        seen = {
            "losses": losses,
            "resumed": resumed(begin(name, world), middle, losses, end),
            "rolled_back": resumed(strategy, middle, losses, end),
            "crossed": go_on(begin(name, world), first),
        }
        if world.first:
            (out / f"{name}.json").write_text(json.dumps(seen))
            torch.save({"middle": vars(middle), "end": vars(end)}, out / f"{name}.pt")
    sharded_bases(world, out)


def go_on(strategy: Strategy, middle: State) -> list[float]:
    """The losses of the second half."""
    strategy.restore(middle)
    return [update(strategy, step) for step in range(CUT, UPDATES)]


def resumed(strategy: Strategy, middle: State, losses: list[float], end: State) -> bool:
    """Whether a run begun again in the middle is the same, bit for bit; given-up updates do not matter."""
    strategy.restore(middle)
    same = equal(kept(strategy), middle)
    give_up(strategy, CUT)
    again = [update(strategy, step) for step in range(CUT, UPDATES)]
    return same and again == losses[CUT:] and equal(kept(strategy), end)


def equal(a: State, b: State) -> bool:
    same = all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items() if name in b.tensors)
    return same and a.tensors.keys() == b.tensors.keys() and a.values == b.values


def sharded_bases(world: World, out: Path) -> None:
    """What bases are made of, in parts, beside one process on the same rank."""
    checkpointing: dict[str, Any] = {"checkpointing": True}
    bytes_: dict[str, Any] = {"base": torch.bfloat16, "quantised": True}
    seen = {}
    for name, base in [("fsdp", checkpointing), ("fsdp", bytes_), ("zero3", bytes_ | checkpointing)]:
        pair = [begin(kind, world, **base) for kind in (name, "none")]
        seen[f"{name} {sorted(base)}"] = [[update(each, step) for step in range(3)] for each in pair]
    seen["stage two"] = [second_stage(begin(kind, world)) for kind in ("fsdp", "none")]
    if world.first:
        (out / "bases.json").write_text(json.dumps(seen))


def second_stage(strategy: Strategy) -> list[float]:
    """One update of the adapters, then three of everything; last, the sum of a checkpoint's numbers."""
    from lorakit.adapters.attach import freeze_backbone_params

    losses = [update(strategy, 0)]
    known = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    freeze_backbone_params(strategy.model, freeze=False)
    strategy.admit({"params": [p for p in strategy.model.parameters() if id(p) not in known], "lr": RATE / 10})
    losses += [update(strategy, step) for step in (1, 2)]
    middle = kept(strategy)
    losses.append(update(strategy, 3))
    end = kept(strategy)
    strategy.restore(middle)
    assert update(strategy, 3) == losses[-1]
    assert equal(kept(strategy), end)
    return [*losses, sum(tensor.double().abs().sum().item() for tensor in end.tensors.values())]


def agree(world: World, out: Path) -> None:
    """Small things that ranks do together."""
    one, two, three = (nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(3))
    one.grad = torch.full_like(one, 1 + world.rank)
    if world.rank == 1:
        two.grad = torch.full_like(two, 0.5)
    sum_gradients(world, [one, two, three])
    assert one.grad.tolist() == [3.0] * 3
    assert two.grad is not None
    assert two.grad.tolist() == [0.5] * 3
    assert three.grad is None
    check_same_everywhere(world, {"data": "alike"})
    refusal = ""
    try:
        check_same_everywhere(world, {"config": "alike", "data": f"sha {world.rank}"})
    except UsageError as error:
        refusal = error.render()
    ranks = world.gather(os.environ["LOCAL_RANK"])
    seen = {"ranks": ranks, "any": world.any(world.rank == 1), "refusal": refusal}
    sys.stdout.write(f"said by rank {world.rank}\n")
    if world.first:
        (out / "agree.json").write_text(json.dumps(seen))


def fail(world: World, out: Path) -> None:
    """Rank 1 fails while rank 0 waits for it."""
    if world.rank == 1:
        raise DataError("row 7 is broken")
    world.wait()


def vanish(world: World, out: Path, rank: str) -> None:
    if world.rank == int(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    world.wait()


def freeze(world: World, out: Path) -> None:
    """Rank 1 stops, heartbeat and all, while rank 0 waits for it in a collective."""
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.wait()


def listen(world: World, out: Path) -> None:
    """Agree, note the ranks' processes, and exit as the loop does once all were told to stop."""
    agree(world, out)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: told.append(signum))
    world.wait()
    (out / f"ready-{world.rank}").write_text(str(os.getpid()))
    while not world.any(bool(told)):
        time.sleep(0.05)
    assert told == [signal.SIGTERM]
    sys.exit(128 + signal.SIGTERM)


SCENARIOS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (trajectories, agree, fail, vanish, freeze, listen)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, folder, *arguments = sys.argv[1:]
    watch.SILENCE, watch.GRACE, watch.DOUBT = 3.0, 1.0, 2.0
    if scenario == "trajectories":
        import deepspeed.ops

        # DeepSpeed would compile shared-memory collectives for CPUs, which training does not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        with join(timeout=60) as joined:
            SCENARIOS[scenario](joined, Path(folder), *arguments)
    except LorakitError as error:
        sys.stderr.write(error.render() + "\n")
        sys.exit(error.exit_code)
