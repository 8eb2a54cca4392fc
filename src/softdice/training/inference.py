"""model, images -> masks in the format and geometry of the images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from softdice.images.files import image_name, list_images, read_image, write_image
from softdice.training.cases import image_channels, normalise
from softdice.training.checkpoint import load_checkpoint
from softdice.training.config import TrainingError
from softdice.training.evaluate import label_image
from softdice.training.plan import NetworkPlan


def predict(
    checkpoint: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[Path]:
    """model.ckpt, image or folder of images -> paths of the masks written.

    A mask has the type, the shape and the geometry of its image (JPEG, which would change labels, gives PNG) and the
    label values of the training data. It does not depend on the other images of the folder.

    Args:
        checkpoint: what `softdice.training.train` wrote.
        images: an image, or a folder of them.
        out: folder for the masks, made where there is none; not the folder of the images.
        progress: called with the number of images done, their total and the name of the image just done.

    Raises:
        TrainingError, FileError: not a model of ours; no images; an image of another dimension or number of channels
            than the model was trained on; a file that cannot be read or written.
    """
    content = load_checkpoint(checkpoint)
    data = content["data"]
    images, out = Path(images), Path(out)
    paths = list(list_images(images).values()) if images.is_dir() else [images]
    if not paths or not images.exists():
        raise TrainingError(f"softdice predict: expected images in {images}, got none. Check the path.")
    if out.resolve() == paths[0].parent.resolve():
        raise TrainingError(
            f"softdice predict: expected OUT to be another folder than that of the images, got {out} for both. "
            "The masks would replace the images."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"softdice predict: expected to write to {out}, got: {error.strerror or error}. Choose another OUT."
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = NetworkPlan(**content["network"]).build()
    network.load_state_dict(content["weights"])
    network.to(device).eval()
    values = np.array(data["values"], object)  # as they are, above 2^63 too
    values = values.astype(_mask_type(values))
    written = []
    for number, path in enumerate(paths):
        image = read_image(path)
        channels = image_channels(image)
        if image.spatial_ndim != data["spatial_ndim"] or channels.shape[0] not in (1, data["channels"]):
            raise TrainingError(
                f"softdice predict: {path}: expected a {data['spatial_ndim']}-D image with {data['channels']} "
                f"channel(s), as in training, got a {image.spatial_ndim}-D one with {channels.shape[0]}. Convert it, "
                "or take another model."
            )
        scaled = normalise(np.broadcast_to(channels, (data["channels"], *image.shape)))
        labels = label_image(network, torch.from_numpy(scaled).to(device), data["patch"]).cpu().numpy()
        name = image_name(path)
        assert name is not None  # read_image has refused every other
        written.append(write_image(out / (name[0] + image.suffix), values[labels], image))
        progress(number + 1, len(paths), path.name)
    return written


def _mask_type(values: np.ndarray) -> type[np.generic]:
    """Smallest type that image formats share and that holds all values."""
    for dtype in (np.uint8, np.uint16, np.int16, np.int32, np.int64):
        limits = np.iinfo(dtype)
        if limits.min <= values.min() and values.max() <= limits.max:
            return dtype
    return np.uint64
