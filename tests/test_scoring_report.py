"""The report of softdice score: pictures as a reader of scans knows them, plots, and how the page was made."""

from __future__ import annotations

import base64
import io
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
nib = pytest.importorskip("nibabel")
PIL_Image = pytest.importorskip("PIL.Image")

from commands import score  # noqa: E402

from softdice.evaluation.colours import EXTRA, MISSED, RIGHT  # noqa: E402
from softdice.scoring import Options  # noqa: E402
from softdice.scoring.error_pictures import PIXELS, Picture, picture  # noqa: E402
from softdice.scoring.plots import box_plots  # noqa: E402


def pixels(drawn: Picture) -> np.ndarray:
    return np.asarray(PIL_Image.open(io.BytesIO(base64.b64decode(drawn.png))))


def places(drawn: Picture, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a colour is, as shares of height and width, (pixels, 2)."""
    array = pixels(drawn)
    return np.argwhere((array == colour).all(-1)) / array.shape[:2]


def volume(folder: Path, name: str, array: np.ndarray, affine: np.ndarray, orientation: str = "RAS") -> Path:
    """NIfTI of an array in RAS order, stored in another."""
    image = nib.Nifti1Image(array, affine)
    start, end = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    folder.mkdir(exist_ok=True)
    image.as_reoriented(nib.orientations.ornt_transform(start, end)).to_filename(folder / name)
    return folder / name


SPACING = np.diag([1.5, 2.0, 4.0, 1.0])


def body(missed: tuple[slice, slice, slice]) -> tuple[np.ndarray, np.ndarray]:
    """A box in which the prediction misses a part: (prediction, truth) in RAS order."""
    t = np.zeros((20, 24, 14), np.uint8)
    t[4:16, 4:20, 3:11] = 1
    p = t.copy()
    p[missed] = 0
    return p, t


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LAS", "PIR", "ASL", "SRP"])
@pytest.mark.parametrize("view", ["radiological", "neurological"])
def test_a_picture_does_not_depend_on_how_the_volume_is_stored(orientation: str, view: str, tmp_path: Path) -> None:
    """The right front of the patient is missed, in one axial slice most of all."""
    p, t = body((slice(10, 16), slice(14, 20), slice(6, 7)))
    files = [volume(tmp_path, f"{s}.nii.gz", a, SPACING, orientation) for s, a in (("p", p), ("t", t))]
    drawn = picture(*files, 1, Options(), view=view)
    assert drawn.sides == (("R", "L") if view == "radiological" else ("L", "R"))
    stored = nib.load(files[1])
    axis = nib.aff2axcodes(stored.affine).index("S" if "S" in orientation else "I")
    assert drawn.place == f", axial slice {6 if 'S' in orientation else 13 - 6}"
    assert stored.shape[axis] == 14
    rows, columns = places(drawn, MISSED).T
    assert rows.max() < 0.42  # the front is up
    assert (columns.max() < 0.5) if view == "radiological" else (columns.min() > 0.4)
    straight = [volume(tmp_path / "ras", f"{s}.nii.gz", a, SPACING) for s, a in (("p", p), ("t", t))]
    assert drawn.png == picture(*straight, 1, Options(), view=view).png


@pytest.mark.parametrize(
    "missed, plane, sides, up",
    [
        ((slice(4, 16), slice(9, 10), slice(8, 11)), "coronal slice 9", ("R", "L"), True),
        ((slice(7, 8), slice(4, 20), slice(8, 11)), "sagittal slice 7", ("A", "P"), True),
        ((slice(4, 16), slice(4, 20), slice(4, 5)), "axial slice 4", ("R", "L"), False),
    ],
)
def test_the_plane_with_the_largest_error(
    missed: tuple[slice, slice, slice], plane: str, sides: tuple[str, str], up: bool, tmp_path: Path
) -> None:
    p, t = body(missed)
    drawn = picture(*(volume(tmp_path, f"{s}.nii", a, SPACING) for s, a in (("p", p), ("t", t))), 1, Options())
    assert (drawn.place, drawn.sides) == (f", {plane}", sides)
    if up:
        assert places(drawn, MISSED)[:, 0].max() < places(drawn, RIGHT)[:, 0].min()  # the head is up


def test_an_image_with_a_palette_is_drawn_in_its_colours(tmp_path: Path) -> None:
    from PIL import Image

    indices = np.random.default_rng(0).integers(0, 3, (20, 24)).astype(np.uint8)
    palette = np.array([[200] * 3, [0] * 3, [90] * 3], np.uint8)  # another order than that of the indices
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.ravel().tolist())
    image.save(tmp_path / "palette.png")
    Image.fromarray(palette[indices, 0]).save(tmp_path / "grey.png")
    t = np.zeros((20, 24), np.uint8)
    t[5:9, 5:9] = 1
    for side in "pt":
        np.save(tmp_path / f"{side}.npy", t)
    files = tmp_path / "p.npy", tmp_path / "t.npy"
    drawn = [picture(*files, 1, Options(), under=tmp_path / name) for name in ("palette.png", "grey.png")]
    assert drawn[0].png == drawn[1].png


@pytest.mark.parametrize("unit, words", [(1.0, "20 mm"), (1e3, "20 m"), (1e6, "20 km")])
def test_a_scale_bar_has_a_unit_that_fits(unit: float, words: str, tmp_path: Path) -> None:
    t = np.zeros((90, 90), np.uint8)
    t[20:70, 10:60] = 1
    for side in "pt":
        volume(tmp_path, f"{side}.nii", t if side == "t" else t * 0, np.diag([unit, unit, 1.0, 1.0]))
    assert score(tmp_path / "p.nii", tmp_path / "t.nii", "--report", tmp_path / "r.html").exit_code == 0
    assert f">{words}</i>" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("spacing", [(5, 0.7, 0.7), (0.7, 0.7, 5), (1, 3, 1)])
def test_lengths_are_true(spacing: tuple[float, float, float], tmp_path: Path) -> None:
    t = np.zeros((12, 40, 30), np.uint8)
    t[3:9, 10:30, 8:22] = 1
    files = [volume(tmp_path, f"{s}.nii", a, np.diag([*spacing, 1.0])) for s, a in (("p", t * 0), ("t", t))]
    drawn = picture(*files, 1, Options())
    size = np.array(pixels(drawn).shape[:2])
    extents = np.array(t.shape) * spacing
    plane = drawn.place.split()[1]
    wanted = extents[list({"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}[plane])]
    assert size == pytest.approx(PIXELS * wanted / wanted.max(), abs=0.51)
    assert drawn.bar is not None
    share, length_mm = drawn.bar
    assert share * wanted[1] == pytest.approx(length_mm)
    assert length_mm in (2, 5, 10, 20, 50)
    assert share <= 1 / 3


@pytest.mark.parametrize("spacing, length_mm", [((0.5, 0.5), 10), ((0.5, 2.0), 50), ((0.01, 0.01), None)])
def test_a_picture_of_two_dimensions_has_the_lengths_of_its_pixels(
    spacing: tuple[float, float], length_mm: int | None, tmp_path: Path
) -> None:
    t = np.zeros((100, 80), np.uint8)
    t[20:70, 10:60] = 1
    files = [volume(tmp_path, f"{s}.nii", a, np.diag([*spacing, 1.0, 1.0])) for s, a in (("p", t * 0), ("t", t))]
    drawn = picture(*files, 1, Options())
    extents = np.array(t.shape) * spacing
    assert pixels(drawn).shape[:2] == pytest.approx(PIXELS * extents / extents.max(), abs=0.51)
    assert drawn.sides == ("", "")
    assert drawn.bar == (None if length_mm is None else (pytest.approx(length_mm / extents[1]), length_mm))


def test_what_does_not_say_how_it_lies_is_drawn_as_stored(tmp_path: Path) -> None:
    p, t = body((slice(12, 13), slice(4, 20), slice(3, 11)))
    paths = tmp_path / "p.npy", tmp_path / "t.npy"
    for path, array in zip(paths, (p, t), strict=True):
        np.save(path, array)
    drawn = picture(*paths, 1, Options())
    assert (drawn.place, drawn.sides, drawn.bar) == (", slice 12", ("", ""), None)
    silent = tmp_path / "t.nii"
    nib.Nifti1Image(t, None).to_filename(silent)
    assert picture(silent, silent, 1, Options()).sides == ("", "")
    for path, array in zip(paths, (p[12], t[12]), strict=True):
        np.save(path, array)
    assert picture(*paths, 1, Options()).png == drawn.png
    oblong = picture(*paths, 1, Options())
    assert pixels(oblong).shape[:2] == (PIXELS, round(PIXELS * 14 / 24))


def test_an_image_under_the_masks(tmp_path: Path) -> None:
    p, t = body((slice(12, 16), slice(4, 20), slice(6, 7)))
    p[2, 2, 6] = 1
    files = [volume(tmp_path, f"{s}.nii", a, SPACING, "LPS") for s, a in (("p", p), ("t", t))]
    ramp = np.linspace(-800, 1200, t.size).reshape(t.shape).astype(np.float32)
    image = volume(tmp_path, "i.nii", ramp, SPACING, "LPS")
    plain, drawn = picture(*files, 1, Options()), picture(*files, 1, Options(), under=image)
    assert len(places(plain, EXTRA)) > 0
    assert len(places(drawn, EXTRA)) == 0  # they shine through
    background = (pixels(plain) == 16).all(-1)
    assert len(np.unique(pixels(drawn)[background])) > 10
    np.save(tmp_path / "o.npy", ramp[1:])  # it does not say where it lies
    with pytest.raises(ValueError, match="expected an image of shape"):
        picture(*files, 1, Options(), under=tmp_path / "o.npy")


def test_box_plots_fit_their_values() -> None:
    values = np.array([[0.9, 0.95, np.nan], [0.92, 0.85, np.nan], [0.94, 0.9, np.nan], [0.93, 0.0, np.nan]])
    values = np.concatenate([values, np.full((8, 3), [0.93, 0.9, np.nan])])
    html = box_plots(["a", "b<", "c"], values, "Dice")
    ticks = re.findall(r"text-anchor='\w+'>([\d.+-]+)</text>", html)
    assert ticks == ["0.8", "0.85", "0.9", "0.95", "1"]
    assert "b&lt; <em>1 × 0</em>" in html
    assert "◂ 1" in html
    assert "in no case" in html
    (median, *_) = re.findall(r"class='median' x1='([\d.]+)%'", html)
    assert float(median) == pytest.approx(100 * (0.93 - 0.8) / 0.2, abs=0.01)
    many = box_plots([f"class {k}" for k in range(20)], np.linspace(1, 0.5, 20)[None].repeat(3, 0), "Dice")
    assert [int(k) for k in re.findall(r"<span>class (\d+)", many)] == list(range(19, -1, -1))
    signed = box_plots(["x"], np.array([[-0.03], [0.01], [0.02]]), "difference", signed=True)
    assert re.findall(r"text-anchor='\w+'>([\d.+-]+)</text>", signed) == ["-0.04", "-0.02", "+0", "+0.02", "+0.04"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    for case in range(4):
        t = np.zeros((10, 12, 6), np.uint8)
        t[2:7, 2:9, 1:5], t[7:9, 3:9, 2:4] = 1, 2
        p = np.where(rng.random(t.shape) < 0.05 * case, 0, t).astype(np.uint8)
        p[p == 2] = 0 if case == 3 else 2
        for side, array in (("deep/run 7", p), ("labels", t)):
            (tmp_path / side).parent.mkdir(exist_ok=True)
            volume(tmp_path / side, f"case {case}.nii.gz", array, SPACING)
    return tmp_path / "deep/run 7", tmp_path / "labels"


def test_the_page_says_how_it_was_made(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders[0] / "case 2.nii.gz").unlink()
    options = ("--labels", "a=1,b=2", "--empty", "1", "--format", "json")
    monkeypatch.setattr("sys.argv", ["softdice", "score", "a b", *options])
    score(*folders, *options, "--report", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>run 7 against labels</h1>" in page
    assert not [head for head in re.findall(r"<h[123]>(.*?)</h[123]>", page) if str(tmp_path) in head]
    facts = {k: unescape(v) for k, v in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)}
    assert facts["predictions"] == str(folders[0])
    assert facts["reference"] == str(folders[1])
    assert facts["command"].startswith("softdice score 'a b' --labels")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d[+-]\d\d:\d\d", facts["date"])
    assert facts["labels"] == "1, 2"
    assert facts["policies"] == "class in neither map: 1; missing prediction: skip"
    assert "softdice" in facts["versions"]
    assert "is in neither map of a case scores 1 there" in page
    assert page.index("Not scored: 1") < page.index("<table>")
    assert "<span role='button' tabindex='0'>1 a</span></th>" in page
    assert "<span role='button' tabindex='0'>2 b</span></th>" in page
    assert "<td class='zero'>0.0000</td>" in page
    assert page.count("<figure>") == 2  # the first has no error
    assert re.search(r"<b class='left'>[RA]</b><b class='right'>[LP]</b>", page)
    assert "@media print" in page
    assert not re.search(r"(src|href)='?\"?(https?:|//|/)|@import|url\(", page)


def test_two_runs_of_one_name_and_a_single_case(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other" / "run 7"
    other.parent.mkdir()
    other.symlink_to(folders[1])
    images = tmp_path / "images"
    for case in range(3):
        volume(images, f"case {case}_0000.nii.gz", np.ones((10, 12, 6), np.float32), SPACING)
    np.save(images / "case 3.npy", np.ones((3, 3, 3)))
    page = tmp_path / "r.html"
    done = score(*folders, "--versus", other, "--images", images, "--view", "neurological", "--report", page)
    assert done.exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "<h1>deep/run 7 and other/run 7 against labels</h1>" in text
    assert not re.search(r"<b class='left'>R</b>", text)
    assert re.search(r"<b class='left'>[LA]</b>", text)
    assert "Cases that differ most" in text
    assert text.count("<b>case 2</b> deep/run 7") == text.count("<b>case 2</b> other/run 7") == 1
    assert "expected an image of shape (10, 12, 6) as the masks, got (3, 3, 3)" in text
    score(folders[0] / "case 3.nii.gz", folders[1] / "case 3.nii.gz", "--report", page)
    text = page.read_text(encoding="utf-8")
    assert "class='plot'" not in text
    assert "95 % interval" not in text
    assert text.count("<figure>") == 2  # its two classes
    score(folders[1], folders[1], "--report", page)
    assert "No case with an error." in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options, said",
    [
        (("--view", "upside"), "--view: expected one of radiological, neurological, got 'upside'"),
        (("--images", "none", "--report", "r.html"), "--images: expected a folder, with --report, got 'none'"),
        (("--images", "."), "--images: expected a folder, with --report, got '.'"),
    ],
)
def test_options_of_the_report(
    options: tuple[str, ...], said: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders[1].parent)
    done = score(*folders, *options)
    assert done.exit_code == 2
    assert said in done.stderr


def test_two_predictions_are_shown_in_one_place_and_specks_enlarged(tmp_path: Path) -> None:
    t = np.zeros((40, 40, 12), np.uint8)
    t[4, 30, 9] = 1
    near, far = np.roll(t, 1, 0), np.roll(t, -1, 1)
    far[30:36, 30, 2] = 1
    truth = volume(tmp_path, "t.nii", t, SPACING)
    a, b = (volume(tmp_path, f"{name}.nii", array, SPACING) for name, array in (("a", near), ("b", far)))
    alone = picture(a, truth, 1, Options())
    assert alone.place == ", coronal slice 30, enlarged"
    missed = places(alone, MISSED)
    assert len(missed) == pytest.approx(pixels(alone)[..., 0].size / (14 * 4), rel=0.1)  # of 14 by 4 voxels, one
    first, second = picture(a, truth, 1, Options(), beside=[b]), picture(b, truth, 1, Options(), beside=[a])
    assert first.place == second.place != alone.place
    assert picture(b, truth, 1, Options(), beside=[None]).place == second.place


def test_an_image_lies_where_it_says(tmp_path: Path) -> None:
    """Another orientation and another number of slices: what is drawn under the masks is what lies there."""
    t = np.zeros((24, 30, 10), np.uint8)
    t[5:12, 6:20, 3:7] = 1
    ramp = np.arange(t.size, dtype=np.float32).reshape(t.shape)
    files = [volume(tmp_path, f"{s}.nii", a, SPACING) for s, a in (("p", t // 2), ("t", t))]
    expected = picture(*files, 1, Options(), under=volume(tmp_path, "i.nii", ramp, SPACING))
    whole = nib.load(tmp_path / "i.nii")
    turned = whole.as_reoriented(nib.orientations.axcodes2ornt("PSL"))
    turned.to_filename(tmp_path / "turned.nii")
    assert picture(*files, 1, Options(), under=tmp_path / "turned.nii").png == expected.png


def test_an_image_whose_affine_cannot_be_inverted(tmp_path: Path) -> None:
    """Its voxels have no place of their own: the caption says so in the place of the picture."""
    p, t = body((slice(4, 8), slice(4, 8), slice(3, 6)))
    for folder, array in (("p", p), ("t", t)):
        volume(tmp_path / folder, "case.nii.gz", array, SPACING)
    (tmp_path / "images").mkdir()
    flat = nib.Nifti1Image(t.astype(np.float32), None)
    flat.set_sform(np.diag([1.5, 2.0, 0.0, 1.0]), 1)
    flat.to_filename(tmp_path / "images" / "case.nii.gz")
    out = tmp_path / "report.html"
    score(tmp_path / "p", tmp_path / "t", "--report", out, "--images", tmp_path / "images")
    assert "expected an affine that can be inverted, got a singular one" in unescape(out.read_text())
