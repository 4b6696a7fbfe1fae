"""Each kind of image against pixels computed by hand; each bad one refused."""

import colorsys
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.datasets import load_sample_images

from sktl._images.decode import MAX_PIXELS, decode, to_uint8

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 5), dtype=np.uint16)
BITS = GREY > 127
COLOURS = RNG.integers(0, 256, (256, 3), dtype=np.uint8)

# Four patches, no two alike: turned and mirrored it is eight different images. Each
# is whole blocks of a JPEG, so that without chroma subsampling their colours are kept.
PATCHES = np.kron(
    np.array([[[200, 60, 60], [60, 180, 60]], [[60, 60, 200], [220, 220, 90]]]),
    np.ones((16, 32, 1)),
).astype(np.uint8)  # (32, 64, 3)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., np.newaxis], 3, axis=-1)


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., np.newaxis] / 255
    return np.rint(pixels * a + 255 * (1 - a)).astype(np.uint8)


def file(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def raw(mode: str, values: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (values.shape[1], values.shape[0]), values.tobytes())


def pixels(image: object, row: int = 0, pixel_range: object = "auto") -> np.ndarray:
    pil_image = decode(image, row=row, pixel_range=pixel_range)
    assert pil_image.mode == "RGB"
    return np.asarray(pil_image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )


def png(width: int, height: int, depth: int, colour: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *chunks, chunk(b"IEND", b""))
    )


def png_rows(values: np.ndarray) -> bytes:
    """Compressed rows, each with the filter byte 0."""
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return chunk(b"IDAT", zlib.compress(rows))


def palette_image(**info: object) -> Image.Image:
    image = Image.fromarray(GREY)
    image.putpalette(COLOURS.tobytes())
    image.info.update(info)
    return image


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def frames(format: str, first: np.ndarray, **options: object) -> bytes:
    others = [Image.fromarray(255 - first)]
    return file(first, format, save_all=True, append_images=others, **options)


