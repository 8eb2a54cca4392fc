"""COCO: a JSON file of annotations, in which every image is a label map of its categories.

An image has the path of the file and then its number, as in `annotations.json/139`. Results, a JSON list of
annotations, hold neither the names nor the sizes of images. Annotations have COCO's own keys.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softdice.images.image import FileError, Format, Image

LOWEST_SCORE = 0.5
"""Files with lower scores are refused: they do not say which annotations are meant to count."""


class _Content(NamedTuple):
    """A file of COCO. Keys of sizes, stems and annotations are the ids of images as text.

    sizes: (height, width). stems: of the names of image files. categories: {id: name}. annotations: in their order.
    """

    sizes: dict[str, tuple[int, int]]
    stems: dict[str, str]
    categories: dict[int, str]
    annotations: dict[str, list[dict[str, Any]]]


@lru_cache(maxsize=2)
def _content(path: Path, changed_ns: int) -> _Content:
    """Return sizes, stems, categories and annotations of a file, which is read once for all of its images.

    `changed_ns`: modification time, a cache key. Raise FileError if a key of COCO is missing, or a stem occurs twice.
    """
    document = json.loads(path.read_text(encoding="utf-8-sig"))
    document = {"annotations": document} if isinstance(document, list) else document
    try:
        annotations: dict[str, list[dict[str, Any]]] = {}
        for each in document["annotations"]:
            annotations.setdefault(str(each["image_id"]), []).append(each)
        images = {str(each["id"]): each for each in document.get("images", ())}
        sizes = {number: (int(each["height"]), int(each["width"])) for number, each in images.items()}
        stems = {number: Path(each["file_name"]).stem for number, each in images.items()}
        categories = {int(each["id"]): str(each["name"]) for each in document.get("categories", ())}
    except (KeyError, TypeError) as error:
        raise FileError(f"{path}: expected annotations of COCO, got JSON where {error} is missing") from error
    if len({*stems.values()}) < len(stems):
        raise FileError(f"{path}: expected names of images that differ, got one twice. Rename the images")
    return _Content(sizes, stems, categories, annotations)


def list_entries(path: Path, beside: Path | None) -> dict[str, Path]:
    """Return {stem: path} of the images in a file; such a path is `path` / the id of the image.

    Results have no names: they take them from the file `beside`, or use the ids of the images if there is none.
    """
    content = _content(path, path.stat().st_mtime_ns)
    if content.stems:
        return {stem: path / number for number, stem in content.stems.items()}
    names = {} if beside is None else _content(beside, beside.stat().st_mtime_ns).stems
    return {names.get(number, number): path / number for number in content.annotations}


def _read(path: Path, coco: Any) -> Image:
    """Draw the annotations of an image, in their order, into a label map (H, W) of unsigned integers.

    `path` is the path of the file / the id of the image, `coco` the module pycocotools.mask. Raise FileError for a
    score below `LOWEST_SCORE`, an image of unknown size, and an annotation without segmentation or of another size.
    """
    content, number = _content(path.parent, path.parent.stat().st_mtime_ns), path.name
    annotations, size = content.annotations.get(number, []), content.sizes.get(number)
    lowest = min((each.get("score", 1.0) for each in annotations), default=1.0)
    if lowest < LOWEST_SCORE:
        raise FileError(f"expected annotations that all count, got scores down to {lowest:g}. Leave out the low ones")
    if size is None and annotations and isinstance(annotations[0].get("segmentation"), dict):
        size = tuple(annotations[0]["segmentation"]["size"])
    if size is None:
        raise FileError("expected the size of the image, got none. Add the list of images to the file")
    highest = max((each["category_id"] for each in annotations), default=1)
    label_map, overlapping = np.zeros(size, np.min_scalar_type(highest)), np.zeros(size, bool)
    for each in annotations:
        region, category = each.get("segmentation"), each["category_id"]
        if not region or category < 1:
            got = f"{region!r:.40} of category {category}"
            raise FileError(f"expected a segmentation and a category above 0, got {got}")
        if isinstance(region, list):  # polygons
            region = coco.merge(coco.frPyObjects(region, *size))
        elif isinstance(region["counts"], list):  # run lengths that are not compressed
            region = coco.frPyObjects(region, *size)
        if tuple(region["size"]) != tuple(size):
            raise FileError(f"damaged: a segmentation of size {region['size']} in an image of {[*size]}")
        mask = coco.decode(region) != 0
        overlapping |= mask & (label_map != 0) & (label_map != category)
        label_map[mask] = category
    count = int(overlapping.sum())
    reason = f"annotations of several categories that overlap in {count} pixels. Give one file per category."
    names = {k: content.categories[k] for k in np.unique(label_map).tolist() if k in content.categories}
    return Image(label_map, 2, names=names, no_labels=reason if count else "")


FORMATS = (Format((".json",), _read, None, ("pycocotools.mask", "coco"), masks=".png", entries=list_entries),)
