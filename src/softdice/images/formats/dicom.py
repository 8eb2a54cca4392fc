"""DICOM: series of slices through SimpleITK, segmentations (SEG) through highdicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from softdice.images.formats.itk import LPS_TO_RAS, SITK, image_of, quiet
from softdice.images.image import FileError, Format, Image
from softdice.validation import package

_SEGMENTATION = b"1.2.840.10008.5.1.4.1.1.66.4", b"1.2.840.10008.5.1.4.1.1.66.7"
"""Classes of objects that are segmentations: layers, and one map of labels. The class stands in the first bytes."""


def _read_dicom(path: Path, sitk: Any) -> Image:
    """A file, or a folder that holds the slices of one series or one segmentation."""
    inside = [each for each in path.iterdir() if each.suffix.lower() == ".dcm"] if path.is_dir() else [path]
    segmentations = [each for each in inside if _is_segmentation(each)]
    if segmentations and len(inside) > 1:
        got = f"{segmentations[0].name} among {len(inside)} files"
        raise FileError(f"expected a DICOM segmentation in a folder of its own, got {got}")
    if segmentations:
        return _read_segmentation(segmentations[0])
    with quiet():
        files = _series(path, sitk) if path.is_dir() else [str(path)]
        headers = [_dicom_header(file, sitk) for file in files]
        other = None if path.is_dir() else next((each for each in path.parent.glob("*.dcm") if each != path), None)
        if other is not None and headers[0].get(_UID, "") == _dicom_header(str(other), sitk).get(_UID):
            raise FileError("one slice of a DICOM series. Give the folder that holds it, in a folder of cases")
        if headers[0].get("0028|0008", "1") not in ("", "0", "1"):
            raise FileError("expected a slice of DICOM, got several frames in a file. Convert it to NIfTI or NRRD")
        if not all(header.get(_PLACE) and header.get(_AXES) for header in headers):
            raise FileError("expected DICOM that says where it lies, got none, as of an X-ray. Convert it to PNG")
        if len(files) > 1:
            normal = np.cross(*np.reshape(_numbers(headers[0][_AXES]), (2, 3)))
            along = [float(_numbers(header[_PLACE]) @ normal) for header in headers]
            files, steps = [files[i] for i in np.argsort(along)], np.diff(np.sort(along))
            if steps.max() > steps.min() + 0.01 * steps.max():
                got = f"distances of {steps.min():.4g} to {steps.max():.4g} mm"
                raise FileError(f"expected slices at equal distances, got {got}. Is one missing?")
        picture = sitk.ReadImage(files if len(files) > 1 else files[0], imageIO="GDCMImageIO")
    return image_of(picture, sitk, placed=True)


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split("\\"), float)


_UID, _PLACE, _AXES = "0020|000e", "0020|0032", "0020|0037"
"""Tags of DICOM: which series a file belongs to, where it lies, and where its rows and columns point."""


def _series(folder: Path, sitk: Any) -> list[str]:
    """The slices of the one series in a folder."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise FileError(
            f"expected one DICOM series in the folder, got {len(series)}. Put each into a folder of its own"
        )
    return list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0]))


def _dicom_header(file: str, sitk: Any) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}


def _is_segmentation(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(1024)
    return any(kind in head for kind in _SEGMENTATION)


def _read_segmentation(path: Path) -> Image:
    """Binary segments as labels, fractional ones as probabilities, on the grid of the frames that are in the file."""
    highdicom = package("softdice", "highdicom", "itk")
    from pydicom import config

    with config.disable_value_validation():  # of names and dates, which many programs write by rules of their own
        found = highdicom.seg.segread(str(path))
    if found.coordinate_system is None or found.coordinate_system.value != "PATIENT":
        raise FileError("expected a DICOM segmentation that lies in a patient, got one of a slide or of no place")
    if found.get("PixelPaddingValue", 0):
        raise FileError(f"expected 0 where no segment is, got the padding {found.PixelPaddingValue}")
    fractional = found.segmentation_type.value == "FRACTIONAL"
    try:
        volume = found.get_volume(combine_segments=not fractional)
    except RuntimeError as error:
        advice = ". Export one file per segment" if "overlap" in str(error) else ""
        raise FileError(f"{str(error).rstrip('.')}{advice}") from error
    array, affine = np.moveaxis(volume.array, (0, 1), (2, 1)), volume.affine[:, [2, 1, 0, 3]]
    if array.ndim > 3 and array.shape[3] == 1:
        array = array[..., 0]
    if np.linalg.det(affine[:3, :3]) < 0:  # series run along the normal of their slices
        array, affine[:3, 3] = array[:, :, ::-1], affine[:3, 3] + affine[:3, 2] * (array.shape[2] - 1)
        affine[:3, 2] *= -1
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    header = spacing, affine[:3, 3].tolist(), (affine[:3, :3] / spacing).ravel().tolist()
    names = {
        int(each.segment_number): str(each.segment_label)
        for each in map(found.get_segment_description, found.segment_numbers)
    }
    return Image(np.array(array, order="F"), 3, LPS_TO_RAS @ affine, spacing, header, names=names, partial=True)


FORMATS = (Format((".dcm",), _read_dicom, None, SITK, masks=".nrrd", magic=((128, b"DICM"),), folder=True),)
