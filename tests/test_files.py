"""Files: what is written comes back, traps of each format, and damaged files end in a FileError."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
tifffile = pytest.importorskip("tifffile")
PIL_Image = pytest.importorskip("PIL.Image")

from softdice.images.files import (  # noqa: E402
    SUFFIXES,
    FileError,
    Image,
    list_images,
    read_image,
    split_name,
    write_image,
)
from softdice.images.formats import BY_SUFFIX  # noqa: E402

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -3], [0, 0, 3.0, 7], [0, 0, 0, 1]])


def save(path: Path, array: np.ndarray) -> Path:
    """A file of each type, written without the code under test."""
    name = split_name(path)
    assert name is not None
    if name[1] in (".nii", ".nii.gz"):
        nib.Nifti1Image(array, AFFINE).to_filename(path)
    elif name[1] == ".hdr":
        nib.Nifti1Pair(array, AFFINE).to_filename(path)
    elif name[1] in (".mgh", ".mgz"):
        nib.MGHImage(array, AFFINE).to_filename(path)
    elif name[1] in (".tif", ".tiff"):
        tifffile.imwrite(path, array, photometric="minisblack", compression="zlib")
    elif name[1] in (".nrrd", ".seg.nrrd", ".nhdr", ".mha", ".mhd", ".dcm"):
        picture = sitk.GetImageFromArray(array.T)
        picture.SetSpacing((2.0, 1.5, 3.0)[: array.ndim])
        picture.SetOrigin((10 / 3, 3.0, 7.0)[: array.ndim])
        picture.SetMetaData("0020|0032", "1\\2\\3")
        picture.SetMetaData("0020|0037", "1\\0\\0\\0\\1\\0")
        sitk.WriteImage(picture, str(path), useCompression=name[1] not in (".mhd", ".nhdr", ".dcm"))
    elif name[1] == ".npy":
        np.save(path, array)
    elif name[1] == ".npz":
        np.savez_compressed(path, array)
    else:
        PIL_Image.fromarray(array).save(path, **({"lossless": True} if name[1] == ".webp" else {}))
    return path


FLAT = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".jp2", ".dcm")
"""Suffixes of files that hold two axes."""


def example(suffix: str, seed: int = 0) -> np.ndarray:
    shape = (9, 11) if suffix in FLAT else (9, 11, 5)
    return np.random.default_rng(seed).integers(0, 5, shape, np.uint8)


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if not BY_SUFFIX[s].masks])
def test_what_is_written_comes_back(tmp_path: Path, suffix: str) -> None:
    array = example(suffix)
    image = read_image(save(tmp_path / f"a{suffix}", array))
    assert np.array_equal(image.array, array)
    assert image.array.dtype == array.dtype
    assert image.suffix == suffix
    assert image.spatial_ndim == array.ndim
    assert image.array.flags.writeable
    path = write_image(tmp_path / "out", array + 1, like=image)
    again = read_image(path)
    assert path.name == f"out{suffix}"
    assert np.array_equal(again.array, array + 1)
    assert again.spacing_mm == image.spacing_mm
    assert (image.affine is None) == (again.affine is None)
    if image.affine is not None and again.affine is not None:
        assert np.array_equal(image.affine, again.affine)
        assert image.spacing_mm == (2.0, 1.5, 3.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"a{suffix}", f"out{suffix}"])  # no temporary left


def test_jpeg_is_read_and_a_mask_of_it_becomes_png(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "photo.JPG", np.full((8, 6, 3), 100, np.uint8)))
    assert image.shape == (8, 6)
    assert image.array.shape == (8, 6, 3)
    path = write_image(tmp_path / "photo.jpg", np.ones((8, 6), bool), like=image)
    assert path.name == "photo.png"
    assert read_image(path).array.dtype == bool


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16, np.float32, np.float64, np.int64])
def test_nifti_types_and_byte_orders(tmp_path: Path, dtype: type) -> None:
    array = example(".nii").astype(dtype)
    for order in "<>":
        header = nib.Nifti1Header(endianness=order)
        header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
        nib.Nifti1Image(array, AFFINE, header, dtype=dtype).to_filename(tmp_path / "a.nii.gz")
        got = read_image(tmp_path / "a.nii.gz").array
        assert got.dtype == np.dtype(dtype)
        assert got.dtype.isnative
        assert np.array_equal(got, array)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([-(2**63), 1], np.int64),  # the absolute value of the lowest int64 is no int64
        ([-(2**31) - 1, 0], np.int64),
        ([0, 2**63], np.uint64),
        ([-(2**31), 2**31 - 1], np.int32),
        ([0, 7], np.int32),
    ],
)
def test_nifti_keeps_integers_of_64_bits_that_32_do_not_hold(tmp_path: Path, values: list[int], dtype: type) -> None:
    image = read_image(save(tmp_path / "a.nii", np.zeros((2, 1, 1), np.uint8)))
    array = np.array(values, np.uint64 if max(values) >= 2**63 else np.int64).reshape(2, 1, 1)
    again = read_image(write_image(tmp_path / "out", array, image)).array
    assert again.dtype == dtype
    assert again.ravel().tolist() == values


def test_nifti_scaling_version_2_and_four_axes(tmp_path: Path) -> None:
    image = nib.Nifti1Image(example(".nii"), AFFINE)
    image.header.set_slope_inter(2.0, -1.0)
    data = image.to_bytes()
    raw = np.frombuffer(data[352:], np.uint8).reshape((9, 11, 5), order="F")
    (tmp_path / "scaled.nii").write_bytes(data)
    assert np.array_equal(read_image(tmp_path / "scaled.nii").array, raw * 2.0 - 1.0)
    nib.Nifti2Image(example(".nii"), AFFINE).to_filename(tmp_path / "two.nii.gz")
    two = read_image(tmp_path / "two.nii.gz")
    assert np.array_equal(two.array, example(".nii"))
    assert np.array_equal(read_image(write_image(tmp_path / "two_out", two.array, two)).array, two.array)
    save(tmp_path / "thin.nii.gz", example(".nii")[..., None])
    assert read_image(tmp_path / "thin.nii.gz").array.shape == (9, 11, 5)
    save(tmp_path / "four.nii.gz", np.stack([example(".nii")] * 2, -1))
    four = read_image(tmp_path / "four.nii.gz")
    assert (four.shape, four.array.shape) == ((9, 11, 5), (9, 11, 5, 2))


def test_nifti_of_colours_is_refused(tmp_path: Path) -> None:
    colours = np.zeros((4, 4, 2), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.Nifti1Image(colours, AFFINE).to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(FileError, match="one number per voxel, got the NIfTI type RGB"):
        read_image(tmp_path / "a.nii.gz")


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2, 4 or 8 bits, made by hand."""
    rows = b""
    for row in values:
        flat = np.unpackbits(row[:, None].astype(np.uint8), axis=1)[:, -bits:].reshape(-1)
        rows += b"\0" + np.packbits(flat).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_png_keeps_the_numbers_in_the_file(tmp_path: Path, bits: int) -> None:
    values = np.arange(35).reshape(5, 7) % 2**bits
    (tmp_path / "a.png").write_bytes(grey_png(values, bits))
    assert np.array_equal(read_image(tmp_path / "a.png").array, values)
    assert read_image(tmp_path / "a.png").array.view(np.uint8).max() == values.max()  # no bool of 255


