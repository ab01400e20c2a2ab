"""The life of an adapter on a small convolutional network of plain PyTorch, with images made on the spot.

    python examples/any_pytorch_model.py [FOLDER]

Task A: in which of four directions do fine stripes run? The network learns it whole. Task B: the same of coarse
stripes. An adapter learns that, and its files go to FOLDER (a temporary one if it is left out).
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import LoRAManager, add_lora_to_model, count_parameters

FINE, COARSE = 4.0, 14.0  # pixels from stripe to stripe


class Net(nn.Module):
    """Two convolutions and a linear layer: images [N, 1, 16, 16] to logits [N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Channels are averaged over the image before the linear layer."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.head(F.relu(self.conv2(x)).mean(dim=(2, 3)))


def images(count: int, period: float) -> tuple[Tensor, Tensor]:
    """Noisy stripes at 0°, 45°, 90° or 135°, and which of the four."""
    label = torch.randint(4, (count,))
    angle, phase = (label * math.pi / 4).view(-1, 1, 1), 2 * math.pi * torch.rand(count, 1, 1)
    pixel = torch.arange(16.0)
    along = pixel[:, None] * angle.cos() + pixel * angle.sin()
    stripes = torch.sin(2 * math.pi / period * along + phase) + 0.5 * torch.randn(count, 16, 16)
    return stripes.unsqueeze(1), label


def train(model: nn.Module, period: float, steps: int = 150) -> None:
    """Train whatever is trainable, on fresh images in every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        x, label = images(64, period)
        optimizer.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimizer.step()


@torch.no_grad()
def report(what: str, model: nn.Module, exam: list[tuple[Tensor, Tensor]]) -> None:
    """Print the share of right answers on each task."""
    shares = [(model(x).argmax(dim=1) == label).double().mean().item() for x, label in exam]
    print(f"{what:<30}" + "".join(f"{share:>9.1%}" for share in shares))


def main(folder: Path) -> None:
    """Train, adapt, save, load, merge."""
    exam = [images(1000, FINE), images(1000, COARSE)]
    print(f"{'right answers on task':<30} {'A':>8}{'B':>9}")
    model = Net()
    train(model, FINE)
    base = copy.deepcopy(model)
    report("network trained on A", model, exam)

    manager = LoRAManager(add_lora_to_model(model, r=4, target_modules="conv1,conv2,head"))
    train(model, COARSE)
    report("with the adapter trained on B", model, exam)
    manager.disable_adapters()
    report("adapter switched off", model, exam)
    manager.set_adapter("default")
    manager.save_lora_checkpoint(folder / "adapter.pth")
    loaded = LoRAManager(base)  # a model without an adapter
    loaded.load_lora_checkpoint(folder / "adapter.pth")
    loaded.merge_lora_weights()
    torch.save(base.state_dict(), folder / "merged.pth")
    plain = Net()  # no lorakit from here on
    plain.load_state_dict(torch.load(folder / "merged.pth", weights_only=True))
    report("plain network, merged weights", plain, exam)
    difference = max((plain(x) - model(x)).abs().max().item() for x, _ in exam)
    print(f"largest difference of the outputs, merged and not: {difference:.1e}")
    print("trained {trainable:,} of {total:,} numbers".format(**count_parameters(model)))


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
