"""Every format in and out: values, class ids, size, dtype and geometry."""

from __future__ import annotations

import contextlib

import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
from nibabel import orientations
from PIL import Image as Picture

from icseg.data.formats.content import upright
from icseg.data.images import (
    as_image,
    as_mask,
    list_images,
    map_suffix,
    read_image,
    read_mask,
    stem_of,
    suffix_of,
    write_like,
)
from icseg.data.normalise import check_window, intensity_window, normalise

GREY = np.random.default_rng(0).integers(0, 256, (11, 17)).astype(np.uint8)
DEEP = GREY.astype(np.uint16) * 250
RGB = np.random.default_rng(1).integers(0, 256, (11, 17, 3)).astype(np.uint8)
VOLUME = np.random.default_rng(2).integers(-900, 900, (4, 5, 6)).astype(np.int16)
IDS = (np.arange(11 * 17).reshape(11, 17) % 3).astype(np.uint8)


def save(path, array, **options):
    if path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, array, **options)
    elif path.suffix == ".npy":
        np.save(path, array)
    elif array.dtype == np.uint16:
        path.write_bytes(imagecodecs.png_encode(array))
    else:
        Picture.fromarray(array).save(path, **options)
    return path


def luma(rgb):
    return rgb[..., 0] * 0.299 + rgb[..., 1] * 0.587 + rgb[..., 2] * 0.114


def save_nifti(path, array, codes="RAS", kind=nibabel.Nifti1Image):
    """`array` [x, y, z] in RAS, stored in the orientation `codes` with voxels of 1, 2 and 3 mm."""
    image = kind(array, np.diag([1.0, 2.0, 3.0, 1.0]) + np.eye(4, k=3) * 7)
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
    nibabel.save(image.as_reoriented(turn), path)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.tiff", "a.npy", "A.PNG"])
@pytest.mark.parametrize("array", [GREY, DEEP], ids=["8 bit", "16 bit"])
def test_grey_values_are_exact(tmp_path, name, array):
    image = read_image(save(tmp_path / name, array))
    assert image.dtype == array.dtype
    np.testing.assert_array_equal(image.array, array)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("array", [RGB, RGB.astype(np.uint16) * 257], ids=["8 bit", "16 bit"])
def test_colour_becomes_luma_at_full_depth(tmp_path, name, array):
    options = {"photometric": "rgb"} if name == "a.tif" else {}
    image = read_image(save(tmp_path / name, array, **options))
    assert image.dtype == array.dtype
    np.testing.assert_allclose(image.array, luma(array.astype(float)), rtol=1e-5)


def test_bmp_is_exact_and_gets_a_png_map(tmp_path):
    image = read_image(save(tmp_path / "a.bmp", GREY))
    np.testing.assert_array_equal(image.array, GREY)
    assert image.geometry.suffix == map_suffix(tmp_path / "a.bmp") == ".png"
    np.testing.assert_array_equal(read_mask(tmp_path / "a.bmp").array, GREY)


def test_jpeg_is_read_as_luma(tmp_path):
    flat = np.broadcast_to(np.uint8([200, 100, 50]), (16, 16, 3))
    image = read_image(save(tmp_path / "a.jpg", np.ascontiguousarray(flat), quality=95))
    np.testing.assert_allclose(image.array, luma(np.float64([200, 100, 50])), atol=2)