def lab_patches() -> Image.Image:
    """White, middle grey and black: L* = 100, 50.2, 0."""
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
    """Name, file, pixels expected and how far off (of 255) they may be."""
    alpha = np.dstack([RGB, ALPHA])
    key = tuple(int(v) for v in RGB[0, 0])
    key_alpha = np.where((RGB == RGB[0, 0]).all(-1), 0, 255)
    grey_key = np.where(GREY == GREY[0, 0], 0, 255)
    deep = np.rint(DEEP / 65535 * 255)
    unit = RNG.random((6, 5), dtype=np.float32)

    for format in ("PNG", "BMP", "PPM", "TIFF"):
        yield f"{format} 1", file(Image.fromarray(BITS), format), three(BITS * 255), 0
        yield f"{format} L", file(GREY, format), three(GREY), 0
        yield f"{format} RGB", file(RGB, format), RGB, 0
    for format in ("PNG", "BMP", "TIFF", "GIF"):
        yield f"{format} P", file(palette_image(), format), COLOURS[GREY], 0
    for format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        yield (
            f"{format} RGBA",
            file(alpha, format, **options),
            over_white(RGB, ALPHA),
            1,
        )
    for format in ("PNG", "TIFF"):
        image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
        yield f"{format} LA", file(image, format), over_white(three(GREY), ALPHA), 1
        yield f"{format} I;16", file(DEEP, format), three(deep), 0

    yield (
        "PNG palette with alphas",
        file(palette_image(), "PNG", transparency=bytes(range(256))),
        over_white(COLOURS[GREY], GREY),
        1,
    )
    for format in ("PNG", "GIF"):
        yield (
            f"{format} transparent index",
            file(palette_image(), format, transparency=int(GREY[0, 0])),
            over_white(COLOURS[GREY], grey_key),
            0,
        )
    yield (
        "PNG grey tRNS",
        file(GREY, "PNG", transparency=int(GREY[0, 0])),
        over_white(three(GREY), grey_key),
        0,
    )
    yield (
        "PNG 1-bit tRNS",
        file(Image.fromarray(BITS), "PNG", transparency=0),
        np.full((6, 5, 3), 255),
        0,
    )
    yield (
        "PNG 16-bit tRNS",
        file(DEEP, "PNG", transparency=int(DEEP[0, 0])),
        three(np.where(DEEP == DEEP[0, 0], 255, deep)),
        0,
    )
    yield (
        "PNG RGB tRNS",
        file(RGB, "PNG", transparency=key),
        over_white(RGB, key_alpha),
        0,
    )
    wide = RNG.integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    yield (
        "PNG 48-bit RGB",
        png(5, 6, 16, 2, png_rows(wide.astype(">u2"))),
        np.rint(wide / 65535 * 255),
        1,
    )
    yield "PNG eXIf behind the pixels", png_with_late_exif(), RGB[::-1, ::-1], 0
    yield "APNG", frames("PNG", RGB), RGB, 0
    yield "GIF animation", frames("GIF", GREY), three(GREY), 0
    yield "WEBP", file(RGB, "WEBP", lossless=True), RGB, 0
    yield "WEBP animation", frames("WEBP", RGB, lossless=True), RGB, 0
    yield "TIFF of two pages", frames("TIFF", RGB), RGB, 0
    yield "TIFF deflate", file(RGB, "TIFF", compression="tiff_adobe_deflate"), RGB, 0
    big_endian = raw("I;16B", DEEP.astype(">u2"))
    yield "TIFF I;16B", file(big_endian, "TIFF"), three(deep), 0
    yield "TIFF F in [0, 1]", file(unit, "TIFF"), three(np.rint(unit * 255)), 0
    yield "PFM in [0, 1]", file(unit, "PPM"), three(np.rint(unit * 255)), 0
    yield "TIFF CMYK", file(raw("CMYK", CMYK), "TIFF"), CMYK_RGB, 1
    yield "TIFF LAB", file(lab_patches(), "TIFF"), LAB_RGB, 2
    yield "1 x 1", file(RGB[:1, :1], "PNG"), RGB[:1, :1], 0
    long = RNG.integers(0, 256, (1, 20_000, 3), dtype=np.uint8)
    yield "1 x 20000", file(long, "PNG"), long, 0
    yield "20000 x 1", file(long.swapaxes(0, 1), "PNG"), long.swapaxes(0, 1), 0

    yield "JPEG", file(PATCHES, "JPEG", subsampling=0), PATCHES, 6
    yield "JPEG L", file(PATCHES[..., 0], "JPEG"), three(PATCHES[..., 0]), 6
    yield (
        "JPEG progressive",
        file(PATCHES, "JPEG", subsampling=0, progressive=True),
        PATCHES,
        6,
    )
    cmyk = Image.fromarray(PATCHES).convert("CMYK")
    yield "JPEG CMYK", file(cmyk, "JPEG", subsampling=0), PATCHES, 6
    yield (
        "JPEG broken EXIF",
        file(PATCHES, "JPEG", subsampling=0, exif=b"Exif\0\0rub"),
        PATCHES,
        6,
    )
    yield "MPO", frames("MPO", PATCHES, subsampling=0), PATCHES, 6
    yield "AVIF", file(PATCHES, "AVIF", subsampling="4:4:4"), PATCHES, 6
    grey = three(PATCHES[..., 0])
    yield "WEBP lossy", file(grey, "WEBP"), grey, 6

    # What each orientation tag says is the top and the left of the stored pixels.
    upright = {
        1: PATCHES,
        2: PATCHES[:, ::-1],
        3: PATCHES[::-1, ::-1],
        4: PATCHES[::-1],
        5: PATCHES.swapaxes(0, 1),
        6: np.rot90(PATCHES, -1),
        7: PATCHES.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(PATCHES, 1),
    }
    for orientation, expected in upright.items():
        data = exif(orientation)
        yield (
            f"JPEG EXIF {orientation}",
            file(PATCHES, "JPEG", subsampling=0, exif=data),
            expected,
            6,
        )
    for format in ("PNG", "WEBP"):
        for broken in (b"rubbish!", b"II*\0"):
            data = file(RGB, format, exif=b"Exif\0\0" + broken, lossless=True)
            yield f"{format} EXIF {broken!r}", data, RGB, 0
    for format in ("PNG", "TIFF", "WEBP", "AVIF"):
        options = {"WEBP": {"lossless": True}, "AVIF": {"subsampling": "4:4:4"}}
        data = file(PATCHES, format, exif=exif(6), **options.get(format, {}))
        yield f"{format} EXIF 6", data, upright[6], 6 if format == "AVIF" else 0
    yield "EXIF of no meaning", file(PATCHES, "PNG", exif=exif(77)), PATCHES, 0


def png_with_late_exif() -> bytes:
    data = exif(3).removeprefix(b"Exif\0\0")
    return png(5, 6, 8, 2, png_rows(RGB), chunk(b"eXIf", data))


