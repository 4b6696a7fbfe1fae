"""Fuzzing of image files and weights files, for `fuzz.py`."""

import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from mutations import (
    damage_bytes,
    damage_header,
    damage_opcodes,
    damage_png,
    refused,
)
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared_fixtures import TinyNet

from sktl import PretrainedFeatures
from sktl._backbones.stages import describe_network, find_head
from sktl._backbones.unwrap import fill_missing_head, select_state_dict
from sktl._backbones.weights import load_weights, load_weights_into
from sktl._images.validation import validate_images
from sktl._utils.tensor_file import state_dict_digest


class ImageFiles:
    """Image files of all formats, as a row of X."""

    def __init__(self, folder):
        self.path = folder / "input" / "image"
        self.seeds = [file for _, file in sorted(image_files().items())]
        self.estimator = PretrainedFeatures("resnet_mini")

    def case(self, rng):
        """Damage one file, and decode it."""
        content = rng.choice(self.seeds)
        if content[:4] == b"\x89PNG" and rng.random() < 0.5:
            content = damage_png(rng, content)
        else:
            content = damage_bytes(rng, content, self.seeds)
        self.path.write_bytes(content)
        X = [rng.choice([str(self.path), content or str(self.path)])]
        pixel_range = rng.choice(["auto", "auto", (0, 4095)])
        images = validate_images(
            X, estimator=self.estimator, reset=True, pixel_range=pixel_range
        ).with_min_decode_size(rng.choice([None, 4]))
        try:
            image = images.decode_and_hash(0)[1] if rng.random() < 0.5 else images[0]
        except ValueError as error:
            named = "X[0] (bytes)" if X == [content] else f"X[0] ({X[0]!r})"
            return refused(error, named)
        assert image.mode == "RGB"
        assert np.asarray(image).shape == (*image.size[::-1], 3)
        return "read"


