"""Random damage of files: bytes, JSON, pickle opcodes, and chunks with checksums."""

import json
import pickletools
import struct
import zlib
from itertools import pairwise

EXTREMES = [0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63)]
# Values of unexpected types.
STRANGE = [
    *EXTREMES,
    10**30,
    None,
    True,
    0.5,
    float("nan"),
    float("inf"),
    -0.0,
    "",
    "x",
    "F16",
    "F64",
    "\ud800\0",
    "ä" * 300,
    [],
    {},
    [[[1]]],
    {"pairs": [[[], 1]]},
]
NESTED = 3000  # exceeds the recursion limit


def refused(error, named):
    """Check that an error names the file, and return the outcome of the case."""
    if str(named) not in str(error):
        raise AssertionError(f"{named} is not named in: {error}") from error
    return f"refused: {type(error).__name__}"


def damage_bytes(rng, content, others=()):
    """Apply one to four mutations to the bytes of a file."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        rng.choice(_ON_BYTES)(rng, data, others)
    return bytes(data)


def _place(rng, data):
    # Half of the time at the beginning, which contains the header.
    stop = len(data) if rng.random() < 0.5 else min(len(data), 200)
    return rng.randrange(stop) if stop else 0


def _flip(rng, data, others):
    if data:
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _overwrite(rng, data, others):
    at = _place(rng, data)
    n = rng.randrange(1, 9)
    data[at : at + n] = rng.choice([bytes(n), b"\xff" * n, rng.randbytes(n)])


def _truncate(rng, data, others):
    del data[_place(rng, data) :]


def _insert(rng, data, others):
    at = _place(rng, data)
    data[at:at] = rng.randbytes(rng.choice([1, 2, 8, 100]))


def _delete(rng, data, others):
    at = _place(rng, data)
    del data[at : at + rng.choice([1, 2, 8, 100])]


def _repeat(rng, data, others):
    at = _place(rng, data)
    block = data[at : at + rng.choice([1, 4, 32, 256])]
    data[at:at] = block * rng.choice([1, 2, 16, 100])


def _splice(rng, data, others):
    other = rng.choice(others) if others else data
    data[_place(rng, data) :] = other[_place(rng, other) :]


def _exchange(rng, data, others):
    first, second = _place(rng, data), _place(rng, data)
    n = rng.choice([1, 8, 64])
    block = data[first : first + n]
    data[first : first + n] = data[second : second + n]
    data[second : second + n] = block


def _extreme(rng, data, others):
    at, size = _place(rng, data), rng.choice([1, 2, 4, 8])
    value = rng.choice(EXTREMES) % 256**size
    data[at : at + size] = value.to_bytes(size, rng.choice(["little", "big"]))


def _grow(rng, data, others):
    data.extend(rng.choice([b"\0", bytes(5000), rng.randbytes(64)]))


_ON_BYTES = [
    *[_flip, _overwrite, _extreme] * 2,
    _truncate,
    _insert,
    _delete,
    _repeat,
    _splice,
    _exchange,
    _grow,
]


def damage_value(rng, value):
    """Remove, replace, copy or rename one value of a JSON document."""
    places = list(_places(value))
    if not places:
        return rng.choice(STRANGE)
    holder, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, at = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[at])) if at in _keys(other) else None
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(["x", "", *map(str, holder)])] = holder.pop(key)
    elif kind == 3 and isinstance(holder[key], int | float):
        changed = rng.choice([holder[key] + 1, -holder[key], holder[key] * 2**20])
        holder[key] = changed
    else:
        holder[key] = rng.choice(STRANGE)
    return value


def _keys(holder):
    return range(len(holder)) if isinstance(holder, list) else list(holder)


def _places(value):
    if isinstance(value, dict | list):
        for key in _keys(value):
            yield value, key
            yield from _places(value[key])


def damage_text(rng, text):
    """Damage a JSON document: its structure, or its text."""
    kind = rng.random()
    value = _parsed(text)
    if kind < 0.8 and value is not None:
        return json.dumps(damage_value(rng, value))
    if kind < 0.9 or not text:
        return damage_bytes(rng, text.encode()).decode("utf-8", "replace")
    at = rng.randrange(len(text))
    long = ["[" * NESTED, '{"a":' * NESTED, "1" * 5000, "1e999", "NaN", '"\\ud800"']
    return text[:at] + rng.choice(long) + text[at + rng.randrange(20) :]


def _parsed(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # already damaged


def damage_header(rng, content):
    """Damage the JSON header of a safetensors file, and update its length."""
    (length,) = struct.unpack("<Q", content[:8])
    header = damage_text(rng, content[8 : 8 + length].decode())
    encoded = header.encode("utf-8", "replace")
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]


def damage_png(rng, content):
    """Damage the chunks of a PNG, and update their checksums."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 8 : at + 8 + length]
        chunks.append([content[at + 4 : at + 8], body])
        at += 12 + length
    chunk = rng.choice(chunks)
    if chunk[0] == b"IDAT" and rng.random() < 0.7:  # damage the compressed data
        chunk[1] = zlib.compress(damage_bytes(rng, zlib.decompress(chunk[1])))
    else:
        chunk[1] = damage_bytes(rng, chunk[1])
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    return content[:8] + b"".join(
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def damage_opcodes(rng, code, strange):
    """Exchange, repeat or remove opcodes of a pickle, or insert some of `strange`."""
    starts = [at for _, _, at in pickletools.genops(code)]
    parts = [code[a:b] for a, b in pairwise([*starts, len(code)])]
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(1, len(parts))
        kind = rng.randrange(6)
        if kind == 0:
            del parts[at : at + rng.choice([1, 1, 5])]
        elif kind == 1:
            parts[at:at] = parts[at : at + 4] * rng.choice([1, 2, 50])
        elif kind == 2:
            other = rng.randrange(1, len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts[at] = rng.choice(strange)
        elif kind == 4:
            parts.insert(at, rng.choice(strange))
        else:
            numbers = [i for i, p in enumerate(parts) if p[:1] in b"KMJ\x8a"]
            if numbers:
                parts[rng.choice(numbers)] = _number(rng.choice(EXTREMES))
    return b"".join(parts)


def _number(value):
    body = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + body  # LONG1
