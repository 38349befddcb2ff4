import re
import warnings
from functools import partial
from importlib.util import find_spec, module_from_spec

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from util.data.augment import random_box
from util.data.image_files import ImageFiles, open_image, random_crop, readable_endings, to_colours
from util.data.preprocessing import describe_preprocessing
from util.errors import BadImage, DataError

SIDE = 40
rng = np.random.default_rng(0)


def noise(width, height):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def read(paths, size=32, transform=None, epoch=0, index=None, **options):
    transform = transform or describe_preprocessing("folder", size)
    index = np.arange(len(paths)) if index is None else np.array(index)
    files = ImageFiles([str(path) for path in paths], size, transform, **options)
    return files.read(np.full_like(index, epoch), index)


def pixels(image):
    return np.asarray(image).astype(int)


def test_images_of_every_kind_become_rgb(tmp_path):
    for mode in ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16"]:
        grey = np.full((SIDE, SIDE), 255, np.uint8)
        if mode.startswith("I"):
            image = Image.fromarray(
                (grey.astype(np.uint16) * 257).astype(np.int32 if mode == "I" else np.uint16)
            )
        else:
            image = Image.fromarray(grey).convert("RGB").convert(mode)
        path = tmp_path / ("x.tif" if mode == "I" else "x.jpg" if mode == "CMYK" else "x.png")
        image.save(path)
        images, bad = read([path])
        assert images.shape == (1, 3, 32, 32) and images.dtype == torch.uint8 and not bad
        assert images.min() >= 254


def test_grey_of_any_depth_is_scaled_by_its_range(tmp_path):
    for name, dtype, largest in [
        *(("x.png", np.uint16, largest) for largest in (0xFF, 0xFFF, 0xFFFF)),
        *(("x.tif", dtype, 0xFFF) for dtype in (np.uint16, ">u2", np.int32)),
        *(("x.tif", np.int32, largest) for largest in (0xFF, 0xFFFF, 0xFFFFF, 2**31 - 1)),
        ("x.tif", np.float32, 1),
    ]:
        steps = np.linspace(0, largest, 256)[None].repeat(8, 0).astype(dtype)
        form = "I;16B" if dtype == ">u2" else None
        raw = (form, steps.shape[::-1], steps.tobytes(), "raw", form, 0, 1)
        image = Image.frombytes(*raw) if form else Image.fromarray(steps)
        image.save(tmp_path / name)
        grey = pixels(open_image(str(tmp_path / name)))[0, :, 0]
        assert np.abs(grey - np.arange(256)).max() <= 1, (name, dtype, largest)
    for value in (0, 0x8000):  # a constant image keeps its shade
        Image.fromarray(np.full((SIDE, SIDE), value, np.uint16)).save(tmp_path / "x.png")
        assert read([tmp_path / "x.png"]).images.unique().tolist() == [value >> 8]


def test_12_bits_of_a_tiff_are_scaled(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "x.tif")
    tiff = (tmp_path / "x.tif").read_bytes()
    for place in (i for i in range(len(tiff) - 12) if tiff[i : i + 2] == b"\x02\x01"):
        if tiff[place + 2 : place + 4] == b"\x03\0":  # BitsPerSample, a short
            tiff = tiff[: place + 8] + b"\x0c\0" + tiff[place + 10 :]
    (tmp_path / "x.tif").write_bytes(tiff[:-8] + b"\xff\xf8\x00" * 2 + b"\0\0")
    with Image.open(tmp_path / "x.tif") as image:
        assert image.tag_v2[258] == (12,)
    assert pixels(open_image(str(tmp_path / "x.tif")))[..., 0].tolist() == [[255, 128]] * 2


def test_grey_without_a_known_range_is_refused(tmp_path):
    for values in ([0.0, 1.5], [-0.5, 0.5], [0.0, np.nan], [-1, 5]):
        dtype = np.int32 if values == [-1, 5] else np.float32
        Image.fromarray(np.array([values], dtype)).save(tmp_path / "x.tif")
        with pytest.raises(BadImage, match=r"x\.tif: its pixels are in .*; convert them first"):
            open_image(str(tmp_path / "x.tif"))


