"""DICOM: series of slices through SimpleITK, segmentations (SEG) through highdicom.

`sitk` is the module SimpleITK, `segmentation` highdicom's object; names in capitals, such as PixelMeasuresSequence, are
attributes of the standard. `_read_dicom` is called as `Format.read`; its path is a file, or a folder of slices.
"""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import replace
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

_POSITION = "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"

_PARALLEL = 1e-3
"""Most by which the direction cosines of parallel slices differ."""

_EQUAL_STEPS = 0.01
"""Share of the longest distance between slices by which equal distances may differ."""

_EQUAL_SIZES = 1e-3
"""Millimetres by which equal sizes of a pixel may differ."""

_ROUNDED = 0.17
"""Millimetres by which rounding to one decimal may move two positions against each other within their plane."""


class _Header(NamedTuple):
    """The header of a DICOM file.

    kind: UID of its SOP class. series: UID of its series, "" if it has none. rows: height of the picture, 0 if it holds
    none. place: x, y, z of the first voxel in mm (LPS). axes: direction cosines of its rows and of its columns, 6
    numbers. sizes: of a pixel, 2 numbers in mm (one number in the file stands for both). place, axes and sizes are ()
    where the file does not say. white: whether 0 is white (MONOCHROME1): GDCM then inverts the numbers.
    """

    path: Path
    kind: str
    series: str
    rows: int
    frames: int
    place: tuple[float, ...]
    axes: tuple[float, ...]
    sizes: tuple[float, ...]
    white: bool


def _header(path: Path) -> _Header:
    """Read kind, series, size and place of the picture in a file, without its voxels.

    Raise FileError, or what pydicom raises, if it is not DICOM.
    """
    from pydicom import config, dcmread

    tags = ["SOPClassUID", "SeriesInstanceUID", "Rows", "NumberOfFrames", "PhotometricInterpretation", *_POSITION]
    with config.disable_value_validation(), warnings.catch_warnings():  # pydicom warns about tags that we do not use
        warnings.simplefilter("ignore")
        header = dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)  # the oldest have no preamble
        kind = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", ""))
        if not kind and "Rows" not in header:
            raise FileError("not a DICOM file, or cut off")
        place, axes, sizes = (tuple(float(n) for n in np.ravel(header.get(tag) or ())) for tag in _POSITION)
        return _Header(
            path, kind, str(header.get("SeriesInstanceUID", "")), int(header.get("Rows") or 0),
            int(header.get("NumberOfFrames") or 1), place, axes, (sizes * 2)[:2],
            header.get("PhotometricInterpretation") == "MONOCHROME1",
        )  # fmt: skip


def _headers(folder: Path, *, strict: bool) -> list[_Header]:
    """Read the headers of the DICOM files in a folder, in the order of their names, without hidden files.

    A file that says it is DICOM and cannot be read raises FileError if `strict`, else it is left out.
    """
    headers = []
    for path in sorted(folder.iterdir()):
        if is_dicom(path) or (path.suffix.lower() == ".dcm" and not path.name.startswith(".")):
            try:
                headers.append(_header(path))
            except Exception as error:  # readers trust what they read
                if strict:
                    raise FileError(f"{path.name}: {error or type(error).__name__}. Mend or remove it") from error
    return headers


@lru_cache(maxsize=4)
def _neighbours(folder: Path, changed_ns: int) -> list[_Header]:
    """Read the headers in a folder once for all of its files; `changed_ns` is its modification time, a cache key."""
    return _headers(folder, strict=False)


def is_one_series(folder: Path) -> bool:
    """Return whether a folder holds several slices of DICOM, all of one series, which may not make a volume."""
    package("softdice", "pydicom", "itk")
    headers = [header for header in _neighbours(folder, folder.stat().st_mtime_ns) if header.rows]
    if len(headers) < 2 or any(header.kind in _SEGMENTATIONS for header in headers):
        return False
    return headers[0].series != "" and len({header.series for header in headers}) == 1