CORPUS = {name: rest for name, *rest in corpus()}


@pytest.mark.parametrize("form", ["bytes", "path", "PIL"])
@pytest.mark.parametrize("name", CORPUS)
def test_file_of_every_kind_gives_its_pixels(
    name: str, form: str, tmp_path: Path
) -> None:
    data, expected, tolerance = CORPUS[name]
    path = tmp_path / "image"  # no extension: the content says what it is
    path.write_bytes(data)
    if form == "PIL":
        with Image.open(path) as image:
            result = pixels(image)
    else:
        result = pixels(data if form == "bytes" else path)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result.astype(float), expected, rtol=0, atol=tolerance)


HSV = np.uint8([[[85, 255, 200], [0, 128, 255]]])
HSV_RGB = [[np.multiply(255, colorsys.hsv_to_rgb(*(v / 255))) for v in HSV[0]]]
PREMULTIPLIED = np.uint8([[[100, 0, 0, 128], [0, 0, 0, 0]]])


@pytest.mark.parametrize(
    ("image", "expected", "tolerance"),
    [
        (raw("YCbCr", YCC), np.clip(YCC_RGB, 0, 255), 1),
        (raw("HSV", HSV), np.array(HSV_RGB), 3),
        (Image.merge("La", [Image.new("L", (1, 1), 50)] * 2), [[[255] * 3]], 1),
        (raw("RGBa", PREMULTIPLIED), [[[227, 127, 127], [255] * 3]], 1),
        (palette_image().convert("PA"), COLOURS[GREY], 0),
        (Image.fromarray(RGB).convert("RGBX"), RGB, 0),
        (Image.fromarray(DEEP.astype(np.int32)).convert("I;16L"), None, 0),
    ],
    ids=["YCbCr", "HSV", "La", "RGBa", "PA", "RGBX", "I;16L"],
)
def test_mode_that_no_file_has(
    image: Image.Image, expected: np.ndarray | None, tolerance: int
) -> None:
    if expected is None:
        expected = three(np.rint(DEEP / 65535 * 255))
    result = pixels(image).astype(float)
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


def test_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"X\[4\] \(Image\) has no pixels"):
        decode(Image.new("RGB", (0, 5)), row=4, pixel_range="auto")


def test_mode_without_conversion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sktl._images.decode._CONVERTIBLE", ("L",))
    with pytest.raises(ValueError, match=r"X\[0\] .*mode 'CMYK'.*Convert it"):
        pixels(Image.new("CMYK", (2, 2)))


# Explicit ranges


def test_pixel_range_scales_deep_images_only() -> None:
    twelve_bits = DEEP >> 4
    expected = three(np.rint(twelve_bits / 4095 * 255))
    for image in (
        file(twelve_bits, "PNG"),
        file(twelve_bits.astype(np.int32), "TIFF"),
        file(twelve_bits.astype(np.float32), "TIFF"),
        Image.fromarray(twelve_bits.astype(np.int32)),
        b"P5 5 6 65535\n" + twelve_bits.astype(">u2").tobytes(),
    ):
        np.testing.assert_array_equal(pixels(image, 0, (0, 4095)), expected)
    for image in (file(RGB, "PNG"), Image.fromarray(RGB)):
        np.testing.assert_array_equal(pixels(image, 0, (0, 4095)), RGB)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            DEEP.astype(np.int32),
            r"32-bit integers .* from \d+ to \d+\. Set pixel_range",
        ),
        (DEEP.astype(np.float32), r"floats from .* \(mode 'F'\).* Set pixel_range"),
        (np.float32([[0, -0.1]]), r"floats from -0\.1 to 0"),
        (np.float32([[0, np.nan]]), "NaN or infinite"),
        (np.float32([[0, np.inf]]), "NaN or infinite"),
    ],
    ids=["I", "F", "F below 0", "NaN", "inf"],
)
def test_black_and_white_are_never_guessed(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=rf"X\[7\] \(bytes\) .*{message}"):
        pixels(file(values, "TIFF"), 7)


NUMBERS = st.sampled_from(
    [np.uint8, np.int8, np.uint16, np.int16, np.int64, np.float16, np.float32]
)