def test_planar_and_palette_tiff_become_luma(tmp_path):
    tifffile.imwrite(tmp_path / "p.tif", np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_allclose(read_image(tmp_path / "p.tif").array, luma(RGB.astype(float)), rtol=1e-5)
    colours = np.random.default_rng(3).integers(0, 2**16, (3, 256)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "q.tif", GREY, photometric="palette", colormap=colours)
    np.testing.assert_allclose(read_image(tmp_path / "q.tif").array, luma(colours.T[GREY].astype(float)), rtol=1e-5)
    np.testing.assert_array_equal(read_mask(tmp_path / "q.tif").array, GREY)


def test_alpha_is_ignored_and_palette_images_are_looked_up(tmp_path):
    rgba = np.dstack([RGB, GREY])
    np.testing.assert_allclose(read_image(save(tmp_path / "a.png", rgba)).array, luma(RGB.astype(float)), rtol=1e-5)
    picture = Picture.new("P", IDS.shape[::-1])
    picture.putdata(IDS.ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png").array, IDS)
    expected = luma(np.float64([[0, 0, 0], [255, 0, 0], [0, 255, 0]]))[IDS]
    np.testing.assert_allclose(read_image(tmp_path / "p.png").array, expected, rtol=1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_as_displayed(tmp_path, orientation):
    exif = Picture.Exif()
    exif[0x0112] = orientation
    Picture.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    shown = upright(GREY, orientation)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, shown)
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", GREY, extratags=tag)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, shown)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow(orientation):
    from PIL import ImageOps

    picture = Picture.fromarray(GREY)
    picture.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(upright(GREY, orientation), np.asarray(ImageOps.exif_transpose(picture)))


def test_a_turned_jpeg_gets_an_upright_mask(tmp_path):
    exif = Picture.Exif()
    exif[0x0112] = 6
    Picture.fromarray(GREY).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.array.shape == (17, 11)
    assert map_suffix(tmp_path / "a.jpg") == ".png"
    write_like(image, tmp_path / "m.png", IDS.T)
    with Picture.open(tmp_path / "m.png") as written:
        assert written.size == (11, 17)
        assert 0x0112 not in written.getexif()


def test_inverted_tiff_is_read_as_displayed_and_its_mask_as_stored(tmp_path):
    tifffile.imwrite(tmp_path / "w.tif", GREY, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "w.tif").array, 255 - GREY)
    tifffile.imwrite(tmp_path / "b.tif", GREY > 99)
    np.testing.assert_array_equal(read_mask(tmp_path / "b.tif").array, GREY > 99)


@pytest.mark.parametrize("contiguous", [True, False])
def test_tiff_pages_are_a_volume(tmp_path, contiguous):
    pages = np.stack([GREY, GREY + 1, GREY + 2])
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in pages:
            file.write(page, contiguous=contiguous)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array, pages)


