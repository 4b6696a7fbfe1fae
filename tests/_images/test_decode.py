"""Each kind of image is decoded to pixels computed by hand; invalid ones raise."""

import colorsys
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_files import upright_by_orientation
from PIL import Image
from sklearn.datasets import load_sample_images

from sktl._images.decode import decode
from sktl._images.file_formats import MAX_PIXELS

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 5), dtype=np.uint16)
BITS = GREY > 127
COLOURS = RNG.integers(0, 256, (256, 3), dtype=np.uint8)

# Four different patches, so that its rotations and reflections are eight different
# images. Each patch is made of whole JPEG blocks, so that its color is preserved
# without chroma subsampling.
PATCHES = np.kron(
    np.array([[[200, 60, 60], [60, 180, 60]], [[60, 60, 200], [220, 220, 90]]]),
    np.ones((16, 32, 1)),
).astype(np.uint8)  # (32, 64, 3)


def repeat_grey(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., np.newaxis], 3, axis=-1)


def composite_on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., np.newaxis] / 255
    return np.rint(pixels * a + 255 * (1 - a)).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image_from_bytes(mode: str, values: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (values.shape[1], values.shape[0]), values.tobytes())


def decode_pixels(
    image: object, index: int = 0, pixel_range: object = "auto"
) -> np.ndarray:
    pil_image = decode(image, index=index, pixel_range=pixel_range)
    assert pil_image.mode == "RGB"
    return np.asarray(pil_image)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )


def build_png(width: int, height: int, depth: int, color: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            *chunks,
            png_chunk(b"IEND", b""),
        )
    )


def png_rows(values: np.ndarray) -> bytes:
    """Return compressed rows, each with the filter byte 0."""
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png_chunk(b"IDAT", zlib.compress(rows))


def palette_image(**info: object) -> Image.Image:
    image = Image.fromarray(GREY)
    image.putpalette(COLOURS.tobytes())
    image.info.update(info)
    return image


def exif_orientation(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def encode_frames(format: str, first: np.ndarray, **options: object) -> bytes:
    others = [Image.fromarray(255 - first)]
    return encode(first, format, save_all=True, append_images=others, **options)


def lab_patches() -> Image.Image:
    """Return white, middle grey and black: L* = 100, 50.2, 0."""
    image = Image.new("LAB", (3, 1))
    for x, lightness in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (lightness, 128, 128))
    return image