@given(
    NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, (2, 3), elements=None)), st.data()
)
def test_to_uint8_is_the_formula(values: np.ndarray, data: st.DataObject) -> None:
    values = np.nan_to_num(values)
    low = data.draw(st.integers(-300, 300))
    high = low + data.draw(st.integers(1, 70_000))
    expected = [
        [round((min(max(float(v), low), high) - low) / (high - low) * 255) for v in row]
        for row in values
    ]
    np.testing.assert_array_equal(to_uint8(values, (low, high)), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.int8([-128, 0, 127]), [0, 128, 255]),
        (np.uint16([0, 257, 65535]), [0, 1, 255]),
        (np.float32([0, 0.5, 1, 7]), [0, 128, 255, 255]),
        (np.array([False, True]), [0, 255]),
    ],
)
def test_automatic_range_is_of_the_dtype(values: np.ndarray, expected: list) -> None:
    assert to_uint8(values, "auto").tolist() == expected


def test_uint8_is_not_copied() -> None:
    assert to_uint8(RGB, "auto") is RGB


def test_scaling_a_large_image_needs_no_copies() -> None:
    values = np.zeros((1000, 1000), np.uint16)
    tracemalloc.start()
    try:
        to_uint8(values, "auto")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 1.1 * values.size * (8 + 1)  # a float64, and the result


# Files that are none


def test_warning_made_an_error_is_a_bad_image() -> None:
    # One IFD entry, whose 400 bytes of text lie beyond the end.
    entry = struct.pack("<HHIIHHII", 0x10E, 2, 400, 99999, 0x112, 3, 1, 6)
    data = b"Exif\0\0II*\0\x08\0\0\0\2\0" + entry + bytes(4)
    with pytest.raises(ValueError, match=r"X\[0\] \(bytes\) is not an image"):
        pixels(file(RGB, "PNG", exif=data))