def test_colour_stack_becomes_a_grey_volume(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([RGB, RGB // 2]), photometric="rgb")
    assert read_image(tmp_path / "a.tif").array.shape == (2, 11, 17)


def test_tiff_keeps_resolution_georeference_and_imagej_spacing(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif",
        GREY,
        resolution=(300, 150),
        resolutionunit="CENTIMETER",
        extratags=[(33550, "d", 3, (0.5, 0.5, 0.0), True)],
    )
    write_like(read_image(tmp_path / "a.tif"), tmp_path / "m.tif", IDS)
    with tifffile.TiffFile(tmp_path / "m.tif") as file:
        tags = file.pages[0].tags
        assert tags.valueof("XResolution") == (300, 1)
        assert tags.valueof("YResolution") == (150, 1)
        assert tags.valueof("ResolutionUnit") == 3
        assert tags.valueof(33550) == (0.5, 0.5, 0.0)
        np.testing.assert_array_equal(file.asarray(), IDS)
    tifffile.imwrite(tmp_path / "j.tif", np.stack([GREY] * 3), imagej=True, metadata={"axes": "ZYX", "spacing": 2.5})
    write_like(read_image(tmp_path / "j.tif"), tmp_path / "n.tif", np.stack([IDS] * 3))
    with tifffile.TiffFile(tmp_path / "n.tif") as file:
        assert file.imagej_metadata["spacing"] == 2.5
        assert file.imagej_metadata["slices"] == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("axes", ["ZYX", "TYX"])
def test_tiff_keeps_ome_sizes_and_axes(tmp_path, dtype, axes):
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("XYZ", (0.25, 0.5, 2.0), strict=True)}
    sizes |= {"PhysicalSizeXUnit": "µm", "PhysicalSizeZUnit": "nm", "TimeIncrement": 0.1}
    volume = np.stack([GREY] * 3)
    tifffile.imwrite(tmp_path / "a.ome.tif", volume, ome=True, metadata={"axes": axes, **sizes})
    write_like(read_image(tmp_path / "a.ome.tif"), tmp_path / "m.tif", (volume > 5).astype(dtype))
    with tifffile.TiffFile(tmp_path / "m.tif") as file:
        pixels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
        assert sizes.items() <= pixels.items()
        assert file.series[0].axes == axes
        np.testing.assert_array_equal(file.asarray(), (volume > 5).astype(dtype))


def test_a_dtype_that_ome_lacks_is_written_as_plain_tiff(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", GREY, ome=True, metadata={"PhysicalSizeX": 2.0})
    write_like(read_image(tmp_path / "a.ome.tif"), tmp_path / "m.tif", IDS.astype(np.int64))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tif").array, IDS)


def test_tiff_keeps_imagej_frames(tmp_path):
    tifffile.imwrite(tmp_path / "j.tif", np.stack([GREY] * 3), imagej=True, metadata={"axes": "TYX", "finterval": 0.5})
    write_like(read_image(tmp_path / "j.tif"), tmp_path / "n.tif", np.stack([IDS] * 3))
    with tifffile.TiffFile(tmp_path / "n.tif") as file:
        assert (file.series[0].axes, file.imagej_metadata["finterval"]) == ("TYX", 0.5)


@pytest.mark.parametrize("fault", ["singular", "zero", "nan"])
def test_nifti_without_a_usable_affine_is_refused(tmp_path, fault):
    affine = np.diag([2.0, 2, 2, 1])
    if fault == "singular":
        affine[:3, 2] = affine[:3, 1]
    else:
        affine[:3, 2] = {"zero": 0, "nan": np.nan}[fault]
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = affine[row]
    path = tmp_path / "a.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + VOLUME.astype(image.get_data_dtype()).tobytes("F"))
    with pytest.raises(
        ValueError, match=r"^.*a\.nii cannot be read: its affine, which .* must be finite and invertible$"
    ):
        read_image(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti_comes_back_in_its_own_geometry(tmp_path, suffix, kind):
    path = save_nifti(tmp_path / f"a{suffix}", VOLUME, "PIR", kind)
    source = nibabel.load(path)
    image = read_image(path)
    ids = (np.asarray(source.dataobj) > 0).astype(np.int16) * 3
    np.testing.assert_array_equal(image.array, np.asarray(source.dataobj))
    write_like(image, tmp_path / f"m{suffix}", ids)
    written = nibabel.load(tmp_path / f"m{suffix}")
    assert isinstance(written, kind)
    assert written.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(written.dataobj), ids)
    np.testing.assert_array_equal(written.affine, source.affine)
    for key in ("pixdim", "qform_code", "sform_code", "xyzt_units"):
        np.testing.assert_array_equal(written.header[key], source.header[key])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LPI", "PIR", "SAL"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nifti_slices_are_anatomical_however_stored(tmp_path, codes, axis):
    image = read_image(save_nifti(tmp_path / "a.nii.gz", VOLUME, codes))
    planes = image.planes(axis)
    left_back_down = VOLUME[::-1, ::-1, ::-1].transpose(2, 1, 0)  # [z, y, x]
    np.testing.assert_array_equal(planes, np.moveaxis(left_back_down, 2 - axis, 0))
    np.testing.assert_array_equal(image.from_planes(planes, axis), image.array)


def test_flat_nifti_is_an_image(tmp_path):
    nibabel.save(nibabel.Nifti1Image(VOLUME[..., :1], np.eye(4)), tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").planes(None).shape == (1, 5, 4)
    nibabel.save(nibabel.Nifti1Image(VOLUME[..., 0], np.eye(4)), tmp_path / "b.nii")
    image = read_image(tmp_path / "b.nii")
    np.testing.assert_array_equal(image.planes(None)[0], VOLUME[..., 0].T)
    np.testing.assert_array_equal(image.from_planes(image.planes(None), None), VOLUME[..., 0])
    nibabel.save(nibabel.Nifti1Image(VOLUME[..., None], np.eye(4)), tmp_path / "c.nii")
    image = read_image(tmp_path / "c.nii")
    write_like(image, tmp_path / "m.nii", np.ones(VOLUME.shape, np.uint8))
    assert nibabel.load(tmp_path / "m.nii").shape == (*VOLUME.shape, 1)


def test_scaled_nifti_is_read_scaled_and_its_mask_is_not(tmp_path):
    source = nibabel.Nifti1Image(VOLUME, np.eye(4))
    source.header.set_slope_inter(0.5, 10)
    nibabel.save(source, tmp_path / "a.nii")
    raw = nibabel.load(tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(image.array, raw.get_fdata())
    assert image.mask_dtype(7) == np.int16
    write_like(image, tmp_path / "m.nii", np.full(VOLUME.shape, 7, np.int16))
    assert (nibabel.load(tmp_path / "m.nii").get_fdata() == 7).all()


def test_npz_names(tmp_path):
    np.savez(tmp_path / "one.npz", anything=GREY)
    np.savez(tmp_path / "two.npz", image=GREY, mask=IDS)
    np.savez(tmp_path / "none.npz", a=GREY, b=GREY)
    np.testing.assert_array_equal(read_image(tmp_path / "one.npz").array, GREY)
    np.testing.assert_array_equal(read_image(tmp_path / "two.npz").array, GREY)
    np.testing.assert_array_equal(read_mask(tmp_path / "two.npz").array, IDS)
    with pytest.raises(ValueError, match="one array, or one named image; it holds a, b"):
        read_image(tmp_path / "none.npz")
    write_like(read_image(tmp_path / "two.npz"), tmp_path / "m.npz", IDS)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.npz").array, IDS)


def test_pickles_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read: .*allow_pickle=False"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "ids"),
    [
        (IDS * 127, [0, 127, 254]),
        ((IDS > 0).astype(np.uint8) * 255, [0, 255]),
        (IDS > 0, [0, 1]),
        (IDS.astype(np.float32), [0, 1, 2]),
        (IDS.astype(np.uint16) * 300, [0, 300, 600]),
        (IDS.astype(np.int64), [0, 1, 2]),
    ],
)
def test_class_ids_are_kept(array, ids):
    mask = as_mask(array, "masks[0]")
    assert mask.array.dtype.kind in "iu"
    assert np.unique(mask.array).tolist() == ids


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IDS * 0.3, "masks must hold integer class ids, got 0.3"),
        (np.where(IDS > 0, np.nan, 0.0), "masks must hold integer class ids, got nan"),
        (IDS.astype(np.int32) - 1, "masks must hold class ids from 0 to 4294967295, got -1 to 1"),
        (IDS.astype(complex), "masks must hold real numbers, got dtype complex128"),
        (IDS[0], r"masks must be 2-D or 3-D and not empty, got shape \[17\]"),
        (IDS[:0], r"masks must be 2-D or 3-D and not empty, got shape \[0, 17\]"),
    ],
)
def test_other_values_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        as_mask(array, "masks")


def test_colour_masks_must_agree_in_their_channels(tmp_path):
    save(tmp_path / "g.png", np.stack([IDS] * 3, -1))
    np.testing.assert_array_equal(read_mask(tmp_path / "g.png").array, IDS)
    with pytest.raises(ValueError, match="a mask must have one channel of integer class ids"):
        read_mask(save(tmp_path / "c.png", RGB))
    with pytest.raises(ValueError, match="must hold exact class ids, got a JPEG"):
        read_mask(save(tmp_path / "m.jpg", IDS))


def test_mask_dtype_is_the_inputs_where_it_fits():
    assert as_image(GREY, "x").mask_dtype(255) == np.uint8
    assert as_image(GREY, "x").mask_dtype(256) == np.uint16
    assert as_image(VOLUME, "x").mask_dtype(3) == np.int16
    assert as_image(GREY.astype(">u2"), "x").mask_dtype(3) == np.dtype("=u2")
    assert as_image(GREY.astype(np.float32), "x").mask_dtype(3) == np.uint8
    assert as_image(GREY > 9, "x").mask_dtype(1) == np.uint8


def test_png_holds_ids_up_to_65535(tmp_path):
    image = read_image(save(tmp_path / "a.png", GREY))
    ids = IDS.astype(np.uint16) * 30000
    assert image.mask_dtype(60000) == np.uint16
    write_like(image, tmp_path / "m.png", ids)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png").array, ids)
    with pytest.raises(ValueError, match=r"class ids of a \.png mask .* at most 65535, got 70000"):
        image.mask_dtype(70000)


def test_maps_in_unit_range(tmp_path):
    unit = np.linspace(0, 1, GREY.size, dtype=np.float32).reshape(GREY.shape)
    write_like(read_image(save(tmp_path / "a.png", GREY)), tmp_path / "u.png", unit)
    with Picture.open(tmp_path / "u.png") as written:
        np.testing.assert_allclose(np.asarray(written) / 255, unit, atol=0.5 / 255 + 1e-6)
    write_like(read_image(save(tmp_path / "a.tif", GREY)), tmp_path / "u.tif", unit)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "u.tif"), unit)