def test_palette_png_keeps_its_indices_and_sixteen_bits_their_values(tmp_path: Path) -> None:
    indices = example(".png")
    picture = PIL_Image.fromarray(indices, mode=None).convert("P")
    picture.putpalette([255 - i for i in range(256) for _ in range(3)])
    picture.putdata(indices.reshape(-1).tolist())
    picture.save(tmp_path / "p.png")
    assert np.array_equal(read_image(tmp_path / "p.png").array, indices)
    wide = indices.astype(np.uint16) * 10000
    image = read_image(save(tmp_path / "w.png", wide))
    assert image.array.dtype == np.uint16
    assert np.array_equal(image.array, wide)
    with pytest.raises(FileError, match="expected bool or unsigned integers for PNG, got float32"):
        write_image(tmp_path / "f", wide.astype(np.float32), image)
    with pytest.raises(FileError, match=r"expected values in 0..65535 for PNG, got -1"):
        write_image(tmp_path / "f", wide.astype(np.int64) - 1, image)
    assert np.array_equal(read_image(write_image(tmp_path / "f", wide.astype(np.int64), image)).array, wide)


def test_tiff_kinds(tmp_path: Path) -> None:
    colours = np.stack([example(".png")] * 3, -1)
    tifffile.imwrite(tmp_path / "colour.tif", colours, photometric="rgb", resolution=(20, 40))
    image = read_image(tmp_path / "colour.tif")
    assert image.shape == (9, 11)
    assert np.array_equal(image.array, colours)
    again = read_image(write_image(tmp_path / "grey.tif", colours[..., 0], image))
    assert again.header == image.header
    tifffile.imwrite(
        tmp_path / "channels.tif", np.zeros((2, 3, 8, 8), np.uint8), imagej=True, metadata={"axes": "ZCYX"}
    )
    with pytest.raises(FileError, match="got channels on the axes ZCYX"):
        read_image(tmp_path / "channels.tif")


