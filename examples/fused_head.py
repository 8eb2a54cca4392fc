"""Train a MONAI network for many classes without its logits: the last convolution and the loss together.

    python examples/fused_head.py --steps 20
    python examples/fused_head.py --classes 200 --size 64

The network is MONAI's own, unchanged: `head` shares the parameters of its last convolution.
"""

import argparse

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor

import softdice
from softdice import dice_score
from softdice.head import FusedHead


def stripes(classes: int, size: int) -> tuple[Tensor, Tensor]:
    """A noisy volume whose brightness says in which of the slabs along the first axis a voxel lies, and the slabs."""
    slab = torch.arange(size) * classes // size
    labels = slab.view(1, size, 1, 1).expand(1, size, size, size).contiguous()
    image = labels.unsqueeze(1) / classes + 0.02 * torch.randn(1, 1, size, size, size)
    return image, labels


def main(steps: int, classes: int = 8, size: int = 32, seed: int = 0) -> list[float]:
    """Number of steps -> the loss of each."""
    torch.manual_seed(seed)
    network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=classes, features=(8, 8, 16, 16, 16, 16))
    # loss = DiceCELoss(to_onehot_y=True, softmax=True)
    loss = softdice.SoftDiceLoss(classes, activation="softmax", cost="one_minus")
    loss = loss + softdice.CrossEntropyLoss(classes, activation="softmax")

    # loss(network(image), labels) becomes head(head.features(network, image), labels)
    head = FusedHead(network.final_conv, loss)

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    image, labels = stripes(classes, size)
    history: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = head(head.features(network, image), labels)
        value.backward()
        optimizer.step()
        history.append(value.item())

    network.eval()
    with torch.no_grad():  # the network predicts as ever
        prediction = network(image).argmax(1)
    score = dice_score(prediction, labels, num_classes=classes).mean()
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, mean Dice {score:.3f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    main(options.steps, options.classes, options.size)
