"""Train a small network on drawn discs with plain PyTorch; the loss is one pass of Dice and cross-entropy.

    python examples/plain_pytorch.py --steps 60

The one line that changes is marked; above it stands what it replaces.
"""

import argparse

import torch
from torch import Tensor, nn

from softdice import CrossEntropyLoss, SoftDiceLoss


def discs(samples: int, size: int = 48) -> tuple[Tensor, Tensor]:
    """Noisy images (B, 1, H, W) and labels (B, H, W): 0 background, 1 disc, 2 its core."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = torch.randint(size // 3, 2 * size // 3, (samples, 2, 1, 1))
    radius = torch.randint(size // 6, size // 4, (samples, 1, 1))
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).float().sqrt()
    labels = (distance < radius).long() + (distance < radius / 2).long()
    return (labels + 0.3 * torch.randn(labels.shape)).unsqueeze(1), labels


def main(steps: int, seed: int = 0) -> list[float]:
    """Number of steps -> the loss of each."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    # loss = nn.CrossEntropyLoss()
    loss = SoftDiceLoss(3, activation="softmax") + 0.5 * CrossEntropyLoss(3, activation="softmax")

    history = []
    for step in range(steps):
        images, labels = discs(8)
        value = loss(network(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