LAB_RGB = np.array([[[255] * 3, [119] * 3, [0] * 3]])  # by the formulas of CIE and sRGB
CMYK = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
CMYK_RGB = np.rint((255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255)
YCC = np.array([[[150, 100, 180], [80, 128, 128]]], dtype=np.uint8)
YCC_RGB = YCC[..., :1] + (YCC[..., 1:] - 128.0) @ [
    [0, -0.344, 1.772],
    [1.402, -0.714, 0],
]


def corpus() -> Iterator[tuple[str, bytes, np.ndarray, int]]:
    """Yield name, file, expected pixels and tolerance (of 255)."""
    alpha = np.dstack([RGB, ALPHA])
    key = tuple(int(v) for v in RGB[0, 0])
    key_alpha = np.where((RGB == RGB[0, 0]).all(-1), 0, 255)
    grey_key = np.where(GREY == GREY[0, 0], 0, 255)
    deep = np.rint(DEEP / 65535 * 255)
    unit = RNG.random((6, 5), dtype=np.float32)

    for format in ("PNG", "BMP", "PPM", "TIFF"):
        yield (
            f"{format} 1",
            encode(Image.fromarray(BITS), format),
            repeat_grey(BITS * 255),
            0,
        )
        yield f"{format} L", encode(GREY, format), repeat_grey(GREY), 0
        yield f"{format} RGB", encode(RGB, format), RGB, 0
    for format in ("PNG", "BMP", "TIFF", "GIF"):
        yield f"{format} P", encode(palette_image(), format), COLOURS[GREY], 0
    for format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        yield (
            f"{format} RGBA",
            encode(alpha, format, **options),
            composite_on_white(RGB, ALPHA),
            1,
        )
    for format in ("PNG", "TIFF"):
        image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
        yield (
            f"{format} LA",
            encode(image, format),
            composite_on_white(repeat_grey(GREY), ALPHA),
            1,
        )
        yield f"{format} I;16", encode(DEEP, format), repeat_grey(deep), 0

    yield (
        "PNG palette with alphas",
        encode(palette_image(), "PNG", transparency=bytes(range(256))),
        composite_on_white(COLOURS[GREY], GREY),
        1,
    )
    for format in ("PNG", "GIF"):
        yield (
            f"{format} transparent index",
            encode(palette_image(), format, transparency=int(GREY[0, 0])),
            composite_on_white(COLOURS[GREY], grey_key),
            0,
        )
    yield (
        "PNG grey tRNS",
        encode(GREY, "PNG", transparency=int(GREY[0, 0])),
        composite_on_white(repeat_grey(GREY), grey_key),
        0,
    )
    yield (
        "PNG 1-bit tRNS",
        encode(Image.fromarray(BITS), "PNG", transparency=0),
        np.full((6, 5, 3), 255),
        0,
    )
    yield (
        "PNG 16-bit tRNS",
        encode(DEEP, "PNG", transparency=int(DEEP[0, 0])),
        repeat_grey(np.where(DEEP == DEEP[0, 0], 255, deep)),
        0,
    )
    yield (
        "PNG RGB tRNS",
        encode(RGB, "PNG", transparency=key),
        composite_on_white(RGB, key_alpha),
        0,
    )
    wide = RNG.integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    yield (
        "PNG 48-bit RGB",
        build_png(5, 6, 16, 2, png_rows(wide.astype(">u2"))),
        np.rint(wide / 65535 * 255),
        1,
    )
    yield "PNG eXIf after the pixels", png_with_late_exif(), RGB[::-1, ::-1], 0
    yield "APNG", encode_frames("PNG", RGB), RGB, 0
    yield "GIF animation", encode_frames("GIF", GREY), repeat_grey(GREY), 0
    yield "WEBP", encode(RGB, "WEBP", lossless=True), RGB, 0
    yield "WEBP animation", encode_frames("WEBP", RGB, lossless=True), RGB, 0
    yield "TIFF of two pages", encode_frames("TIFF", RGB), RGB, 0
    yield "TIFF deflate", encode(RGB, "TIFF", compression="tiff_adobe_deflate"), RGB, 0
    big_endian = image_from_bytes("I;16B", DEEP.astype(">u2"))
    yield "TIFF I;16B", encode(big_endian, "TIFF"), repeat_grey(deep), 0
    yield "TIFF F in [0, 1]", encode(unit, "TIFF"), repeat_grey(np.rint(unit * 255)), 0
    yield "PFM in [0, 1]", encode(unit, "PPM"), repeat_grey(np.rint(unit * 255)), 0
    yield "TIFF CMYK", encode(image_from_bytes("CMYK", CMYK), "TIFF"), CMYK_RGB, 1
    yield "TIFF LAB", encode(lab_patches(), "TIFF"), LAB_RGB, 2
    yield "1 x 1", encode(RGB[:1, :1], "PNG"), RGB[:1, :1], 0
    long = RNG.integers(0, 256, (1, 20_000, 3), dtype=np.uint8)
    yield "1 x 20000", encode(long, "PNG"), long, 0
    yield "20000 x 1", encode(long.swapaxes(0, 1), "PNG"), long.swapaxes(0, 1), 0

    yield "JPEG", encode(PATCHES, "JPEG", subsampling=0), PATCHES, 6
    yield "JPEG L", encode(PATCHES[..., 0], "JPEG"), repeat_grey(PATCHES[..., 0]), 6
    yield (
        "JPEG progressive",
        encode(PATCHES, "JPEG", subsampling=0, progressive=True),
        PATCHES,
        6,
    )
    cmyk = Image.fromarray(PATCHES).convert("CMYK")
    yield "JPEG CMYK", encode(cmyk, "JPEG", subsampling=0), PATCHES, 6
    yield (
        "JPEG broken EXIF",
        encode(PATCHES, "JPEG", subsampling=0, exif=b"Exif\0\0rub"),
        PATCHES,
        6,
    )
    yield "MPO", encode_frames("MPO", PATCHES, subsampling=0), PATCHES, 6
    yield "AVIF", encode(PATCHES, "AVIF", subsampling="4:4:4"), PATCHES, 6
    grey = repeat_grey(PATCHES[..., 0])
    yield "WEBP lossy", encode(grey, "WEBP"), grey, 6

    upright = upright_by_orientation(PATCHES)
    for orientation, expected in upright.items():
        data = exif_orientation(orientation)
        yield (
            f"JPEG EXIF {orientation}",
            encode(PATCHES, "JPEG", subsampling=0, exif=data),
            expected,
            6,
        )
    for format in ("PNG", "WEBP"):
        for broken in (b"rubbish!", b"II*\0"):
            data = encode(RGB, format, exif=b"Exif\0\0" + broken, lossless=True)
            yield f"{format} EXIF {broken!r}", data, RGB, 0
    for format in ("PNG", "TIFF", "WEBP", "AVIF"):
        options = {"WEBP": {"lossless": True}, "AVIF": {"subsampling": "4:4:4"}}
        data = encode(
            PATCHES, format, exif=exif_orientation(6), **options.get(format, {})
        )
        yield f"{format} EXIF 6", data, upright[6], 6 if format == "AVIF" else 0
    yield (
        "undefined EXIF orientation",
        encode(PATCHES, "PNG", exif=exif_orientation(77)),
        PATCHES,
        0,
    )


def png_with_late_exif() -> bytes:
    data = exif_orientation(3).removeprefix(b"Exif\0\0")
    return build_png(5, 6, 8, 2, png_rows(RGB), png_chunk(b"eXIf", data))


CORPUS = {name: rest for name, *rest in corpus()}


@pytest.mark.parametrize("form", ["bytes", "path", "PIL"])
@pytest.mark.parametrize("name", CORPUS)
def test_file_of_every_format(name: str, form: str, tmp_path: Path) -> None:
    data, expected, tolerance = CORPUS[name]
    path = tmp_path / "image"  # no extension: the format is detected from the content
    path.write_bytes(data)
    if form == "PIL":
        with Image.open(path) as image:
            result = decode_pixels(image)
    else:
        result = decode_pixels(data if form == "bytes" else path)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result.astype(float), expected, rtol=0, atol=tolerance)


