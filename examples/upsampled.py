"""Train a network that predicts at a quarter of the labels' size; the upsampling is part of the loss.

    python examples/upsampled.py --steps 60

The network is built as SegFormer's, DeepLab's and UPerNet's are: features of several strides, joined at stride 4, and a
1x1 convolution. In training nothing of full resolution exists but the labels.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

import softdice
from softdice import dice_score


class Network(nn.Module):
    """images (B, 1, H, W) -> logits (B, C, H / 4, W / 4)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stride4 = nn.Sequential(nn.Conv2d(1, 16, 5, 4, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))
        self.stride8 = nn.Conv2d(16, 32, 3, 2, 1)
        self.classifier = nn.Conv2d(48, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = relu(self.stride4(images))
        coarse = interpolate(relu(self.stride8(fine)), fine.shape[2:], mode="bilinear")
        return self.classifier(torch.cat([fine, coarse], 1))


def discs(samples: int, size: int = 96) -> tuple[Tensor, Tensor]:
    """Noisy images (B, 1, H, W) and labels (B, H, W): 0 background, 1 disc, 2 its core, 255 an unlabelled corner."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = torch.randint(size // 3, 2 * size // 3, (samples, 2, 1, 1))
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).float().sqrt()
    labels = (distance < size / 4).long() + (distance < size / 8).long()
    images = (labels + 0.3 * torch.randn(labels.shape)).unsqueeze(1)
    labels[:, :8, :8] = 255
    return images, labels


def main(steps: int, seed: int = 0) -> list[float]:
    """Number of steps -> the loss of each."""
    torch.manual_seed(seed)
    network = Network(3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    dice = softdice.SoftDiceLoss(3, activation="softmax", ignore_index=255)
    entropy = softdice.CrossEntropyLoss(3, activation="softmax", ignore_index=255)
    # loss = nn.CrossEntropyLoss(ignore_index=255), of interpolate(logits, labels.shape[-2:], mode="bilinear")
    loss = softdice.Upsampled(dice + entropy, mode="bilinear")

    history: list[float] = []
    for _ in range(steps):
        images, labels = discs(4)
        value = loss(network(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())

    images, labels = discs(4)
    with torch.no_grad():  # a prediction is made as ever
        prediction = interpolate(network(images), labels.shape[-2:], mode="bilinear").argmax(1)
    score = dice_score(prediction, labels, num_classes=3, ignore_index=255).mean()
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, mean Dice {score:.3f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
