"""Which files of a folder belong together, and a hint where they are laid out in another known way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from softdice.evaluation.labels import ScoreError, parse_labels
from softdice.images.files import FileError, left_out, list_images
from softdice.training.channels import Files, channel_files
from softdice.training.config import TrainingError, listed, refusal, unread

OURS, NNUNET = ("images", "labels"), ("imagesTr", "labelsTr")
WANTED = "DATA holds images/ and labels/ with equal names, or nnU-Net's imagesTr/ and labelsTr/."


@dataclass(frozen=True)
class Layout:
    """Cases of a folder, by name.

    Attributes:
        images: name of a case -> files of its image. labels: name -> label file.
        label_names: label value -> name, as far as dataset.json says.
        ignore: the label value that dataset.json calls "ignore", or None.
        by_channel: whether images are kept in one file per channel.
        left_out: lines that name what else the folders hold.
    """

    images: dict[str, Files]
    labels: dict[str, Path]
    label_names: dict[int, str]
    ignore: int | None
    by_channel: bool
    left_out: list[str]


def find_layout(folder: Path) -> Layout:
    """Return the cases of a folder with images/ and labels/, or with imagesTr/ and labelsTr/, names sorted.

    Raises:
        TrainingError, FileError: a folder is missing or empty, there are fewer than two cases, a name has no partner,
            or dataset.json has another form than nnU-Net's.
    """
    parts = next((parts for parts in (OURS, NNUNET) if all((folder / part).is_dir() for part in parts)), None)
    if parts is None:
        missing = next((p for p in (folder, folder / OURS[0], folder / OURS[1]) if not p.is_dir()), folder)
        if not (folder / OURS[0]).is_dir() and (folder / NNUNET[0]).is_dir():
            missing = folder / NNUNET[1]
        raise refusal(f"a folder {missing}", "none", _hint(folder))
    folders = folder / parts[0], folder / parts[1]
    files, labels = map(list_images, folders)
    images = channel_files(files, labels)
    _check_names(folders, images, labels)
    names, ignore = _declared(folder / "dataset.json") if parts == NNUNET else ({}, None)
    by_channel = any(name not in files for name in images)
    others = [left_out(part, paths.values()) for part, paths in zip(folders, (files, labels), strict=True)]
    return Layout(dict(sorted(images.items())), labels, names, ignore, by_channel, [*filter(None, others)])


def check_out(out: Path, folder: Path) -> None:
    """Raise TrainingError if `out`, where a run writes pictures, is a folder of images or labels in `folder`."""
    if out.resolve() in [(folder / part).resolve() for part in (*OURS, *NNUNET)]:
        raise refusal("--out to be another folder than those of the images and labels", out, "Choose another --out.")


def _declared(path: Path) -> tuple[dict[int, str], int | None]:
    """Return {label value: name} from nnU-Net's dataset.json at `path`, and the value to ignore, or None.

    A region of a single value names that value. Return ({}, None) if there is no file. Raise TrainingError if
    `parse_labels`, by which the scorer reads it too, refuses it.
    """
    if not path.exists():
        return {}, None
    try:
        declared = parse_labels(str(path))
    except ScoreError as error:
        advice = "Mend the file, or take it away: labels then have no names."
        raise TrainingError(f"softdice train: {error} {advice}") from error
    return declared.names, declared.ignore[0] if declared.ignore else None


def _check_names(folders: tuple[Path, Path], images: Collection[str], labels: Collection[str]) -> None:
    """Raise TrainingError unless the names of images and of labels are the same, at least two.

    `folders`: of images and of labels, for messages. The advice names a suffix such as "_mask" that one side adds.
    """
    unpaired = set(images) - set(labels), set(labels) - set(images)
    for alone, here, there in zip(unpaired, folders, folders[::-1], strict=True):
        if alone and images and labels:
            ending, longer = _ending(*unpaired), folders[1]
            if not ending:  # the images may have the suffix
                ending, longer = _ending(*unpaired[::-1]), folders[0]
            advice = f" Those in {longer} end in {ending!r}: rename them without it." if ending else ""
            others = listed(sorted(unpaired[here == folders[0]]), 3)
            got = f"none for {len(alone)}: {listed(sorted(alone), 5)}" + f" (alone there: {others})" * bool(others)
            expected = f"a partner in {there} for each file in {here}"
            raise refusal(expected, got, f"Names must be equal up to the suffix.{advice}")
    for part, names in zip(folders, (images, labels), strict=True):
        if not names:
            raise refusal(f"images in {part}", "none", unread(part))
    if len(images) < 2:
        expected = f"at least 2 pairs in {folders[0].parent}, one of them to hold out"
        raise refusal(expected, len(images), "Add images.")


def _hint(folder: Path) -> str:
    """Return advice for a `folder` that is missing or has neither the parts of `OURS` nor of `NNUNET`.

    It names what the user may have meant: a folder in it or around it, labels under another name, or both in one.
    """
    if not folder.is_dir():
        return WANTED
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside.sort(key=lambda path: not path.name.lower().startswith("train"))  # rather than a folder of tests
    for parts in (OURS, NNUNET):
        for path in inside:
            if all((path / part).is_dir() for part in parts):
                return f"{path} has {parts[0]}/ and {parts[1]}/: give that folder as DATA."
    if folder.resolve().name in (*OURS, *NNUNET) and not inside:
        return f"Give the folder around it, {folder.resolve().parent}, as DATA."
    for path in inside:
        if (path / OURS[0]).is_dir():
            return _hint(path)
    others = [path for path in inside if path.name != OURS[0]]
    if folder / OURS[0] in inside and len(others) == 1:
        return f"If {others[0]} holds the labels, rename it to labels."
    try:
        stems = list_images(folder)
    except FileError:  # two files of one name, one of them an image perhaps, the other its label
        stems = {}
    if ending := _ending(stems, stems):
        longer = next(path for stem, path in stems.items() if stem.endswith(ending) and stem != ending)
        plain = longer.name.replace(ending, "", 1) if longer.name.count(ending) == 1 else "the name of its image"
        return (
            f"{folder} holds images and labels together: move the images to {folder / OURS[0]}, and the labels, which "
            f"end in {ending!r}, to {folder / OURS[1]} without that end, {longer.name} as {plain}."
        )
    return f"{WANTED} There are {', '.join(path.name for path in inside[:5])}." if inside else WANTED


def _ending(images: Collection[str], labels: Iterable[str]) -> str:
    """Return the suffix, such as "_mask", that at least a third of the labels add to the name of an image, else "".

    Example:
        >>> _ending(["1", "10"], ["1_mask", "10_mask"])
        '_mask'
    """
    labels = list(labels)
    endings = Counter(
        next((label[size:] for size in range(len(label) - 1, 0, -1) if label[:size] in images), "") for label in labels
    )
    # an end without a letter is no suffix: "10" is another case than "1"
    likely = [(count, ending) for ending, count in endings.items() if any(sign.isalpha() for sign in ending)]
    count, ending = max(likely, default=(0, ""))
    return ending if 3 * count >= len(labels) else ""