def _read_dicom(path: Path, sitk: Any) -> Image:
    """Read a file, or a folder that holds the slices of one series or one segmentation.

    Raise FileError for no picture, several series, a file that is one slice of several, slices that make no volume, and
    a segmentation that highdicom does not read.
    """
    package("softdice", "pydicom", "itk")
    all_headers = _headers(path, strict=True) if path.is_dir() else [_header(path)]
    headers = [header for header in all_headers if header.rows]
    if not headers:
        raise FileError(f"expected DICOM with a picture, got {_without_picture(all_headers)}")
    segmentations = [header.path for header in headers if header.kind in _SEGMENTATIONS]
    if segmentations and len(headers) > 1:
        got = f"{segmentations[0].name} among {len(headers)} files"
        raise FileError(f"expected a DICOM segmentation in a folder of its own, got {got}")
    if segmentations:
        return _read_segmentation(segmentations[0])
    series = {header.series for header in headers}
    if len(series) != 1:
        advice = "Put each into a folder of its own"
        raise FileError(f"expected one DICOM series in the folder, got {len(series)}. {advice}")
    beside = [] if path.is_dir() else _neighbours(path.parent, path.parent.stat().st_mtime_ns)
    if any(other.series in series - {""} and other.rows and other.path.name != path.name for other in beside):
        raise FileError("one slice of a DICOM series. Give the folder that holds it, in a folder of cases")
    stack = _stacked(headers)
    files, sizes = [str(header.path) for header in stack], [header.sizes for header in stack if header.sizes]
    with quiet():
        picture = sitk.ReadImage(files if len(files) > 1 else files[0], imageIO="GDCMImageIO")
    if 0 < len(sizes) < len(files):  # GDCM asks the last slice alone, and takes 1 mm where that does not say
        picture.SetSpacing((sizes[0][1], sizes[0][0], picture.GetSpacing()[2]))
    advice = "Save the mask with 0 as black (MONOCHROME2)."
    inverted = any(header.white for header in headers)
    reason = f"DICOM that calls its smallest number white (MONOCHROME1). {advice}" if inverted else ""
    return replace(image_of(picture, sitk, PATIENT), no_labels=reason)


def _stacked(headers: list[_Header]) -> list[_Header]:
    """Return the headers of one series, sorted along the normal of its slices.

    Raise FileError if they make no volume: several frames in a file, no place, slices that are not parallel, not
    equidistant, of several sizes, or shifted against each other, which a volume with axes at right angles cannot show.
    """
    if max(header.frames for header in headers) > 1:
        raise FileError("expected a slice of DICOM, got several frames in a file. Convert it to NIfTI or NRRD")
    if not all(len(header.place) == 3 and len(header.axes) == 6 for header in headers):
        raise FileError("expected DICOM that says where it lies, got none, as of an X-ray. Convert it to PNG")
    if np.ptp([header.axes for header in headers], axis=0).max() > _PARALLEL:
        raise FileError("expected parallel slices, got several orientations. Put each into a folder of its own")
    sizes = [header.sizes for header in headers if header.sizes] or [(0.0, 0.0)]
    if len({header.rows for header in headers}) > 1 or np.ptp(sizes, axis=0).max() > _EQUAL_SIZES:
        raise FileError("expected slices of one size, got several. Put each into a folder of its own")
    if len(headers) == 1:
        return headers
    normal = np.cross(*np.reshape(headers[0].axes, (2, 3)))
    heights = [round(float(np.dot(header.place, normal)), 6) for header in headers]  # copies at exactly one
    steps = np.diff(np.sort(heights))
    if steps.max() == 0 or steps.max() > steps.min() + _EQUAL_STEPS * steps.max():
        got = f"distances of {steps.min():.4g} to {steps.max():.4g} mm"
        several = "Put each time, or each copy of a slice, into a folder of its own"
        advice = several if steps.min() <= _EQUAL_STEPS * steps.max() else "Is one missing?"
        raise FileError(f"expected slices at equal distances, got {got}. {advice}")
    ordered = [headers[i] for i in np.argsort(heights)]
    ways = np.subtract([header.place for header in ordered], ordered[0].place)
    shifts = np.linalg.norm(ways - np.outer(ways @ normal, normal), axis=1)
    if shifts.max() > max(_ROUNDED, _EQUAL_STEPS * np.ptp(heights)):
        got = "slices shifted against each other, as of a tilted gantry"
        raise FileError(f"expected slices straight above each other, got {got}. Straighten them, such as by dcm2niix")
    return ordered