def test_writing_checks_ending_and_shape(tmp_path):
    image = read_image(save(tmp_path / "a.png", GREY))
    with pytest.raises(ValueError, match=r"path must end in \.png for a map of .*a\.png, got .*m\.tif"):
        write_like(image, tmp_path / "m.tif", IDS)
    with pytest.raises(ValueError, match=r"array must have the shape \[11, 17\] of .*a\.png, got \[17, 11\]"):
        write_like(image, tmp_path / "m.png", IDS.T)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    image = read_image(save(tmp_path / "a.png", GREY))

    def half(self, path, array):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(image.geometry), "write", half)
    with pytest.raises(KeyboardInterrupt):
        write_like(image, tmp_path / "m.png", IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def all_formats(folder):
    nibabel.save(nibabel.Nifti1Image(VOLUME, np.eye(4)), folder / "a.nii")
    nibabel.save(nibabel.Nifti1Image(VOLUME, np.eye(4)), folder / "a.nii.gz")
    np.savez_compressed(folder / "a.npz", image=GREY)
    for name in ("a.png", "a.jpg", "a.tif", "a.npy"):
        save(folder / name, GREY)
    save(folder / "deep.png", DEEP)
    tifffile.imwrite(folder / "stack.tif", np.stack([GREY] * 4), photometric="minisblack", compression="zlib")
    Picture.fromarray(GREY).save(folder / "pages.tif", save_all=True, append_images=[Picture.fromarray(GREY + 1)] * 3)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path, share):
    for path in all_formats(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match="cannot be read: "):
            read_image(path)