HSV = np.uint8([[[85, 255, 200], [0, 128, 255]]])
HSV_RGB = [[np.multiply(255, colorsys.hsv_to_rgb(*(v / 255))) for v in HSV[0]]]
PREMULTIPLIED = np.uint8([[[100, 0, 0, 128], [0, 0, 0, 0]]])


@pytest.mark.parametrize(
    ("image", "expected", "tolerance"),
    [
        (image_from_bytes("YCbCr", YCC), np.clip(YCC_RGB, 0, 255), 1),
        (image_from_bytes("HSV", HSV), np.array(HSV_RGB), 3),
        (Image.merge("La", [Image.new("L", (1, 1), 50)] * 2), [[[255] * 3]], 1),
        (image_from_bytes("RGBa", PREMULTIPLIED), [[[227, 127, 127], [255] * 3]], 1),
        (palette_image().convert("PA"), COLOURS[GREY], 0),
        (Image.fromarray(RGB).convert("RGBX"), RGB, 0),
        (Image.fromarray(DEEP.astype(np.int32)).convert("I;16L"), None, 0),
    ],
    ids=["YCbCr", "HSV", "La", "RGBa", "PA", "RGBX", "I;16L"],
)
def test_mode_without_file_format(
    image: Image.Image, expected: np.ndarray | None, tolerance: int
) -> None:
    if expected is None:
        expected = repeat_grey(np.rint(DEEP / 65535 * 255))
    result = decode_pixels(image).astype(float)
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


def test_image_without_pixels_raises() -> None:
    with pytest.raises(ValueError, match=r"X\[4\] \(Image\) has no pixels"):
        decode(Image.new("RGB", (0, 5)), index=4, pixel_range="auto")


def test_unsupported_mode_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sktl._images.decode._CONVERTIBLE_MODES", ("L",))
    with pytest.raises(ValueError, match=r"X\[0\] .*mode 'CMYK'.*Convert it"):
        decode_pixels(Image.new("CMYK", (2, 2)))


# Explicit pixel range


def test_pixel_range_applies_to_deep_images_only() -> None:
    twelve_bits = DEEP >> 4
    expected = repeat_grey(np.rint(twelve_bits / 4095 * 255))
    for image in (
        encode(twelve_bits, "PNG"),
        encode(twelve_bits.astype(np.int32), "TIFF"),
        encode(twelve_bits.astype(np.float32), "TIFF"),
        Image.fromarray(twelve_bits.astype(np.int32)),
        b"P5 5 6 65535\n" + twelve_bits.astype(">u2").tobytes(),
    ):
        np.testing.assert_array_equal(decode_pixels(image, 0, (0, 4095)), expected)
    for image in (encode(RGB, "PNG"), Image.fromarray(RGB)):
        np.testing.assert_array_equal(decode_pixels(image, 0, (0, 4095)), RGB)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            DEEP.astype(np.int32),
            r"32-bit integers .* from \d+ to \d+\. Set pixel_range",
        ),
        (DEEP.astype(np.float32), r"floats from .* \(mode 'F'\).* Set pixel_range"),
        (np.float32([[0, -0.1]]), r"floats from -0\.1 to 0"),
        (np.float32([[0, np.nan]]), "NaN or infinity"),
        (np.float32([[0, np.inf]]), "NaN or infinity"),
    ],
    ids=["I", "F", "F below 0", "NaN", "inf"],
)
def test_unknown_black_and_white_raises(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=rf"X\[7\] \(bytes\) .*{message}"):
        decode_pixels(encode(values, "TIFF"), 7)