def _others(folder: Path) -> list[str]:
    """Return the names of the files without a picture in the folder of a series, such as reports; no hidden files.

    Only one header of each class is read: objects of one class all hold a picture, or none does.
    """
    from pydicom.filereader import read_file_meta_info

    has_picture: dict[str, bool] = {}
    names = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not is_dicom(path):  # a .dcm without a preamble is DICOM, too, and is read with the series
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
    """Return what kind of DICOM files without a picture are, and what to do: the end of an error after "got "."""
    from pydicom.uid import UID

    if not headers:
        return "none"
    if any(each.kind == _CONTOURS for each in headers):
        advice = "Draw them on the grid of their image first, such as by plastimatch or dcmrtstruct2nii"
        return f"contours of structures (RTSTRUCT). {advice}"
    return f"{UID(headers[0].kind).name or 'an object of no class'}. Give the file of the mask"


def _read_segmentation(path: Path) -> Image:
    """Read binary segments as labels, fractional ones as probabilities, on the grid of the frames in the file.

    Raise FileError for what highdicom does not read, no places in a patient, or segments that overlap.
    """
    highdicom = package("softdice", "highdicom", "itk")
    from pydicom import config

    with config.disable_value_validation():  # many programs write names and dates that break the standard's rules
        try:
            segmentation = highdicom.seg.segread(str(path))
        except Exception as error:
            raise _not_read(error) from error
    with closing(segmentation._db_con):  # highdicom leaves it open
        array, affine = _volume(segmentation)
        segments = map(segmentation.get_segment_description, segmentation.segment_numbers)
        names = {int(segment.segment_number): str(segment.segment_label) for segment in segments}
    if np.linalg.det(affine[:3, :3]) < 0:  # reverse the slices, to run along their normal as those of a series do
        array, affine[:3, 3] = array[:, :, ::-1], affine[:3, 3] + affine[:3, 2] * (array.shape[2] - 1)
        affine[:3, 2] *= -1
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    header = spacing, affine[:3, 3].tolist(), (affine[:3, :3] / spacing).ravel().tolist()  # LPS, for `itk`'s writer
    place = Place("xyz", PATIENT, LPS_TO_RAS @ affine, partial=(2,))  # the file omits empty slices
    return Image(np.array(array, order="F"), 3, place, header, names=names)


def _not_read(error: Exception) -> FileError:
    """Return the error to raise for a segmentation, from the one that highdicom raised, with what to do."""
    reason = str(error).rstrip(".") or type(error).__name__
    if "overlap" in reason:
        return FileError(f"{reason}. Export one file per segment")
    advice = "If it is not cut off, rewrite it by dcmconv +te, or export it as NIfTI or NRRD"
    return FileError(f"a DICOM segmentation that highdicom does not read: {reason}. {advice}")


def _volume(segmentation: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels of a segmentation, and its affine (4, 4), from indices to left, back and head in mm.

    Voxels are labels (X, Y, Z) of integers, or probabilities in [0, 1], with a channel for each segment if several.
    Raise FileError for frames without places, a slide, padding that is not 0, overlapping segments, and slices of which
    some may be missing.
    """
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
    array, affine = np.moveaxis(volume.array, (0, 1), (2, 1)), volume.affine[:, [2, 1, 0, 3]]  # from z, y, x
    affine[:3, 2] *= _stretch(segmentation, groups[0], array.shape[2], float(np.linalg.norm(affine[:3, 2])))
    return array[..., 0] if array.ndim > 3 and array.shape[3] == 1 else array, affine


def _stretch(segmentation: Any, group: Any, slices: int, step_mm: float) -> float:
    """Return the factor that corrects `step_mm`, the distance between slices that highdicom assumes; 1 for most files.

    A single slice gets its thickness instead. Raise FileError if the file does not say SpacingBetweenSlices, and its
    slices are thinner than `step_mm`: empty ones may be missing between them.

    Args:
        segmentation: highdicom's object. group: functional groups of its first frame. slices: their number.
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