def test_every_ending_that_pillow_decodes_is_read(tmp_path):
    assert {".jpg", ".png", ".gif", ".jfif", ".jpe"} <= {*readable_endings()}
    for ending in readable_endings():
        path = tmp_path / f"x{ending.upper()}"
        noise(SIDE, SIDE).save(path)
        assert read([path]).images.shape == (1, 3, 32, 32), ending


def test_an_image_of_too_many_pixels_names_the_flag(tmp_path):
    noise(20, 10).save(tmp_path / "x.png")
    with pytest.raises(BadImage, match=r"x\.png: 200 pixels, more than --max-image-pixels 199"):
        read([tmp_path / "x.png"], max_pixels=199)
    assert len(read([tmp_path / "x.png"], max_pixels=200).images) == 1
    Image.new("1", (14000, 13000)).save(tmp_path / "large.png")  # Pillow's limit: 178,956,970
    with pytest.raises(BadImage, match="182000000 pixels, more than --max-image-pixels 178956970"):
        open_image(str(tmp_path / "large.png"))
    with Image.open(tmp_path / "large.png") as image:  # Pillow's own limit is off
        assert image.size == (14000, 13000)


def test_a_large_jpeg_is_close_to_the_plainly_resized_image(tmp_path):
    ramp = np.linspace(0, 255, 500)[None, :, None].repeat(400, 0).repeat(3, 2).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "x.jpg")
    expected = Image.fromarray(ramp).resize((32, 32), Image.Resampling.BILINEAR)
    (image,) = read([tmp_path / "x.jpg"], min_size=64).images
    assert np.abs(image.permute(1, 2, 0).numpy() - pixels(expected)).max() <= 3
    assert open_image(str(tmp_path / "x.jpg"), min_size=64).size == (125, 100)
    assert open_image(str(tmp_path / "x.jpg")).size == (500, 400)


ORIENTATIONS = range(1, 9)
MODES = ["RGB", "L", "CMYK", "P"]


def test_every_exif_orientation_is_undone(tmp_path):
    for orientation, mode in [
        *((o, "RGB") for o in ORIENTATIONS),
        *zip((3, 6, 8), MODES[1:], strict=True),
    ]:
        stored_as = [  # how a camera held so would store the scene, as EXIF 2.32 defines it
            lambda scene: scene,
            np.fliplr,
            lambda scene: np.rot90(scene, 2),
            np.flipud,
            lambda scene: scene.swapaxes(0, 1),
            np.rot90,
            lambda scene: np.rot90(scene, 2).swapaxes(0, 1),
            lambda scene: np.rot90(scene, 3),
        ]
        scene = np.zeros((24, 36, 3), np.uint8)
        scene[:12, :18], scene[:12, 18:], scene[12:, :18] = 51, 102, 204  # of Pillow's palette
        stored = Image.fromarray(np.ascontiguousarray(stored_as[orientation - 1](scene)))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path = tmp_path / ("x.png" if mode == "P" else "x.jpg")
        stored.convert(mode).save(path, exif=exif, **({} if mode == "P" else {"quality": 100}))
        assert np.abs(pixels(open_image(str(path))) - scene).max() <= 8


