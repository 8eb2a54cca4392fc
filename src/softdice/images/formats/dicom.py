"""DICOM: series of slices through SimpleITK, segmentations (SEG) through highdicom."""

from __future__ import annotations

import warnings
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softdice.images.formats.itk import LPS_TO_RAS, SITK, image_of, quiet
from softdice.images.image import DICOM, PATIENT, FileError, Format, Image, Place, is_dicom
from softdice.validation import package

_SEGMENTATIONS = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
"""SOP classes of segmentations: with layers, and with one label map."""

_CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"
"""SOP class of contours of structures of a radiotherapy (RTSTRUCT)."""


class _Header(NamedTuple):
    """The header of a DICOM file; `rows` is 0 if it holds no picture."""

    path: Path
    kind: str
    series: str
    rows: int
    frames: int
    place: tuple[float, ...]
    axes: tuple[float, ...]


def _header(path: Path) -> _Header:
    from pydicom import config, dcmread

    tags = ["SOPClassUID", "SeriesInstanceUID", "Rows", "NumberOfFrames", *_POSITION]
    with config.disable_value_validation(), warnings.catch_warnings():  # of tags that nobody asks for
        warnings.simplefilter("ignore")
        header = dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)  # the oldest have no preamble
        kind = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", ""))
        if not kind and "Rows" not in header:
            raise FileError("not a DICOM file, or cut off")
        place, axes = (tuple(float(n) for n in header.get(tag) or ()) for tag in _POSITION)
        return _Header(
            path, kind, str(header.get("SeriesInstanceUID", "")), int(header.get("Rows") or 0),
            int(header.get("NumberOfFrames") or 1), place, axes,
        )  # fmt: skip


_POSITION = "ImagePositionPatient", "ImageOrientationPatient"


def _headers(folder: Path, *, strict: bool) -> list[_Header]:
    """Read the headers of the files of DICOM in a folder, by the order of their names; hidden files are none.

    Raises:
        FileError: where it is strict, a file whose name says DICOM cannot be read.
    """
    listed = []
    for path in sorted(folder.iterdir()):
        if is_dicom(path) or (path.suffix.lower() == ".dcm" and not path.name.startswith(".")):
            try:
                listed.append(_header(path))
            except Exception as error:  # readers trust what they read
                if strict:
                    raise FileError(f"{path.name}: {error or type(error).__name__}. Mend or remove it") from error
    return listed


@lru_cache(maxsize=4)
def _neighbours(folder: Path, changed_ns: int) -> list[_Header]:
    """Read the headers in a folder once for all of its files; `changed_ns` is its time of change."""
    return _headers(folder, strict=False)


def _read_dicom(path: Path, sitk: Any) -> Image:
    """Read a file, or a folder that holds the slices of one series or one segmentation."""
    package("softdice", "pydicom", "itk")
    all_headers = _headers(path, strict=True) if path.is_dir() else [_header(path)]
    headers = [each for each in all_headers if each.rows]
    if not headers:
        raise FileError(f"expected DICOM with a picture, got {_without_picture(all_headers)}")
    segmentations = [each.path for each in headers if each.kind in _SEGMENTATIONS]
    if segmentations and len(headers) > 1:
        got = f"{segmentations[0].name} among {len(headers)} files"
        raise FileError(f"expected a DICOM segmentation in a folder of its own, got {got}")
    if segmentations:
        return _read_segmentation(segmentations[0])
    series = {each.series for each in headers}
    if len(series) != 1:
        advice = "Put each into a folder of its own"
        raise FileError(f"expected one DICOM series in the folder, got {len(series)}. {advice}")
    beside = [] if path.is_dir() else _neighbours(path.parent, path.parent.stat().st_mtime_ns)
    if any(each.series in series - {""} and each.rows and each.path.name != path.name for each in beside):
        raise FileError("one slice of a DICOM series. Give the folder that holds it, in a folder of cases")
    if max(each.frames for each in headers) > 1:
        raise FileError("expected a slice of DICOM, got several frames in a file. Convert it to NIfTI or NRRD")
    if not all(len(each.place) == 3 and len(each.axes) == 6 for each in headers):
        raise FileError("expected DICOM that says where it lies, got none, as of an X-ray. Convert it to PNG")
    if np.ptp([each.axes for each in headers], axis=0).max() > 1e-3:
        raise FileError("expected parallel slices, got several orientations. Put each into a folder of its own")
    if len(headers) > 1:
        normal = np.cross(*np.reshape(headers[0].axes, (2, 3)))
        along = [float(np.dot(each.place, normal)) for each in headers]
        headers, steps = [headers[i] for i in np.argsort(along)], np.diff(np.sort(along))
        if steps.max() > steps.min() + 0.01 * steps.max():
            got = f"distances of {steps.min():.4g} to {steps.max():.4g} mm"
            raise FileError(f"expected slices at equal distances, got {got}. Is one missing?")
    files = [str(each.path) for each in headers]
    with quiet():
        picture = sitk.ReadImage(files if len(files) > 1 else files[0], imageIO="GDCMImageIO")
    return image_of(picture, sitk, PATIENT)