# Invalid files


def test_warning_as_error_raises() -> None:
    # One IFD entry, whose 400 bytes of text lie beyond the end.
    entry = struct.pack("<HHIIHHII", 0x10E, 2, 400, 99999, 0x112, 3, 1, 6)
    data = b"Exif\0\0II*\0\x08\0\0\0\2\0" + entry + bytes(4)
    with pytest.raises(ValueError, match=r"Cannot read image X\[0\] \(bytes\)"):
        decode_pixels(encode(RGB, "PNG", exif=data))


def check_raises(image: object, reason: str) -> None:
    name = os.fsdecode(image) if not isinstance(image, bytes) else "bytes"
    with pytest.raises(ValueError, match=reason) as caught:
        decode_pixels(image, 3)
    message = str(caught.value)
    assert message.startswith("Cannot read image X[3] (")
    assert repr(name).strip("'") in message
    message.encode("utf-8")  # can be printed


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"]
)
def test_truncated_file_raises(format: str, tmp_path: Path) -> None:
    data = encode(PATCHES, format)
    path = tmp_path / "cut.png"
    path.write_bytes(data[: len(data) // 2])
    check_raises(path, "Cannot read image .+: .+ Replace or remove it")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"just text\n", "it is damaged, or its format is not one of JPEG, PNG"),
        (b"\0" * 5000, "it is damaged, or its format is not one of"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "it is damaged, or its format is not one of",
        ),
        (b"%PDF-1.4\n", "it is damaged, or its format is not one of"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "its format is EPS, which is not supported",
        ),
        (encode(RGB, "ICO"), "its format is ICO, which is not one of the formats that"),
    ],
    ids=["empty", "text", "zeros", "SVG", "PDF", "EPS", "ICO"],
)
def test_file_that_is_not_an_image_raises(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    check_raises(path, reason)
    check_raises(content, reason)


def test_path_to_no_regular_file_raises(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    check_raises(tmp_path, "that of a regular file. Got a directory")
    check_raises(tmp_path / "pipe", "that of a regular file. Got a pipe")
    check_raises("/dev/zero", "that of a regular file. Got a pipe or a device")
    check_raises(tmp_path / "loop", "Too many levels of symbolic links")
    check_raises(tmp_path / "dangling", "No such file or directory")
    check_raises(str(tmp_path / "missing.png"), "No such file or directory")
    check_raises(str(tmp_path / ("long" * 999)), "File name too long")
    check_raises("nul\0byte", "embedded null byte")


def test_missing_relative_path_names_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    start = f"a relative path starts from '{tmp_path}'"
    check_raises("no/1.jpg", f"No such file or directory; {start}. Replace or remove")
    check_raises(Path("1.jpg"), start)
    check_raises("file/1.jpg", f"Not a directory; {start}")
    check_raises("~/1.jpg", start + ", and '~' is not expanded: use os.path.expanduser")
    check_raises(tmp_path / "1.jpg", "No such file or directory. Replace or remove")
    Path("deleted").mkdir()
    monkeypatch.chdir("deleted")
    (tmp_path / "deleted").rmdir()
    check_raises("1.jpg", "starts from the working directory, which was deleted")


def test_unreadable_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(RGB, "PNG"))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read any file
    try:
        check_raises(path, "Permission denied")
    finally:
        os.seteuid(user)


@pytest.mark.skipif(sys.platform != "linux", reason="names must be UTF-8 elsewhere")
def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    check_raises(name, "No such file")
    Path(name).write_bytes(encode(RGB, "PNG"))
    np.testing.assert_array_equal(decode_pixels(name), RGB)
    np.testing.assert_array_equal(decode_pixels(Path(name)), RGB)


@pytest.mark.parametrize("side", [10_000, 20_000, 100_000])
def test_decompression_bomb_raises(side: int) -> None:
    # Warnings are errors here, including that of Pillow below 180 million pixels.
    check_raises(
        build_png(side, side, 8, 2, png_rows(RGB)),
        rf"it has {side} x {side} pixels; files of more than max_image_pixels="
        rf"{MAX_PIXELS} are not decoded.*set max_image_pixels={side**2}, or",
    )


@pytest.mark.parametrize("pillow_limit", [None, 10**12])
def test_size_limit_is_independent_of_pillow(
    pillow_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    check_raises(
        build_png(MAX_PIXELS + 1, 1, 1, 0, png_rows(RGB)),
        f"than max_image_pixels={MAX_PIXELS}",
    )
    data = build_png(MAX_PIXELS, 1, 1, 0, png_rows(RGB))
    check_raises(
        data, "Cannot read image .* Replace or remove it"
    )  # opened, but truncated


def test_memory_error_is_not_reraised_as_value_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Image.Image, "load", lambda self: (_ for _ in ()).throw(MemoryError)
    )
    with pytest.raises(MemoryError) as caught:
        decode_pixels(Image.new("RGB", (2, 2)), 5)
    assert caught.value.__notes__ == ["While decoding image X[5] (Image)."]


FUZZ = """
import random, sys
from pathlib import Path
from sktl._images.decode import decode
draw = random.Random(0)
outcomes = {}
for path in map(Path, sys.argv[2:]):
    whole = path.read_bytes()
    for trial in range(int(sys.argv[1])):
        data = bytearray(whole)
        if trial % 4 == 0:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(trial % 4):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            result = decode(bytes(data), index=0, pixel_range="auto").mode
        except ValueError:
            result = "ValueError"
        outcomes[path.name, result] = outcomes.get((path.name, result), 0) + 1
print(outcomes)
assert {result for _, result in outcomes} == {"RGB", "ValueError"}
"""


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files_do_not_crash_the_process(n: int, tmp_path: Path) -> None:
    paths = []
    for name in (
        "PNG P",
        "JPEG",
        "GIF P",
        "WEBP",
        "TIFF deflate",
        "TIFF RGB",
        "TIFF I;16B",
        "PNG 48-bit RGB",
        "BMP RGB",
    ):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(CORPUS[name][0])
    command = [sys.executable, "-W", "ignore", "-c", FUZZ, str(n), *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


# PIL images and arrays


def test_pil_image_is_not_modified() -> None:
    image = palette_image(transparency=bytes(range(256)))
    before = image.mode, image.tobytes(), image.palette.tobytes(), dict(image.info)
    decode_pixels(image)
    after = image.mode, image.tobytes(), image.palette.tobytes(), dict(image.info)
    assert after == before
    plain = Image.fromarray(RGB)
    decode(plain, index=0, pixel_range="auto").putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(plain), RGB)


def test_array_is_not_modified() -> None:
    for array in (RGB.copy(), GREY.copy(), np.dstack([RGB, ALPHA])):
        before = array.copy()
        image = decode(array, index=0, pixel_range="auto")
        image.putpixel((0, 0), (1, 2, 3))
        np.testing.assert_array_equal(array, before)


def test_closed_image_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(RGB, "PNG"))
    for load in (False, True):
        image = Image.open(path)
        if load:
            image.load()
        image.close()
        with pytest.raises(
            ValueError, match=r"Cannot read image X\[2\] \(PngImageFile\)"
        ):
            decode_pixels(image, 2)


