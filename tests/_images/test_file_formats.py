"""Formats and sizes of image files: what is decoded, what is refused, and why."""

import io
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
from mean_color import STACK, MeanColor
from PIL import BmpImagePlugin, IcoImagePlugin, Image
from sklearn.base import clone

from sktl import FineTunedCNNClassifier, PretrainedClassifier, PretrainedFeatures
from sktl._images.decode import decode
from sktl._images.file_formats import EXCLUDED_FORMATS, FileOptions, _has_single_scan
from sktl._images.sequence import ImageSequence

RGB = STACK[0]
EACH_ESTIMATOR = pytest.mark.parametrize(
    "estimator",
    [PretrainedFeatures(), PretrainedClassifier(), FineTunedCNNClassifier()],
    ids=lambda estimator: type(estimator).__name__,
)


def encode(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


def decode_pixels(image: object, **options: object) -> np.ndarray:
    file_options = FileOptions(**options)
    return np.asarray(
        decode(image, index=3, pixel_range="auto", file_options=file_options)
    )


# Extra formats

LOSSLESS = {
    "JPEG2000": ".jp2",
    "TGA": ".tga",
    "PCX": ".pcx",
    "SGI": ".sgi",
    "QOI": ".qoi",
    "DDS": ".dds",
    "ICO": ".ico",
}


@pytest.mark.parametrize("format", LOSSLESS)
def test_extra_format_is_decoded_and_named_without_it(format, tmp_path):
    pixels = np.kron(RGB[:5, :5], np.ones((16, 16, 1), np.uint8))  # (80, 80, 3)
    options = {"ICO": {"sizes": [(80, 80)]}}.get(format, {})
    path = tmp_path / f"a{LOSSLESS[format]}"
    path.write_bytes(encode(pixels, format, **options))
    for image in (path, path.read_bytes()):
        got = decode_pixels(image, extra_formats=(format,))
        np.testing.assert_array_equal(got, pixels)
    for image in (path, path.read_bytes()):
        with pytest.raises(ValueError, match=rf"X\[3\] .*format is {format}") as caught:
            decode_pixels(image)
        message = str(caught.value)
        assert f"Set extra_formats=('{format}',), or open it with PIL.Image" in message
        assert "damaged" not in message


def test_pixels_of_a_refused_file_are_not_decoded(monkeypatch):
    def fail(self):
        raise AssertionError("The pixels were decoded.")

    content = encode(np.zeros((16, 16, 3), np.uint8), "ICO", sizes=[(16, 16)])
    monkeypatch.setattr(IcoImagePlugin.IcoImageFile, "load", fail)
    with pytest.raises(ValueError, match="its format is ICO"):
        decode_pixels(content)


def test_first_bytes_of_default_formats_have_priority(tmp_path):
    # TGA has no characteristic first bytes: its plugin reads the header of any file.
    path = tmp_path / "a.tga"
    path.write_bytes(encode(RGB, "PNG"))
    np.testing.assert_array_equal(decode_pixels(path, extra_formats=("TGA",)), RGB)


@pytest.mark.parametrize("start", [b"no image", b"\0\0\1\0", b"8BPS", b"/* C */"])
def test_damaged_file_with_the_extension_of_another_format(start, tmp_path):
    path = tmp_path / "a.tga"
    path.write_bytes(start + b" at all, whatever its name says")
    with pytest.raises(ValueError, match="it is damaged, or its format is not one of"):
        decode_pixels(path)


@pytest.mark.parametrize(
    ("content", "format", "advice"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF", "register_heif_opener()"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "HEIF", "install pillow-heif"),
        (b"\xff\x0a\xfa\x7f\x01\x90\x08\x06", "JXL", "import pillow_jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14", "JXL", "install pillow-jxl-plugin"),
    ],
)
def test_format_that_requires_a_plugin(content, format, advice):
    with pytest.raises(ValueError, match=f"its format is {format}") as caught:
        decode_pixels(content + bytes(200))
    assert advice in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_damaged_avif_file_is_not_called_heif():
    content = b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiafMA1B" + bytes(200)
    with pytest.raises(ValueError, match="Cannot read image") as caught:
        decode_pixels(content)
    assert "HEIF" not in str(caught.value)


@pytest.fixture
def toy_plugin(monkeypatch):
    """Register a plugin with Pillow: a BMP file with other first bytes."""
    Image.init()

    def open_toy(file, filename):
        return BmpImagePlugin.BmpImageFile(io.BytesIO(b"BM" + file.read()[2:]))

    opener = (open_toy, lambda prefix: prefix.startswith(b"TY"))
    monkeypatch.setitem(Image.OPEN, "TOY", opener)
    monkeypatch.setattr(Image, "ID", [*Image.ID, "TOY"])
    return b"TY" + encode(RGB, "BMP")[2:]


def test_format_of_a_registered_plugin(toy_plugin):
    mine = PretrainedFeatures(extra_formats=["toy"])
    options = FileOptions.from_estimator(mine)
    assert options.extra_formats == ("TOY",)
    got = decode_pixels(toy_plugin, extra_formats=options.extra_formats)
    np.testing.assert_array_equal(got, RGB)
    with pytest.raises(ValueError, match=r"format is TOY.*extra_formats=\('TOY',\)"):
        decode_pixels(toy_plugin)


def test_plugin_that_is_not_registered_in_a_worker(toy_plugin, monkeypatch):
    images = ImageSequence(
        [toy_plugin], "auto", file_options=FileOptions(extra_formats=("TOY",))
    )
    in_worker = pickle.loads(pickle.dumps(images.subset([0]).portable()))
    np.testing.assert_array_equal(np.asarray(in_worker[0]), RGB)
    monkeypatch.delitem(Image.OPEN, "TOY")
    monkeypatch.setattr(Image, "ID", Image.ID[:-1])
    with pytest.raises(ValueError, match=r"X\[0\].*'TOY', which is not registered"):
        in_worker[0]


@EACH_ESTIMATOR
@pytest.mark.parametrize("name", EXCLUDED_FORMATS)
def test_excluded_format_raises(estimator, name):
    mine = clone(estimator).set_params(extra_formats=("TGA", name.lower()))
    with pytest.raises(ValueError, match=f"must not contain '{name}', because") as got:
        mine.fit([RGB, RGB], [0, 1])
    assert f"parameter of {type(mine).__name__}" in str(got.value)


@pytest.mark.parametrize("name", ["HEIF", "JPEG 2000", ""])
def test_unknown_format_raises(name):
    mine = PretrainedFeatures(extra_formats=[name])
    with pytest.raises(ValueError, match=r"that Pillow can open: .*JPEG2000.*TGA") as e:
        mine.transform([RGB])
    assert f"Got {name!r}. Other formats require a plugin" in str(e.value)
    assert "pillow_heif.register_heif_opener()" in str(e.value)


def test_name_that_is_no_string_raises():
    with pytest.raises(ValueError, match=r"must contain names of formats.*Got \[3\]"):
        FileOptions.from_estimator(PretrainedFeatures(extra_formats=[3]))


def test_default_format_may_be_repeated():
    mine = PretrainedFeatures(extra_formats=("png", "TGA", "tga"))
    assert FileOptions.from_estimator(mine) == FileOptions(extra_formats=("TGA",))


def test_no_program_is_started(monkeypatch, tmp_path):
    def start(*args, **options):
        raise AssertionError(f"starts {args}")

    monkeypatch.setattr(subprocess, "Popen", start)
    path = tmp_path / "a.eps"
    Image.fromarray(RGB).save(path)
    others = tuple(Image.OPEN.keys() - EXCLUDED_FORMATS.keys())
    for extra_formats in ((), others):
        with pytest.raises(ValueError, match=r"its format is EPS.* Ghostscript"):
            decode_pixels(path, extra_formats=extra_formats)


# Number of pixels


def jpeg(**options: object) -> bytes:
    return encode(np.zeros((60, 80, 3), np.uint8), "JPEG", **options)


def decode_reduced(content: bytes, **options: object) -> Image.Image:
    return decode(
        content,
        index=0,
        pixel_range="auto",
        min_decode_size=10,
        file_options=FileOptions(**options),
    )


def test_limit_counts_the_pixels_at_reduced_size():
    assert decode_reduced(jpeg(), max_pixels=20 * 15).size == (20, 15)
    with pytest.raises(ValueError, match=r"80 x 60 pixels, decoded as 20 x 15; .*=299"):
        decode_reduced(jpeg(), max_pixels=299)


@pytest.mark.parametrize(
    "content", [jpeg(progressive=True), encode(RGB.repeat(20, 0), "PNG")]
)
def test_limit_counts_all_pixels_of_other_files(content):
    size = Image.open(io.BytesIO(content)).size
    n_pixels = size[0] * size[1]
    assert decode_reduced(content, max_pixels=n_pixels).mode == "RGB"
    with pytest.raises(ValueError, match=rf"set max_image_pixels={n_pixels}"):
        decode_reduced(content, max_pixels=n_pixels - 1)


def test_message_names_size_limit_and_remedies():
    for content, gap in ((jpeg(), True), (encode(RGB, "PNG"), False)):
        with pytest.raises(ValueError, match=r"X\[3\].*max_image_pixels=29") as caught:
            decode_pixels(content, max_pixels=29)
        assert ("set reducing_gap=2" in str(caught.value)) == gap
        assert "Pillow and pass the PIL image." in str(caught.value)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


FRAME = b"\x08\0\x08\0\x08\3" + bytes(9)  # 8 bits, 8 x 8 pixels, 3 components


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (segment(0xC0, FRAME) + segment(0xDA, b"\3" + bytes(9)), True),
        (b"\xff\xff" + segment(0xC1, FRAME) + segment(0xDA, b"\3" + bytes(9)), True),
        (segment(0xC0, FRAME) + segment(0xDA, b"\1" + bytes(5)), False),
        (segment(0xC2, FRAME) + segment(0xDA, b"\3" + bytes(9)), False),
        (segment(0xDA, b"\3" + bytes(9)), False),
        (segment(0xC0, FRAME[:4]) + segment(0xDA, b"\3" + bytes(9)), False),
        (segment(0xC0, FRAME) + b"rubbish", False),
        (segment(0xC0, FRAME) + b"\xff\xda\xff\xff\3", False),
        (segment(0xC0, FRAME) + b"\xff\xda\0\0", False),
        (b"", False),
    ],
)
def test_has_single_scan(segments, expected):
    assert _has_single_scan(io.BytesIO(b"\xff\xd8" + segments)) is expected


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [10, None])
def test_limit_of_pillow_has_no_effect(limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP"):
        assert decode_pixels(encode(RGB, format)).shape == RGB.shape
        with pytest.raises(ValueError, match="max_image_pixels=29 are not decoded"):
            decode_pixels(encode(RGB, format), max_pixels=29)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["RGB", "P", "1"])