def _others(folder: Path) -> list[str]:
    """Return the names of the files in the folder of a series that hold no picture, such as reports; hidden ones aside.

    Only one header of each class is read: objects of one class all hold a picture, or none does.
    """
    from pydicom.filereader import read_file_meta_info

    has_picture: dict[str, bool] = {}
    names = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not is_dicom(path):  # one of DICOM without a preamble has that suffix, and is read with the series
            names += [path.name] * (path.suffix.lower() != ".dcm")
            continue
        try:
            kind = str(read_file_meta_info(path).get("MediaStorageSOPClassUID", ""))
            if kind not in has_picture:
                has_picture[kind] = _header(path).rows > 0
        except Exception:  # noqa: BLE001 - a damaged file is an error of its case, which says so
            continue
        names += [path.name] * (not has_picture[kind])
    return names


def _without_picture(headers: list[_Header]) -> str:
    """Return what DICOM without a picture is, and what to do."""
    from pydicom.uid import UID

    if not headers:
        return "none"
    if any(each.kind == _CONTOURS for each in headers):
        advice = "Draw them on the grid of their image first, such as by plastimatch or dcmrtstruct2nii"
        return f"contours of structures (RTSTRUCT). {advice}"
    return f"{UID(headers[0].kind).name or 'an object of no class'}. Give the file of the mask"


def _read_segmentation(path: Path) -> Image:
    """Read binary segments as labels, fractional ones as probabilities, on the grid of the frames in the file."""
    highdicom = package("softdice", "highdicom", "itk")
    from pydicom import config

    with config.disable_value_validation():  # of names and dates, which many programs write by rules of their own
        try:
            segmentation = highdicom.seg.segread(str(path))
        except Exception as error:
            raise _not_read(error) from error
    with closing(segmentation._db_con):  # highdicom leaves it open
        array, affine = _volume(segmentation)
        names = {
            int(each.segment_number): str(each.segment_label)
            for each in map(segmentation.get_segment_description, segmentation.segment_numbers)
        }
    if np.linalg.det(affine[:3, :3]) < 0:  # series run along the normal of their slices
        array, affine[:3, 3] = array[:, :, ::-1], affine[:3, 3] + affine[:3, 2] * (array.shape[2] - 1)
        affine[:3, 2] *= -1
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    header = spacing, affine[:3, 3].tolist(), (affine[:3, :3] / spacing).ravel().tolist()
    place = Place("xyz", PATIENT, LPS_TO_RAS @ affine, partial=(2,))
    return Image(np.array(array, order="F"), 3, place, header, names=names)


def _not_read(error: Exception) -> FileError:
    """Return the error of a segmentation at which highdicom gave up, with what to do."""
    reason = str(error).rstrip(".") or type(error).__name__
    if "overlap" in reason:
        return FileError(f"{reason}. Export one file per segment")
    advice = "If it is not cut off, rewrite it by dcmconv +te, or export it as NIfTI or NRRD"
    return FileError(f"a DICOM segmentation that highdicom does not read: {reason}. {advice}")


def _volume(segmentation: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, or probabilities, (x, y, z) or with a channel for each segment, and where they lie (LPS)."""
    groups = segmentation.get("PerFrameFunctionalGroupsSequence", ())
    if len(groups) != segmentation.get("NumberOfFrames", 1):
        got = f"{segmentation.get('NumberOfFrames', 1)} frames and the places of {len(groups)}"
        raise FileError(f"damaged: expected a place for each frame, got {got}")
    if segmentation.coordinate_system is None or segmentation.coordinate_system.value != "PATIENT":
        raise FileError("expected a DICOM segmentation that lies in a patient, got one of a slide or of no place")
    if segmentation.get("PixelPaddingValue", 0):
        raise FileError(f"expected 0 where no segment is, got the padding {segmentation.PixelPaddingValue}")
    fractional = segmentation.segmentation_type.value == "FRACTIONAL"
    try:
        volume = segmentation.get_volume(combine_segments=not fractional)
    except Exception as error:
        raise _not_read(error) from error
    array, affine = np.moveaxis(volume.array, (0, 1), (2, 1)), volume.affine[:, [2, 1, 0, 3]]
    affine[:3, 2] *= _stretch(segmentation, groups[0], array.shape[2], float(np.linalg.norm(affine[:3, 2])))
    return array[..., 0] if array.ndim > 3 and array.shape[3] == 1 else array, affine


def _stretch(segmentation: Any, group: Any, slices: int, step_mm: float) -> float:
    """Return the factor from the distance of slices that highdicom takes to that of the file.

    Raises:
        FileError: the file names none, and its slices are thinner than they are apart: some may be left out between.
    """
    shared = segmentation.get("SharedFunctionalGroupsSequence") or [{}]
    measures = [each for part in (group, shared[0]) for each in part.get("PixelMeasuresSequence", ())]
    thickness = next((float(each.SliceThickness) for each in measures if each.get("SliceThickness")), 0.0)
    if any(each.get("SpacingBetweenSlices") for each in measures) or not thickness:
        return 1.0
    if slices == 1:
        return thickness / step_mm
    if step_mm > 1.01 * thickness:
        got = f"none, and slices {step_mm:.4g} mm apart that are {thickness:.4g} mm thick"
        advice = "Are slices that hold nothing left out between? Export it as NIfTI or NRRD, or write that attribute"
        raise FileError(f"expected SpacingBetweenSlices, got {got}. {advice}")
    return 1.0


FORMATS = (Format((".dcm",), _read_dicom, None, SITK, masks=".nrrd", magic=(DICOM,), folder=_others),)