def test_a_file_without_its_last_bytes_is_refused_or_whole(tmp_path):
    for path in all_formats(tmp_path):
        data, whole = path.read_bytes(), read_image(path).array
        for missing in (1, 4, 9, 16):
            path.write_bytes(data[:-missing])
            with contextlib.suppress(ValueError):
                np.testing.assert_array_equal(read_image(path).array, whole)


def test_the_ending_of_maps_is_that_of_the_geometry(tmp_path):
    for path in all_formats(tmp_path):
        assert read_image(path).geometry.suffix == map_suffix(path)


def test_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png must be an existing file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"a\.gif must end in one of \.png"):
        read_image(tmp_path / "a.gif")
    (tmp_path / "t.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"t\.png cannot be read: cannot identify image file"):
        read_image(tmp_path / "t.png")


def test_unfit_contents(tmp_path):
    tifffile.imwrite(tmp_path / "c.ome.tif", np.stack([GREY] * 2), metadata={"axes": "CYX"})
    with pytest.raises(ValueError, match="it has 2 channels; one channel, or RGB, is needed"):
        read_image(tmp_path / "c.ome.tif")
    with tifffile.TiffWriter(tmp_path / "d.tif") as file:
        file.write(GREY)
        file.write(GREY[:5])
    with pytest.raises(ValueError, match="it holds 2 images of different shapes"):
        read_image(tmp_path / "d.tif")
    nibabel.save(nibabel.Nifti1Image(np.stack([VOLUME] * 2, -1), np.eye(4)), tmp_path / "t.nii")
    with pytest.raises(ValueError, match=r"must be 2-D or 3-D and not empty, got shape \[4, 5, 6, 2\]"):
        read_image(tmp_path / "t.nii")
    colour = np.zeros((4, 5, 6), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), tmp_path / "rgb.nii")
    with pytest.raises(ValueError, match="one real value a voxel is needed"):
        read_image(tmp_path / "rgb.nii")


def test_volumes_need_an_axis():
    image = as_image(VOLUME, "images")
    assert [len(image.planes(axis)) for axis in (0, 1, 2)] == [4, 5, 6]
    with pytest.raises(ValueError, match=r"images must be 2-D unless an axis .* got shape \[4, 5, 6\]"):
        image.planes(None)
    assert as_image(GREY[None], "x").planes(None).shape == (1, 11, 17)
    assert as_image(GREY[..., None], "x").planes(None).shape == (1, 11, 17)


COLOUR = np.random.default_rng(0).integers(0, 255, (11, 17, 3)).astype(np.uint8)
LUMA_OF_COLOUR = COLOUR @ np.array([0.299, 0.587, 0.114], np.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [None, ".npy", ".npz"])
@pytest.mark.parametrize("alpha", [False, True])
def test_colour_arrays_become_luma(tmp_path, dtype, suffix, alpha):
    array = np.concatenate([COLOUR, COLOUR[..., :1]], -1) if alpha else COLOUR
    array = value = array.astype(dtype)
    if suffix is not None:
        value = tmp_path / f"a{suffix}"
        with value.open("wb") as file:
            np.save(file, array) if suffix == ".npy" else np.savez(file, image=array)
    image = as_image(value, "images")
    np.testing.assert_allclose(image.array, LUMA_OF_COLOUR, rtol=1e-5)
    assert image.mask_dtype(1) == dtype
    assert as_image(value, "images", 2).planes(2).shape == (4 if alpha else 3, 11, 17)