def test_limit_of_pillow_has_no_effect_on_tiff_files(mode, compression, monkeypatch):
    image = Image.fromarray(RGB).quantize() if mode == "P" else Image.fromarray(RGB)
    image = image.convert(mode)
    content = encode(image, "TIFF", compression=compression, tiffinfo={274: 6})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    expected = np.rot90(np.asarray(image.convert("RGB")), -1)
    np.testing.assert_array_equal(decode_pixels(content), expected)


def test_limit_that_a_plugin_of_pillow_checks_is_named(monkeypatch):
    content = encode(RGB, "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"exceeds limit.*PIL\.Image\.MAX_IMAGE_PIX"):
        decode_pixels(content)


# Estimators


@EACH_ESTIMATOR
def test_options_of_an_estimator(estimator):
    mine = clone(estimator).set_params(
        max_image_pixels=np.int64(10**9), extra_formats=["tga"]
    )
    copy = pickle.loads(pickle.dumps(clone(mine)))
    options = FileOptions.from_estimator(copy)
    assert options == FileOptions(10**9, ("TGA",))
    assert type(options.max_pixels) is int


@pytest.mark.parametrize("form", ["path", "bytes"])
@pytest.mark.parametrize("name", ["tiny", "projection", "fine-tuned"])
def test_parameters_of_each_estimator(name, form, paths, tmp_path):
    mine = {
        "tiny": PretrainedFeatures("tiny", engine="torch"),
        "projection": PretrainedClassifier("projection", engine="torch"),
        "fine-tuned": FineTunedCNNClassifier("tiny", max_epochs=0, engine="torch"),
    }[name]
    y = np.arange(len(paths)) % 2
    mine.fit(paths, y)
    output = mine.transform if name == "tiny" else mine.predict_proba
    pixels = np.asarray(Image.open(paths[0]).convert("RGB"))
    path = tmp_path / "a.tga"
    Image.fromarray(pixels).save(path)
    X = [path if form == "path" else path.read_bytes()]
    with pytest.raises(ValueError, match=r"Cannot read image X\[0\]"):
        output(X)
    mine.set_params(extra_formats=("TGA",), max_image_pixels=pixels[..., 0].size)
    np.testing.assert_array_equal(output(X), output([pixels]))
    mine.set_params(max_image_pixels=pixels[..., 0].size - 1)
    with pytest.raises(ValueError, match=r"X\[0\].* are not decoded"):
        output(X)
    np.testing.assert_array_equal(output([Image.open(path)]), output([pixels]))


def test_parameters_are_saved_and_loaded(paths, tmp_path):
    mine = FineTunedCNNClassifier(
        "tiny",
        max_epochs=0,
        engine="torch",
        max_image_pixels=10**9,
        extra_formats=["TGA", "JPEG2000"],
    ).fit(paths, np.arange(len(paths)) % 2)
    mine.save(tmp_path / "model")
    loaded = FineTunedCNNClassifier.load(tmp_path / "model")
    assert FileOptions.from_estimator(loaded) == FileOptions.from_estimator(mine)


def test_cached_rows_do_not_depend_on_the_options(tmp_path, monkeypatch):
    path = tmp_path / "a.tga"
    Image.fromarray(np.kron(RGB, np.ones((4, 4, 1), np.uint8))).save(path)
    mine = PretrainedFeatures("tiny", memory=tmp_path / "store", engine="torch")
    mine.set_params(extra_formats=("TGA",), max_image_pixels=10_000)
    row = mine.transform([path])
    monkeypatch.setattr(Image, "OPEN", {})  # the image cannot be decoded again
    others = clone(mine).set_params(extra_formats=(), max_image_pixels=1000)
    np.testing.assert_array_equal(others.transform([path]), row)


def test_validation_passes_the_options(tmp_path):
    path: Path = tmp_path / "a.tga"
    Image.fromarray(RGB).save(path)
    with pytest.raises(ValueError, match="its format is TGA"):
        MeanColor().validate([path])[0]
