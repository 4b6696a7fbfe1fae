"""Pixels of image files agree with those of ImageMagick.

The same properties are tested without it, by pixels computed by hand, in
`tests/_images/test_decode.py`, `test_orientation.py` and `test_transparency.py`.
"""

import os
import stat
from pathlib import Path

import compare_readers
import numpy as np
import pytest
from compare_readers import Outcome, compare_file, compare_pixels, find_imagemagick
from PIL import Image

# Files of Pillow's tests whose pixels stay different from those of ImageMagick 6. The
# reasons are in docs/user_guide/images.md.
KNOWN_DIFFERENCES = {
    "badrle.bmp",
    "hopper2I.tif",
    "hopper2IR.tif",
    "hopper4I.tif",
    "hopper4IR.tif",
    "old-style-jpeg-compression-no-samplesperpixel.tif",
    "old-style-jpeg-compression.tif",
    "pal8os2v2.bmp",
    "pil123p.png",
    "pil123rgba.png",
    "rgb32bf-abgr.bmp",
    "rgb32fakealpha.bmp",
    "transparency.avif",
    "xmp_tags_orientation.png",
    "xmp_tags_orientation_exiftool.png",
}
RNG = np.random.default_rng(0)
# Blocks of 16 pixels, whose colors lossy formats preserve.
BLOCKS = np.kron(RNG.integers(0, 256, (3, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)


@pytest.fixture(scope="session")
def imagemagick():
    command = find_imagemagick()
    if command is None:
        pytest.skip("ImageMagick is not installed")
    return command


def rotated():
    data = Image.Exif()
    data[0x0112] = 6
    return data


FILES = {
    "a.png": {},
    "rotated.jpg": {"exif": rotated(), "subsampling": 0},
    "b.tif": {"compression": "tiff_lzw"},
    "c.webp": {"lossless": True},
    "d.bmp": {},
    "e%d [0].gif": {},
}


@pytest.mark.parametrize("name", FILES)
def test_generated_files_agree(name, imagemagick, tmp_path):
    Image.fromarray(BLOCKS).save(path := tmp_path / name, **FILES[name])
    assert compare_file(path, imagemagick).outcome is Outcome.AGREES


def test_transparent_file_agrees(imagemagick, tmp_path):
    alpha = np.linspace(0, 255, BLOCKS[..., 0].size).reshape(48, 64).astype(np.uint8)
    image = Image.fromarray(np.dstack([BLOCKS, alpha]))
    image.save(path := tmp_path / "a.png")
    assert compare_file(path, imagemagick).outcome is Outcome.AGREES


def test_frame_of_a_gif_canvas_agrees(imagemagick, tmp_path):
    Image.fromarray(BLOCKS).save(path := tmp_path / "a.gif", optimize=False)
    content = bytearray(path.read_bytes())
    content[6:8] = (100).to_bytes(2, "little")  # the canvas is wider than the frame
    path.write_bytes(content)
    assert compare_file(path, imagemagick).outcome is Outcome.AGREES


def test_each_outcome(imagemagick, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("no image")
    Image.fromarray(BLOCKS).save(tmp_path / "a.tga")
    Image.fromarray(BLOCKS).save(tmp_path / "b.png")
    results = compare_readers.compare_folder(tmp_path, imagemagick)
    assert {name: result.outcome for name, result in results.items()} == {
        "a.tga": Outcome.REFUSED,
        "b.png": Outcome.AGREES,
        "text": Outcome.NEITHER,
    }
    path = tmp_path / "b.png"
    negative = Image.fromarray(255 - BLOCKS)
    monkeypatch.setattr(compare_readers, "decode", lambda *args, **options: negative)
    assert compare_file(path, imagemagick).outcome is Outcome.DIFFERS
    assert compare_file(tmp_path / "text", imagemagick).outcome is Outcome.OTHER_FAILED
    monkeypatch.delattr(compare_readers, "decode")
    assert compare_file(path, imagemagick).outcome is Outcome.CRASHED


def test_compare_pixels():
    noise = RNG.integers(-5, 6, BLOCKS.shape)
    close = (BLOCKS + noise).clip(0, 255).astype(np.uint8)
    assert compare_pixels(close, BLOCKS)[0]
    for other in (255 - BLOCKS, BLOCKS[::-1], np.rot90(BLOCKS), BLOCKS[:-1]):
        assert not compare_pixels(np.asarray(other), BLOCKS)[0]


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for a program")
@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'Version: ImageMagick 7.1.1'", True),
        ("echo 'GraphicsMagick 1.4'", False),
        ("echo 'Version: ImageMagick 7.1.1'; exit 1", False),
        ("echo 'it is not installed' >&2; exit 1", False),
    ],
)
def test_find_imagemagick(script, found, tmp_path, monkeypatch):
    program = tmp_path / "convert"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_imagemagick() == ([str(program)] if found else None)


@pytest.mark.slow
def test_folder_of_image_files_agrees(imagemagick):
    folder = os.environ.get("SKTL_IMAGE_FILES")
    if folder is None:
        pytest.skip("set SKTL_IMAGE_FILES to a folder of image files")
    results = compare_readers.compare_folder(Path(folder), imagemagick)
    assert any(result.outcome is Outcome.AGREES for result in results.values())
    assert not [n for n, r in results.items() if r.outcome is Outcome.CRASHED]
    differing = {
        Path(name).name: result.details
        for name, result in results.items()
        if result.outcome is Outcome.DIFFERS
    }
    new = differing.keys() - KNOWN_DIFFERENCES
    assert not new, {name: differing[name] for name in new}