def image_files():
    """Return one small file of each format and mode, by name."""
    color = np.random.default_rng(0).integers(0, 256, (11, 14, 3), np.uint8)
    rgb = Image.fromarray(np.kron(color, np.ones((2, 2, 1), np.uint8)))
    grey, alpha = rgb.convert("L"), Image.fromarray(np.asarray(rgb)[:, :, 0])
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette, bilevel, cmyk = rgb.quantize(64), grey.convert("1"), rgb.convert("CMYK")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    rotated[0x010E] = "a description"
    return {
        "JPEG": _file(rgb, "JPEG"),
        "JPEG grey, rotated": _file(grey, "JPEG", exif=rotated),
        "JPEG CMYK": _file(cmyk, "JPEG"),
        "JPEG progressive": _file(rgb, "JPEG", progressive=True, exif=rotated),
        "MPO": _file(rgb, "MPO", **_animated(rgb)),
        "PNG": _file(rgb, "PNG", exif=rotated),
        "PNG animated": _file(rgb, "PNG", **_animated(rgb)),
        "PNG transparent": _file(rgba, "PNG", icc_profile=b"profile" * 9),
        "PNG palette": _file(palette, "PNG", transparency=bytes(range(64))),
        "PNG bilevel": _file(bilevel, "PNG", transparency=0),
        "PNG 16 bit": _file(deep, "PNG", transparency=257),
        "GIF": _file(palette, "GIF", transparency=3),
        "GIF animated": _file(rgb, "GIF", **_animated(rgb)),
        "WEBP": _file(rgb, "WEBP", exif=rotated),
        "WEBP lossless": _file(rgba, "WEBP", lossless=True),
        "WEBP animated": _file(rgb, "WEBP", **_animated(rgb)),
        "TIFF": _file(rgb, "TIFF", **_animated(rgb)),
        "TIFF deflate": _file(deep, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF LZW": _file(palette, "TIFF", compression="tiff_lzw"),
        "TIFF JPEG": _file(rgb, "TIFF", compression="jpeg", exif=rotated),
        "TIFF bilevel": _file(bilevel, "TIFF", compression="group4"),
        "TIFF CMYK": _file(cmyk, "TIFF"),
        "TIFF floats": _file(floats, "TIFF"),
        "BMP": _file(rgb, "BMP"),
        "BMP palette": _file(palette, "BMP"),
        "PPM": _file(rgb, "PPM"),
        "PGM 16 bit": _file(deep, "PPM"),
        "AVIF": _file(rgba, "AVIF"),
        "AVIF animated": _file(rgb, "AVIF", **_animated(rgb)),
    }


def _animated(image):
    # New images each time: Pillow stores in an image how it was written.
    more = [image.rotate(90), image.rotate(180)]
    return {"save_all": True, "append_images": more}


def _file(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Attack:
    """Object whose pickle creates a folder when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):  # noqa: D105
        return os.mkdir, (str(self.path),)


class WeightsFiles:
    """Weights files in safetensors and in both formats of torch."""

    def __init__(self, folder):
        self.folder = folder / "input"
        self.canary = folder / "executed"
        torch.manual_seed(0)
        self.network = TinyNet()
        state = self.network.state_dict()
        training = {"state_dict": state, "epoch": 3, "lr": 0.1, "args": {"a": [1]}}
        files = [_torch_file(value) for value in (state, training)]
        self.codes = [_members(file)["archive/data.pkl"] for file in files]
        legacy = [_torch_file(value, zipped=False) for value in (state, training)]
        self.pth = [*files, *legacy]
        self.safetensors = [safetensors.torch.save(state)]
        self.strange = strange_opcodes(self.canary)

    def case(self, rng):
        """Damage one file, read it, and load it into a network."""
        suffix, content = self._damage(rng)
        path = self.folder / f"weights{suffix}"
        path.write_bytes(content)
        try:
            weights = load_weights(path)
        except ValueError as error:
            outcome = refused(error, path)
        else:
            outcome = self._load(weights.state_dicts)
        assert not self.canary.exists(), "The file was executed."
        path.unlink()
        return f"{suffix} {outcome}"

    def _load(self, found):
        network = TinyNet()
        head = find_head(network, describe_network(network))
        try:
            chosen = select_state_dict(found, network, head, lambda _, each: each, "It")
            fill_missing_head(chosen.state_dict, network, chosen.missing_head)
            load_weights_into(network, chosen.state_dict, "It")
        except ValueError as error:
            outcome = refused(error, "Weights must have the names and shapes")
            return f"read; as weights of another network, {outcome}"
        state_dict_digest(network.state_dict())
        return "read"

    def _damage(self, rng):
        if rng.random() < 0.3:
            content = self.safetensors[0]
            if rng.random() < 0.6:
                return ".safetensors", damage_header(rng, content)
            return ".safetensors", damage_bytes(rng, content, self.pth)
        suffix = rng.choice([".pth", ".pt"])
        if rng.random() < 0.4:
            return suffix, damage_bytes(rng, rng.choice(self.pth), self.pth)
        # With valid checksums of the zip file: other opcodes, records, or data.
        index = rng.randrange(2)
        members = _members(self.pth[index])
        if rng.random() < 0.9:
            code = damage_opcodes(rng, self.codes[index], self.strange)
            members["archive/data.pkl"] = code
            if rng.random() < 0.2:
                return suffix, _legacy(code)
        else:
            name = rng.choice(sorted(members))
            members[name] = damage_bytes(rng, members[name])
        return suffix, _zip(members, rng.choice([0, 0, 8]))


def _torch_file(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(members, compression):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _legacy(code):
    """Return a file in the legacy format of torch, which contains a pickle."""
    before = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(each, 2) for each in before) + code


def strange_opcodes(canary):
    """Return parts of pickles: function calls, nesting, and single opcodes."""
    attack = pickle.dumps(Attack(canary), 2)[2:-1]
    argument = b"X" + struct.pack("<I", len(str(canary))) + str(canary).encode()
    names = [
        "os system",
        "posix mkdir",
        "builtins eval",
        "builtins getattr",
        "builtins exec",
        "subprocess Popen",
        "torch load",
        "torch.serialization load",
        "torch FloatStorage",
        "torch FloatTensor",
        "torch.storage UntypedStorage",
        "torch.storage TypedStorage",
        "torch Tensor",
        "torch Size",
        "torch.sparse FloatTensor",
        "torch._tensor _rebuild_from_type_v2",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_parameter_with_state",
        "torch._utils _rebuild_qtensor",
        "torch._utils _rebuild_sparse_tensor",
        "torch._utils _rebuild_nested_tensor",
        "torch._utils _rebuild_meta_tensor_no_storage",
        "torch._utils _rebuild_device_tensor_from_numpy",
        "torch._utils _rebuild_wrapper_subclass",
        "torch.nn.parameter Parameter",
        "torch.serialization _get_layout",
        "builtins bytearray",
        "builtins set",
        "builtins complex",
        "collections OrderedDict",
        "collections Counter",
        "_codecs encode",
        "torch float32",
        "torch qint8",
        "numpy._core.multiarray _reconstruct",
    ]
    calls = [b"c" + name.replace(" ", "\n").encode() + b"\n" for name in names]
    large = b"\x8a\x06\0\0\0\0\0\x10"  # 2**44
    arguments = [b")", argument + b"\x85", large + b"\x85", b"K\x07\x85", large * 2]
    arguments += [b"K\x01K\x02\x86", large + large + b"\x86", b"(K\x01K\x02K\x03t"]
    called = [
        f + a + ends for f in calls for a in arguments for ends in (b"R", b"\x81")
    ]
    build = [b"}X\x05\0\0\0itemsK\x01sb", b"}X\x03\0\0\0getK\x01sb", b"K\x01b", b"}b"]
    build += [b"}X\x09\0\0\0_metadataK\x01sb", b"}X\x02\0\0\0toK\x01sb"]
    nested = [b")" + b"\x85" * n for n in (100, 3000, 200_000)]
    nested += [b"})" + b"\x85" * n + b"K\x01s" for n in (100, 3000, 200_000)]
    nested += [b"]" * 3000 + b"a" * 2999]
    single = [bytes([op]) for op in b"(.0123abdegijlopqrstu)}]NR\x81\x85\x86\x87\x88Q"]
    single += [
        b"B\xff\xff\xff\x7f",
        b"T\xff\xff\xff\x7f",
        b"X\xff\xff\xff\xff",
        b"P1\n",
    ]
    single += [
        b"h\x00",
        b"q\x00",
        b"j\xff\xff\xff\xff",
        b"r\xff\xff\xff\x7f",
        b"2" * 99,
    ]
    rest = [attack, *calls, *build, *nested, *single]
    return rest * 3 + called
