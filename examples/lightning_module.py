"""Train a LightningModule on drawn squares that overlap (several labels per pixel); the loss is smp's, in one pass.

    python examples/lightning_module.py --epochs 3

The one line that changes is the import of the loss; above it stands what it replaces.
"""

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# from segmentation_models_pytorch.losses import DiceLoss
from softdice.compat.smp import DiceLoss


def squares(samples: int, size: int = 32) -> TensorDataset:
    """Noisy images (B, 1, H, W) and two masks that may overlap (B, 2, H, W)."""
    masks = torch.zeros(samples, 2, size, size)
    for sample in range(samples):
        for channel in range(2):
            top, left = torch.randint(0, size // 2, (2,)).tolist()
            masks[sample, channel, top : top + size // 3, left : left + size // 3] = 1
    images = masks[:, :1] + 2 * masks[:, 1:] + 0.2 * torch.randn(samples, 1, size, size)
    return TensorDataset(images, masks)


class Segmentation(lightning.LightningModule):
    """A small network, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 3, padding=1))
        self.loss = DiceLoss(mode="multilabel")
        self.history: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        value = self.loss(self.network(images), masks)
        self.history.append(value.item())
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(epochs: int, seed: int = 0) -> list[float]:
    """Number of epochs -> the loss of each step."""
    lightning.seed_everything(seed, verbose=False)
    model = Segmentation()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(squares(64), batch_size=8, shuffle=True))
    print(f"loss {model.history[0]:.4f} -> {model.history[-1]:.4f}")
    return model.history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