def test_other_arrays_of_three_are_volumes():
    for array in (COLOUR.astype(np.float32), COLOUR.astype(np.int32)):
        with pytest.raises(ValueError, match=r"images must be 2-D .*; colour must be uint8 or uint16, or be made grey"):
            as_image(array, "images").planes(None)
    assert as_image(COLOUR[:1], "images").planes(None).shape == (1, 17, 3)


def test_colour_mask_arrays_must_agree_in_their_channels():
    np.testing.assert_array_equal(as_mask(np.stack([IDS] * 3, -1), "masks").array, IDS)
    with pytest.raises(ValueError, match="masks cannot be a mask: it is in colour; a mask must have one channel"):
        as_mask(COLOUR, "masks")


def test_names_of_files(tmp_path):
    for name in ("b.nii.gz", "a.PNG", ".hidden.png", "notes.txt", "c.d.tif"):
        (tmp_path / name).touch()
    files = list_images(tmp_path)
    assert [path.name for path in files] == ["a.PNG", "b.nii.gz", "c.d.tif"]
    assert [stem_of(path) for path in files] == ["a", "b", "c.d"]
    assert [suffix_of(path) for path in files] == [".png", ".nii.gz", ".tif"]
    (tmp_path / "file.png").touch()
    with pytest.raises(NotADirectoryError, match=r"file\.png is a file; give its folder"):
        list_images(tmp_path / "file.png")
    with pytest.raises(FileNotFoundError, match="must be an existing folder"):
        list_images(tmp_path / "none")


def test_percentiles_ignore_outliers():
    values = np.linspace(100, 200, 1001)
    values[-1], values[0] = 1e6, -1e6
    low, high = intensity_window(values, "x")
    assert 100 < low < 101
    assert 199 < high < 200
    scaled = normalise(values, (low, high))
    assert scaled.dtype == np.float32
    assert (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_allclose(scaled[500], 0.5, atol=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(64, dtype=np.int64) + 2**30,
        np.arange(64, dtype=np.uint64) + 2**45,
        np.linspace(1e6, 1e6 + 1, 64),
        np.linspace(-1e300, 1e300, 64),
        np.linspace(-3e38, 3e38, 64).astype(np.float32),
        np.linspace(-6e4, 6e4, 64).astype(np.float16),
    ],
    ids=lambda values: values.dtype.name,
)
def test_wide_values_keep_their_levels(values):
    scaled = normalise(values, (float(values.min()), float(values.max())))
    np.testing.assert_allclose(scaled, np.linspace(0, 1, 64), atol=1e-3)
    scaled = normalise(values, intensity_window(values, "x"))
    assert len(np.unique(scaled)) >= 62
    assert (scaled.min(), scaled.max()) == (0, 1)


def test_a_few_bright_pixels_are_not_constant():
    values = np.zeros((100, 100), np.uint8)
    values[3, 3] = 9
    assert intensity_window(values, "x") == (0, 9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((3, 3), 7), "scan must not be constant, got 7 everywhere"),
        (np.array([[1.0, np.nan]]), "scan must hold finite values, got nan"),
        (np.array([[1.0, -np.inf]]), "scan must hold finite values, got -inf"),
        (np.array([[-1.5e308, 1.5e308]]), "scan must hold values of a finite range, got -1.5e"),
    ],
)
def test_constant_and_non_finite_images_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        intensity_window(values, "scan")


@pytest.mark.parametrize("window", [(1, 1), (2, 1), (np.nan, 1), (0, np.inf), (-1.5e308, 1.5e308), (0,)])
def test_windows_are_checked(window):
    with pytest.raises(ValueError, match=r"window must be \(low, high\), finite, with low < high, got"):
        check_window(window)


@pytest.mark.parametrize("order", ["<", ">"])
def test_colour_arrays_in_either_byte_order(order):
    colour = np.full((12, 10, 3), 300, f"{order}u2")
    assert as_image(colour, "photo").array.shape == (12, 10)