def test_a_damaged_exif_header_costs_neither_the_image_nor_a_warning(tmp_path):
    image, paths = noise(SIDE, SIDE), [str(tmp_path / name) for name in ("a.png", "b.png")]
    image.save(paths[0], exif=b"Exif\0\0nonsense")
    image.save(paths[1], exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\1")  # ends too soon
    with warnings.catch_warnings(record=True) as told:
        fresh = module_from_spec(find_spec("util.data.image_files"))
        fresh.__spec__.loader.exec_module(fresh)  # anew: pytest forgets what the first one ignores
        for path in paths:
            assert np.array_equal(pixels(fresh.open_image(path)), pixels(image))
    assert not told


def bad_files(folder):
    """One whole image between bad ones, and the bad ones by index."""
    for name in ("whole.jpg", "short.jpg"):
        noise(SIDE, SIDE).save(folder / name)
    short = (folder / "short.jpg").read_bytes()
    (folder / "short.jpg").write_bytes(short[: len(short) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    names = ("short.jpg", "empty.jpg", "whole.jpg", "text.jpg")
    paths = [str(folder / name) for name in names]
    return paths, {i: paths[i] for i in (0, 1, 3)}


def test_bad_images_are_named_by_the_error(tmp_path):
    paths, bad = bad_files(tmp_path)
    for i, path in bad.items():
        with pytest.raises(BadImage, match=f"^cannot decode the image {re.escape(path)}: "):
            read(paths, index=[i])


def test_bad_images_can_be_skipped_and_are_named(tmp_path):
    paths, bad = bad_files(tmp_path)
    images, skipped = read(paths, skip=True)
    assert skipped == bad
    assert torch.equal(images, read(paths, index=[2]).images)
    images, skipped = read(paths, index=[3], skip=True)
    assert images.shape == (0, 3, 32, 32) and skipped == {3: paths[3]}


def test_a_file_that_cannot_be_read_is_never_skipped(tmp_path):
    with pytest.raises(DataError, match=r"^cannot read the image .*gone\.jpg: No such file"):
        read([tmp_path / "gone.jpg"], skip=True)


def test_paths_of_any_bytes_are_found(tmp_path):
    path = tmp_path / "k\udcff\u00e4tze.png"  # \udcff: a byte that is no UTF-8
    noise(32, 32).save(path)
    assert read([path]).images.shape == (1, 3, 32, 32)


def test_the_random_crop_is_its_box_resized():
    image = noise(90, 70)
    top, left, height, width = random_box(90, 70, 3, 1, 5)
    box = image.crop((left, top, left + width, top + height))
    expected = box.resize((48, 48), Image.Resampling.BILINEAR)
    assert np.array_equal(random_crop(image, 1, 5, image_size=48, seed=3), expected)


def test_a_random_crop_depends_on_seed_epoch_and_index_alone(tmp_path):
    noise(90, 70).save(tmp_path / "x.png")
    paths = [tmp_path / "x.png"] * 3
    views = [partial(random_crop, image_size=32, seed=seed) for seed in (0, 1)]
    whole = read(paths, transform=views[0], epoch=2).images
    assert torch.equal(read(paths, transform=views[0], epoch=2, index=[2, 0]).images, whole[[2, 0]])
    for other in (
        read(paths, transform=views[0], epoch=3).images,
        read(paths, transform=views[1], epoch=2).images,
        whole[[1, 2, 0]],
    ):
        assert (other != whole).flatten(1).any(1).all()


def test_the_background_shows_through_transparent_pixels(tmp_path):
    colour, shades = (200, 100, 50), np.full((SIDE, SIDE, 4), 250, np.uint8)
    for alpha, expected in [(0, colour), (255, (250,) * 3), (51, (210, 130, 90))]:
        shades[..., 3] = alpha
        Image.fromarray(shades).save(tmp_path / "x.png")
        files = ImageFiles(
            [str(tmp_path / "x.png")], 32, describe_preprocessing("folder", 32), background=colour
        )
        found = files.read(np.zeros(1, int), np.zeros(1, int)).images
        assert found.amax((0, 2, 3)).tolist() == found.amin((0, 2, 3)).tolist() == list(expected)
        assert files.transparent == (set() if alpha == 255 else {0})
    few = noise(8, 8).quantize(16)
    few.save(tmp_path / "x.gif", transparency=few.getpixel((0, 0)))
    clear = open_image(str(tmp_path / "x.gif"))
    assert clear.mode == "RGBA" and clear.getpixel((0, 0))[3] == 0


def test_opaque_images_become_rgb():
    image = noise(8, 8)
    few = image.quantize(16)
    for opaque in (image, image.convert("RGBA")):
        assert np.array_equal(to_colours(opaque), image)
    assert np.array_equal(to_colours(few), few.convert("RGB"))
