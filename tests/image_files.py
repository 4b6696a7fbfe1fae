"""Image files of any bit depth and layout, written without the library."""

import io
import struct
import zlib

import numpy as np
import tifffile

from sktl._images.decode import decode

SHAPE = (37, 21)  # neither whole bytes of few bits nor whole tiles


def write_tiff(
    values: np.ndarray, byteorder: str, *, bigtiff: bool = False, **options: object
) -> bytes:
    if options.get("planarconfig") == "separate":
        values = np.moveaxis(values, -1, 0)
    with tifffile.TiffWriter(
        buffer := io.BytesIO(), byteorder=byteorder, bigtiff=bigtiff
    ) as writer:
        values = values.astype(values.dtype.newbyteorder(byteorder))
        writer.write(values, metadata=None, **options)
    return buffer.getvalue()


def upright_by_orientation(pixels: np.ndarray) -> dict[int, np.ndarray]:
    """Return the upright image for each value of tag 274.

    The tag defines the sides of the image that the first stored row and the first
    stored column are.
    """
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: pixels.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(pixels, 1),
    }


LAYOUTS = {
    "strips": {"rowsperstrip": 5},
    "deflate": {"compression": "zlib", "predictor": False},
    "predictor": {"compression": "zlib", "predictor": True},
    "tiles": {"tile": (16, 32)},
    "compressed tiles": {"tile": (16, 16), "compression": "zlib"},
}


def pack(values: np.ndarray, n_bits: int) -> bytes:
    """Pack values into rows of whole bytes, the highest bits first."""
    bits = values[..., np.newaxis] >> np.arange(n_bits)[::-1] & 1
    return np.packbits(bits.reshape(len(values), -1), axis=1).tobytes()


def build_tiff(
    values: np.ndarray,
    n_bits: int,
    photometric: int | None,
    *,
    byteorder: str = "<",
    fill_order: int = 1,
    orientation: int = 1,
    compress: bool = False,
) -> bytes:
    data = pack(values, n_bits)
    data = zlib.compress(data) if compress else data
    if fill_order == 2:
        data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    height, width = values.shape
    tags = {256: width, 257: height, 258: n_bits, 259: 8 if compress else 1}
    tags |= {} if photometric is None else {262: photometric}
    tags |= {266: fill_order, 273: 8, 274: orientation, 277: 1, 278: height}
    tags |= {279: len(data)}
    data += b"\0" * (len(data) % 2)
    directory = struct.pack(f"{byteorder}H", len(tags)) + b"".join(
        struct.pack(f"{byteorder}HHL", tag, 4, 1) + struct.pack(f"{byteorder}L", value)
        for tag, value in tags.items()
    )
    magic = b"II*\0" if byteorder == "<" else b"MM\0*"
    start = struct.pack(f"{byteorder}L", 8 + len(data))
    return magic + start + data + directory + bytes(4)


def build_png(values: np.ndarray, *chunks: tuple[bytes, bytes], depth: int) -> bytes:
    """Return a PNG of shape (height, width, channels), with the filter Sub."""
    height, width, channels = values.shape
    if depth == 16:
        rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
        step = 2 * channels
        rows[:, step:] -= rows[:, :-step].copy()
        data = b"".join(b"\1" + row.tobytes() for row in rows)
    else:
        packed = np.frombuffer(pack(values[..., 0], depth), np.uint8)
        data = b"".join(b"\0" + row.tobytes() for row in packed.reshape(height, -1))
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", header),
        *chunks,
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + crc
    return content


def build_netpbm(
    values: np.ndarray, maximum: int, *, plain: bool, comment: str = ""
) -> bytes:
    height, width, channels = values.shape
    magic = {(1, True): 2, (3, True): 3, (1, False): 5, (3, False): 6}[channels, plain]
    header = f"P{magic}\n# a comment\n{width} {height}\n{maximum}\n".encode()
    if plain:
        text = "\n".join(" ".join(map(str, row.ravel())) for row in values)
        return header + text.replace("\n", f" {comment}\n", 1).encode() + b"\n"
    return header + values.astype(">u2" if maximum > 255 else "u1").tobytes()


def on_white(values: np.ndarray) -> np.ndarray:
    """Return the colors of (height, width, channels), from 0 to 1, on white."""
    if values.shape[-1] % 2 == 0:
        values = values[..., :-1] * values[..., -1:] + 1 - values[..., -1:]
    return np.broadcast_to(values * 255, (*values.shape[:2], 3))


def integers(end: int, *channels: int) -> np.ndarray:
    """Return the same integers below a limit in each call."""
    return np.random.default_rng(0).integers(0, end, SHAPE + channels)


def random_values(dtype: str, *channels: int) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return np.random.default_rng(0).random(SHAPE + channels).astype(dtype)
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(
        limits.min, limits.max, SHAPE + channels, dtype, endpoint=True
    )


def decode_pixels(
    image: object, pixel_range: object = "auto", warn: object = None
) -> np.ndarray:
    result = decode(image, index=3, pixel_range=pixel_range, warn=warn)
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)
