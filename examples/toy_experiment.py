"""One frozen layer of 100 × 100 and an update of rank 4: what such an update can learn, and what it cannot.

    python examples/toy_experiment.py

Every row of the table trains 800 numbers (804 in the last row) by Adam and then measures the mean squared error
on inputs that training never saw. The frozen weight stays as it was.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import LinearWithLoRA, count_parameters

SIZE, RANK, STEPS, FRESH = 100, 4, 600, 1000


def train(layer: LinearWithLoRA, x: Tensor, target: Tensor) -> None:
    """Fit the update, and nothing else, to the targets."""
    trainable = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def error(layer: LinearWithLoRA, x: Tensor, target: Tensor) -> float:
    """Mean squared error."""
    return F.mse_loss(layer(x), target).item()


def experiment(name: str, base: nn.Linear, change: Tensor, samples: int, ones: bool = False) -> LinearWithLoRA:
    """Train on ``samples`` inputs towards x (W + change)ᵀ or, if the change is one number, x Wᵀ + change."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, base.in_features)
        if ones:
            x[:, -1] = 1  # an input that is always one: its column of W is a bias
        moved = change.expand(count, SIZE) if change.dim() == 0 else x @ change.T
        return x, base(x).detach() + moved

    layer = LinearWithLoRA.wrap(base, rank=RANK, alpha=RANK)
    seen, fresh = draw(samples), draw(FRESH)
    before = error(layer, *fresh)
    train(layer, *seen)
    print(f"{name:<30} {samples:>7} {before:>10.4f} {error(layer, *seen):>10.2e} {error(layer, *fresh):>12.2e}")
    return layer


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    base = nn.Linear(SIZE, SIZE, bias=False)
    with_ones = nn.Linear(SIZE + 1, SIZE, bias=False)
    checksum = base.weight.double().sum().item()
    rank_4 = torch.randn(SIZE, RANK) @ torch.randn(RANK, SIZE) / SIZE**0.5
    five = torch.tensor(5.0)

    print(f"{'the new layer is':<30} {'samples':>7} {'before':>10} {'trained':>10} {'fresh inputs':>12}")
    layer = experiment("W + a matrix of rank 4", base, rank_4, 500)
    experiment("W x + 5, few samples", base, five, 10)
    experiment("W x + 5, many samples", base, five, 500)
    experiment("W x + 5, one input always 1", with_ones, five, 500, ones=True)

    counts = count_parameters(layer)
    print(f"frozen {base.weight.numel():,}, total {counts['total']:,}, trainable {counts['trainable']:,}")
    print(f"sum of |B A|: {layer.lora.delta().abs().sum().item():.1f} (0: nothing learned)")
    print(f"sum of W: {checksum:.6f} before, {base.weight.double().sum().item():.6f} after")


if __name__ == "__main__":
    main()