def test_current_frame_is_decoded() -> None:
    image = Image.open(io.BytesIO(CORPUS["GIF animation"][0]))
    image.seek(1)
    np.testing.assert_array_equal(decode_pixels(image), repeat_grey(255 - GREY))


def test_threads_share_an_image_not_yet_loaded(tmp_path: Path) -> None:
    large = RNG.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(encode(large, "PNG"))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            image = Image.open(path)
            for result in pool.map(decode_pixels, [image] * 8):
                np.testing.assert_array_equal(result, large)


def test_rgb_file_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("copy", "convert", "transpose"):
        monkeypatch.delattr(Image.Image, method)
    assert decode_pixels(CORPUS["JPEG"][0]).shape == PATCHES.shape


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc of Linux")
def test_disk_error_names_the_index() -> None:
    with pytest.raises(ValueError, match=r"X\[1\] \('/proc/self/mem'\).*[Ii]nput/outp"):
        decode("/proc/self/mem", index=1, pixel_range="auto")


@pytest.mark.parametrize(
    ("min_decode_size", "size"),
    [(None, (1200, 800)), (801, (1200, 800)), (400, (600, 400)), (100, (150, 100))],
)
def test_min_decode_size_of_jpeg_files(tmp_path, min_decode_size, size):
    photograph = Image.fromarray(load_sample_images().images[0]).resize((1200, 800))
    photograph.save(path := tmp_path / "large.jpg", quality=95)
    photograph.save(png := tmp_path / "large.png")
    options = {"index": 0, "pixel_range": "auto", "min_decode_size": min_decode_size}
    got = decode(path, **options)
    assert got.size == size
    expected = np.asarray(photograph.resize(size, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(got) - expected).mean() < 3
    assert decode(png, **options).size == (1200, 800)
