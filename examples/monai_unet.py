"""Train MONAI's UNet on drawn balls; the loss is MONAI's DiceCELoss computed by one pass.

    python examples/monai_unet.py --steps 20

The one line that changes is the import of the loss; above it stands what it replaces.
"""

import argparse

import numpy as np
import torch
from monai.data import DataLoader, Dataset, create_test_image_3d
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, ScaleIntensityd

# from monai.losses import DiceCELoss
from softdice.compat.monai import DiceCELoss


def balls(count: int, size: int = 24) -> Dataset:
    """A dataset of noisy volumes with three balls each, and their labels."""
    items = []
    for number in range(count):
        image, label = create_test_image_3d(
            size,
            size,
            size,
            num_objs=3,
            rad_max=6,
            rad_min=3,
            num_seg_classes=2,
            noise_max=0.2,
            random_state=np.random.RandomState(number),
        )
        items.append({"image": image, "label": label})
    keys = ["image", "label"]
    steps = [EnsureChannelFirstd(keys, channel_dim="no_channel"), ScaleIntensityd("image"), EnsureTyped(keys)]
    return Dataset(items, Compose(steps))


def main(steps: int, seed: int = 0) -> list[float]:
    """Number of steps -> the loss of each."""
    torch.manual_seed(seed)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(8, 16, 32), strides=(2, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    loader = DataLoader(balls(4), batch_size=2, shuffle=True)

    history: list[float] = []
    while len(history) < steps:
        for batch in loader:
            value = loss(network(batch["image"]), batch["label"])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            history.append(value.item())
            print(f"step {len(history):3d}  loss {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
