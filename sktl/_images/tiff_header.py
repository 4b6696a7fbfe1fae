"""Header of a TIFF file that Pillow cannot open: its tags, and changes of them.

Only numeric tags of the first directory are read, in the classic and the BigTIFF
format.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

WIDTH, HEIGHT, BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
ORIENTATION, SAMPLES_PER_PIXEL, PREDICTOR, TILE_WIDTH = 274, 277, 317, 322
SAMPLE_FORMAT = 339
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1
UNSIGNED, SIGNED, FLOAT = 1, 2, 3

_DEFAULTS = {
    BITS_PER_SAMPLE: 1,
    COMPRESSION: 1,
    PHOTOMETRIC: BLACK_IS_ZERO,  # a required tag; other readers refuse the file
    ORIENTATION: 1,
    SAMPLES_PER_PIXEL: 1,
    PREDICTOR: 1,
    SAMPLE_FORMAT: UNSIGNED,
}
_TYPES = {3: "H", 4: "L"}  # SHORT and LONG
_LONG = 4
_INTERPRETATIONS = {
    WHITE_IS_ZERO: "white-is-zero",
    BLACK_IS_ZERO: "black-is-zero",
    2: "RGB",
    3: "palette",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELAB",
}
_SAMPLE_FORMATS = {
    UNSIGNED: "unsigned integers",
    SIGNED: "signed integers",
    FLOAT: "floats",
}


@dataclass(frozen=True)
class _Entry:
    """Position of a tag in the file, and its first value."""

    position: int
    value: int


class TiffHeader:
    """Numeric tags of the first directory of a TIFF file.

    Parameters
    ----------
    content : bytes
        Content of the file.

    Raises
    ------
    ValueError
        If it is not a TIFF file, or its directory is damaged.
    """

    def __init__(self, content: bytes) -> None:
        order = {b"II": "<", b"MM": ">"}.get(content[:2])
        if order is None:
            raise ValueError("it is not a TIFF file")
        self.byteorder = order
        self._content = content
        try:
            self._entries = self._read_entries()
        except (struct.error, OverflowError) as error:
            raise ValueError("the directory of the TIFF file is damaged") from error

    def _read_entries(self) -> dict[int, _Entry]:
        order, content = self.byteorder, self._content
        (version,) = struct.unpack_from(f"{order}H", content, 2)
        self._is_big = version == 43
        if self._is_big:
            offset, count, self._format, inline = f"{order}Q", "Q", f"{order}HHQ", 8
            (start,) = struct.unpack_from(offset, content, 8)
        else:
            offset, count, self._format, inline = f"{order}L", "H", f"{order}HHL", 4
            (start,) = struct.unpack_from(offset, content, 4)
        (n_entries,) = struct.unpack_from(order + count, content, start)
        start += struct.calcsize(order + count)
        size = struct.calcsize(self._format)
        entries = {}
        for index in range(n_entries):
            position = start + index * (size + inline)
            tag, type_, n_values = struct.unpack_from(self._format, content, position)
            if type_ in _TYPES:
                value_format = order + _TYPES[type_]
                value_position = position + size
                if n_values * struct.calcsize(value_format) > inline:
                    (value_position,) = struct.unpack_from(
                        offset, content, value_position
                    )
                (value,) = struct.unpack_from(value_format, content, value_position)
                entries[tag] = _Entry(position, value)
        return entries

    def __contains__(self, tag: int) -> bool:
        """Return whether a tag is present."""
        return tag in self._entries

    def __getitem__(self, tag: int) -> int:
        """Return the first value of a tag, or its default."""
        return self._entries[tag].value if tag in self._entries else _DEFAULTS[tag]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as stored."""
        return self[WIDTH], self[HEIGHT]

    def describe(self) -> str:
        """Return the number of bits, the type and the interpretation of the values."""
        format, interpretation = self[SAMPLE_FORMAT], self[PHOTOMETRIC]
        order = "little" if self.byteorder == "<" else "big"
        return (
            f"{self[SAMPLES_PER_PIXEL]} x {self[BITS_PER_SAMPLE]} bits per pixel "
            f"({_SAMPLE_FORMATS.get(format, f'sample format {format}')}, "
            "photometric interpretation "
            f"{_INTERPRETATIONS.get(interpretation, interpretation)}, {order}-endian"
            f"{' BigTIFF' if self._is_big else ''})"
        )

    def replace(self, values: Mapping[int, int]) -> bytes:
        """Return the content of the file with other values of some tags.

        Parameters
        ----------
        values : mapping of int to int
            New values by tag. Tags that are not present are ignored.

        Returns
        -------
        bytes
        """
        content = bytearray(self._content)
        for tag, value in values.items():
            if tag in self._entries:
                position = self._entries[tag].position
                struct.pack_into(self._format, content, position, tag, _LONG, 1)
                position += struct.calcsize(self._format)
                struct.pack_into(f"{self.byteorder}L", content, position, value)
        return bytes(content)