def test_archives_hold_one_array_and_no_objects(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(FileError, match=r"expected one array in the archive, got 2: a.npy, b.npy"):
        read_image(tmp_path / "two.npz")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(FileError, match="Object arrays cannot be loaded"):
        read_image(tmp_path / "objects.npy")
    np.save(tmp_path / "complex.npy", np.zeros(3, complex))
    with pytest.raises(FileError, match="expected numbers, got voxels of type complex128"):
        read_image(tmp_path / "complex.npy")


def test_every_format_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text()
    for suffix in SUFFIXES:
        assert f"`{suffix}`" in text


def test_names_and_listing(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a_0000.PNG", "c.tar.gz", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert list(list_images(tmp_path)) == ["a_0000", "b"]
    assert list(list_images(tmp_path, nnunet=True)) == ["a", "b"]
    (tmp_path / "b.tif").touch()
    with pytest.raises(FileError, match=r"expected one file named 'b' in .*, got b.nii.gz and b.tif"):
        list_images(tmp_path)
    with pytest.raises(FileError, match="expected a folder"):
        list_images(tmp_path / "none")
    with pytest.raises(FileError, match="expected a file ending in"):
        read_image(tmp_path / "notes.txt")
    with pytest.raises(FileError, match="No such file"):
        read_image(tmp_path / "missing.png")


def test_label_names_from_the_header_extension(tmp_path: Path) -> None:
    image = nib.Nifti1Image(example(".nii"), AFFINE)
    table = (
        '<?xml version="1.0" encoding="UTF-8"?><CaretExtension><VolumeInformation Index="0"><LabelTable>'
        '<Label Key="1" Red="0.0"><![CDATA[spleen]]></Label><Label Key="2"><![CDATA[kidney & co]]></Label>'
        "</LabelTable></VolumeInformation></CaretExtension>"
    )
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, table.encode()))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"<Label broken"))
    image.to_filename(tmp_path / "a.nii.gz")
    assert read_image(tmp_path / "a.nii.gz").names == {1: "spleen", 2: "kidney & co"}
    assert read_image(save(tmp_path / "b.npy", example(".npy"))).names == {}


def test_writing_another_shape_is_refused(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.npy", example(".npy")))
    with pytest.raises(FileError, match=r"expected an array of shape \(9, 11, 5\), got \(9, 11\)"):
        write_image(tmp_path / "b.npy", np.zeros((9, 11)), image)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("qform_code", 128, "damaged header: qform_code 128 not valid"),
        ("sform_code", 512, "damaged header: sform_code 512 not valid"),
        ("magic", b"n;1", "magic"),
        ("srow_x", [1e30, 0, 0, 0], "damaged header: the affine"),
        ("srow_x", [np.nan, 0, 0, 0], "damaged header: the affine"),
    ],
)
def test_a_header_that_the_reader_would_repair_is_refused(
    tmp_path: Path, field: str, value: object, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(nib.Nifti1Image(example(".nii"), AFFINE).to_bytes()))
    header[field] = value
    data = nib.Nifti1Image(example(".nii"), AFFINE).to_bytes()
    (tmp_path / "a.nii").write_bytes(header.binaryblock + data[348:])
    with pytest.raises(FileError, match=message):
        read_image(tmp_path / "a.nii")
    assert capfd.readouterr() == ("", "")  # the library logs to the terminal


def test_headers_of_other_programs_are_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = nib.Nifti1Image(example(".nii"), AFFINE).to_bytes()
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(data))
    header["pixdim"][:4] = 0, -2, 1.5, 3
    (tmp_path / "a.nii").write_bytes(header.binaryblock + data[348:])
    assert np.array_equal(read_image(tmp_path / "a.nii").array, example(".nii"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs reads them all")
def test_a_compression_that_needs_another_package_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", example(".png"))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        file.pages[0].tags["Compression"].overwrite(34887)
    with pytest.raises(FileError, match=r"compressed by LERC\. Run: pip install imagecodecs"):
        read_image(tmp_path / "a.tif")


CHECKED = (".nii.gz", ".mgz", ".png", ".npz")
"""Formats with a checksum over the voxels: no damage at all may pass there."""


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if not BY_SUFFIX[s].store])
def test_damaged_files_end_in_a_file_error(tmp_path: Path, suffix: str) -> None:
    """Every truncation, and 200 flipped bits: a FileError of one line, or (where a format has no checksum) an image."""
    rng = random.Random(suffix)
    array = example(suffix)
    good = read_image(save(tmp_path / f"good{suffix}", array)).array
    data = (tmp_path / f"good{suffix}").read_bytes()
    path = tmp_path / f"bad{suffix}"

    def outcome(content: bytes) -> Image | None:
        path.write_bytes(content)
        try:
            return read_image(path)
        except FileError as error:
            messages.append(str(error))
            return None

    messages: list[str] = []
    for length in sorted({0, 1, 3, 4, 8, len(data) - 1, *(rng.randrange(len(data)) for _ in range(40))}):
        image = outcome(data[:length])
        # A JPEG without its last byte, a TIFF without trailing padding: all voxels are there.
        assert image is None or np.array_equal(image.array, good), length
    for _ in range(200):
        position = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 400))
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        image = outcome(bytes(damaged))
        assert image is None or suffix not in CHECKED or np.array_equal(image.array, good), position
    assert len(messages) > 40
    assert not any("\n" in message for message in messages)


def test_a_flipped_bit_inside_a_compressed_nifti_is_seen(tmp_path: Path) -> None:
    """The checksum at the end of the stream is verified, which reading only the promised bytes would not do."""
    data = bytearray(gzip.compress(nib.Nifti1Image(example(".nii"), AFFINE).to_bytes(), 0))
    data[-20] ^= 1  # level 0 stores the voxels as they are
    (tmp_path / "a.nii.gz").write_bytes(data)
    with pytest.raises(FileError, match="CRC check failed"):
        read_image(tmp_path / "a.nii.gz")
