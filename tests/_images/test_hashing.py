"""Content hashes are equal for equal content, and for no other."""

import hashlib
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sktl._images import hashing
from sktl._images.hashing import content_hash, content_hashes, decode_and_hash


def hash_of(image, pixel_range="auto"):
    return content_hash(image, index=0, pixel_range=pixel_range)


def test_hash_of_a_file_is_that_of_its_bytes(paths, tmp_path):
    content = Path(paths[0]).read_bytes()
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes(content)
    assert hash_of(paths[0]) == hash_of(copy) == hash_of(content)
    assert hash_of(paths[0]) == hashlib.sha256(content).digest()
    assert len({hash_of(path) for path in paths}) == len(paths)


def test_hashes_of_files_are_cached(paths, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 2**62)  # long after it was written
    before = content_hashes(paths[:3], range(3), pixel_range="auto")
    monkeypatch.setattr(hashing, "open_regular_file", None)  # opening any file fails
    assert [hash_of(path) for path in paths[:3]] == before
    assert content_hashes(map(Path, paths[:3]), range(3), pixel_range="auto") == before


@pytest.mark.parametrize("replace", [True, False], ids=["replaced", "in place"])
def test_changed_file_of_same_size_and_time_has_another_hash(tmp_path, replace):
    file = tmp_path / "a.bin"
    file.write_bytes(b"0" * 100)
    os.utime(file, ns=(10**18, 10**18))
    seen = {hash_of(file)}
    for digit in b"123456789":
        if replace:
            file.unlink()
        file.write_bytes(bytes([digit]) * 100)
        os.utime(file, ns=(10**18, 10**18))
        seen.add(hash_of(file))
    assert len(seen) == 10


def test_hash_of_a_new_file_is_not_cached(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"new")
    hash_of(file)
    assert str(file) not in hashing._hash_cache


def test_relative_paths_follow_the_working_directory(tmp_path, monkeypatch):
    hashes = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        (tmp_path / name / "a.bin").write_text(name)
        os.utime("a.bin", (0, 0))
        hashes.add(hash_of("a.bin"))
    assert len(hashes) == 2


def test_parent_of_a_link_is_that_of_its_target(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 2**62)  # long after it was written
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "folder")
    (tmp_path / "a.bin").write_text("near")
    (tmp_path / "far" / "a.bin").write_text("far")
    for up in ("link/..", tmp_path / "link" / ".."):
        file = os.path.join(up, "a.bin")
        for _ in range(2):
            assert hash_of(tmp_path / "a.bin") == hash_of("a.bin")
            assert (
                hash_of(file) == hash_of(Path(file)) == hashlib.sha256(b"far").digest()
            )


def test_hash_of_an_array_depends_on_dtype_and_shape():
    arrays = [
        np.zeros((4, 6), np.uint8),
        np.zeros((6, 4), np.uint8),
        np.zeros((4, 6, 1), np.uint8),
        np.zeros((2, 6), np.uint16),
        np.zeros((4, 6), np.float32),
        np.ones((4, 6), np.uint8),
    ]
    assert len({hash_of(array) for array in arrays}) == len(arrays)


def test_hash_of_an_array_does_not_depend_on_strides(images):
    array = images[0]
    same = [array, np.asfortranarray(array), torch.from_numpy(array)]
    assert len({hash_of(image) for image in same}) == 1
    assert hash_of(array) != hash_of(array[::-1])


def test_hash_of_a_pil_image_is_that_of_its_rgb_pixels(images):
    image = Image.fromarray(images[0])
    assert hash_of(image) == hash_of(images[0])
    rotated = image.copy()
    rotated.getexif()[0x0112] = 3  # rotated by 180 degrees
    assert hash_of(rotated) == hash_of(images[0][::-1, ::-1])
    transparent = image.convert("RGBA")
    transparent.putalpha(0)
    assert hash_of(transparent) == hash_of(np.full_like(images[0], 255))


def test_hash_is_that_of_the_decoded_content(paths, images, tmp_path):
    file = tmp_path / "changes.png"
    file.write_bytes(Path(paths[0]).read_bytes())
    before = hash_of(file)
    file.write_bytes(Path(paths[1]).read_bytes())
    digest, image = decode_and_hash(str(file), index=0, pixel_range="auto")
    assert digest == hash_of(paths[1]) != before
    np.testing.assert_array_equal(np.asarray(image), images[1])
    for same in (images[1], Image.fromarray(images[1])):
        assert decode_and_hash(same, index=0, pixel_range="auto")[0] == hash_of(same)


def test_unreadable_file_is_named():
    with pytest.raises(ValueError, match=r"X\[0\] \('/no/such/file'\).*No such file"):
        hash_of("/no/such/file")
    buffer = io.BytesIO()
    Image.new("L", (3, 3)).save(buffer, "PNG")
    with pytest.raises(ValueError, match=r"X\[5\] \(bytes\)"):
        decode_and_hash(buffer.getvalue()[:30], index=5, pixel_range="auto")