def check_refused(image: object, reason: str) -> None:
    name = os.fsdecode(image) if not isinstance(image, bytes) else "bytes"
    with pytest.raises(ValueError, match=reason) as caught:
        pixels(image, 3)
    message = str(caught.value)
    assert message.startswith("X[3] (")
    assert repr(name).strip("'") in message
    message.encode("utf-8")  # can be printed


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"]
)
def test_truncated_file_is_refused(format: str, tmp_path: Path) -> None:
    data = file(PATCHES, format)
    path = tmp_path / "cut.png"
    path.write_bytes(data[: len(data) // 2])
    check_refused(path, "is not an image that can be read: .+ Replace or remove it")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"just text\n", "it is damaged, or none of JPEG, PNG"),
        (b"\0" * 5000, "it is damaged, or none of"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is damaged, or none of"),
        (b"%PDF-1.4\n", "it is damaged, or none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "or none of"),
        (file(RGB, "ICO"), "it is damaged, or none of"),
    ],
    ids=["empty", "text", "zeros", "SVG", "PDF", "EPS", "ICO"],
)
def test_what_is_no_image_is_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    check_refused(path, reason)
    check_refused(content, reason)


def test_path_to_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    check_refused(tmp_path, "regular file, this one leads to a directory")
    check_refused(tmp_path / "pipe", "regular file, this one leads to a pipe")
    check_refused("/dev/zero", "regular file, this one leads to a pipe or a device")
    check_refused(tmp_path / "loop", "Too many levels of symbolic links")
    check_refused(tmp_path / "dangling", "No such file or directory")
    check_refused(str(tmp_path / "missing.png"), "No such file or directory")
    check_refused(str(tmp_path / ("long" * 999)), "File name too long")
    check_refused("nul\0byte", "embedded null byte")


def test_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(file(RGB, "PNG"))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nothing is forbidden to root
    try:
        check_refused(path, "Permission denied")
    finally:
        os.seteuid(user)


@pytest.mark.skipif(sys.platform != "linux", reason="names must be UTF-8 elsewhere")
def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    check_refused(name, "No such file")
    Path(name).write_bytes(file(RGB, "PNG"))
    np.testing.assert_array_equal(pixels(name), RGB)
    np.testing.assert_array_equal(pixels(Path(name)), RGB)


@pytest.mark.parametrize("side", [10_000, 20_000, 100_000])
def test_decompression_bomb_is_refused(side: int) -> None:
    # Warnings are errors here, so below 180 million pixels Pillow's warning is refused.
    check_refused(png(side, side, 8, 2, png_rows(RGB)), "exceeds limit")


@pytest.mark.parametrize("pillow_limit", [None, 10**12])
def test_limit_is_our_own(
    pillow_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    check_refused(png(MAX_PIXELS + 1, 1, 1, 0, png_rows(RGB)), f"than {MAX_PIXELS}")
    data = png(MAX_PIXELS, 1, 1, 0, png_rows(RGB))
    check_refused(data, "is not an image that can be read")  # opened, but truncated


def test_lack_of_memory_is_not_blamed_on_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Image.Image, "load", lambda self: (_ for _ in ()).throw(MemoryError)
    )
    with pytest.raises(MemoryError) as caught:
        pixels(Image.new("RGB", (2, 2)), 5)
    assert caught.value.__notes__ == ["While decoding X[5] (Image)."]


FUZZ = """
import random, sys
from pathlib import Path
from sktl._images.decode import decode
draw = random.Random(0)
outcomes = {}
for path in map(Path, sys.argv[1:]):
    whole = path.read_bytes()
    for trial in range(1000):
        data = bytearray(whole)
        if trial % 4 == 0:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(trial % 4):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            result = decode(bytes(data), row=0, pixel_range="auto").mode
        except ValueError:
            result = "ValueError"
        outcomes[path.name, result] = outcomes.get((path.name, result), 0) + 1
print(outcomes)
assert {result for _, result in outcomes} == {"RGB", "ValueError"}
"""


def test_no_damaged_file_ends_the_process(tmp_path: Path) -> None:
    paths = []
    for name in (
        "PNG P",
        "JPEG",
        "GIF P",
        "WEBP",
        "TIFF deflate",
        "TIFF RGB",
        "BMP RGB",
    ):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(CORPUS[name][0])
    command = [sys.executable, "-W", "ignore", "-c", FUZZ, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


# Images that are PIL images already


def test_image_of_the_user_is_not_changed() -> None:
    image = palette_image(transparency=bytes(range(256)))
    before = image.mode, image.tobytes(), image.palette.tobytes(), dict(image.info)
    pixels(image)
    after = image.mode, image.tobytes(), image.palette.tobytes(), dict(image.info)
    assert after == before
    plain = Image.fromarray(RGB)
    decode(plain, row=0, pixel_range="auto").putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(plain), RGB)


def test_array_of_the_user_is_not_changed() -> None:
    for array in (RGB.copy(), GREY.copy(), np.dstack([RGB, ALPHA])):
        before = array.copy()
        image = decode(array, row=0, pixel_range="auto")
        image.putpixel((0, 0), (1, 2, 3))
        np.testing.assert_array_equal(array, before)


def test_closed_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(file(RGB, "PNG"))
    for load in (False, True):
        image = Image.open(path)
        if load:
            image.load()
        image.close()
        with pytest.raises(ValueError, match=r"X\[2\] \(PngImageFile\) is not a pic"):
            pixels(image, 2)


def test_image_stands_at_the_frame_the_user_chose() -> None:
    image = Image.open(io.BytesIO(CORPUS["GIF animation"][0]))
    image.seek(1)
    np.testing.assert_array_equal(pixels(image), three(255 - GREY))


def test_threads_may_share_one_image_not_yet_loaded(tmp_path: Path) -> None:
    large = RNG.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(file(large, "PNG"))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            image = Image.open(path)
            for result in pool.map(pixels, [image] * 8):
                np.testing.assert_array_equal(result, large)


def test_rgb_file_is_decoded_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("copy", "convert", "transpose"):
        monkeypatch.delattr(Image.Image, method)
    assert pixels(CORPUS["JPEG"][0]).shape == PATCHES.shape


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux' /proc")
def test_an_error_of_the_disk_names_the_row() -> None:
    with pytest.raises(ValueError, match=r"X\[1\] \('/proc/self/mem'\).*[Ii]nput/outp"):
        decode("/proc/self/mem", row=1, pixel_range="auto")


@pytest.mark.parametrize(
    ("min_decode_size", "size"),
    [(None, (1200, 800)), (801, (1200, 800)), (400, (600, 400)), (100, (150, 100))],
)
def test_large_jpeg_files_are_reduced_to_no_less_than_asked_for(
    tmp_path, min_decode_size, size
):
    photograph = Image.fromarray(load_sample_images().images[0]).resize((1200, 800))
    photograph.save(path := tmp_path / "large.jpg", quality=95)
    photograph.save(png := tmp_path / "large.png")
    options = {"row": 0, "pixel_range": "auto", "min_decode_size": min_decode_size}
    got = decode(path, **options)
    assert got.size == size
    expected = np.asarray(photograph.resize(size, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(got) - expected).mean() < 3
    assert decode(png, **options).size == (1200, 800)
