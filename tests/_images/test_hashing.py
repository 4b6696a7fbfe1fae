"""Keys: equal for equal content, and for no other."""

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


def key(image, pixel_range="auto"):
    return content_hash(image, row=0, pixel_range=pixel_range)


def test_a_file_is_known_by_its_bytes(paths, tmp_path):
    content = Path(paths[0]).read_bytes()
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes(content)
    assert key(paths[0]) == key(copy) == key(content)
    assert key(paths[0]) == hashlib.sha256(content).digest()
    assert len({key(path) for path in paths}) == len(paths)


def test_a_file_is_hashed_once(paths, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 2**62)  # long after it was written
    before = content_hashes(paths[:3], range(3), pixel_range="auto")
    monkeypatch.setattr(hashing, "open_regular", None)  # it cannot be opened any more
    assert [key(path) for path in paths[:3]] == before
    assert content_hashes(map(Path, paths[:3]), range(3), pixel_range="auto") == before


@pytest.mark.parametrize("replace", [True, False], ids=["replaced", "in place"])
def test_c8_a_file_with_the_same_size_and_time_is_another_one(tmp_path, replace):
    file = tmp_path / "a.bin"
    file.write_bytes(b"0" * 100)
    os.utime(file, ns=(10**18, 10**18))
    seen = {key(file)}
    for digit in b"123456789":
        if replace:
            file.unlink()
        file.write_bytes(bytes([digit]) * 100)
        os.utime(file, ns=(10**18, 10**18))
        seen.add(key(file))
    assert len(seen) == 10


def test_a_file_just_written_is_not_remembered(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"young")
    key(file)
    assert str(file) not in hashing._remembered


def test_relative_paths_follow_the_working_directory(tmp_path, monkeypatch):
    keys = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        (tmp_path / name / "a.bin").write_text(name)
        os.utime("a.bin", (0, 0))
        keys.add(key("a.bin"))
    assert len(keys) == 2


def test_dots_after_a_link_lead_where_the_link_leads(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 2**62)  # long after it was written
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "folder")
    (tmp_path / "a.bin").write_text("near")
    (tmp_path / "far" / "a.bin").write_text("far")
    for up in ("link/..", tmp_path / "link" / ".."):
        file = os.path.join(up, "a.bin")
        for _ in range(2):
            assert key(tmp_path / "a.bin") == key("a.bin")
            assert key(file) == key(Path(file)) == hashlib.sha256(b"far").digest()


def test_pixels_dtype_and_shape_make_an_array():
    zeros = [
        np.zeros((4, 6), np.uint8),
        np.zeros((6, 4), np.uint8),
        np.zeros((4, 6, 1), np.uint8),
        np.zeros((2, 6), np.uint16),
        np.zeros((4, 6), np.float32),
        np.ones((4, 6), np.uint8),
    ]
    assert len({key(array) for array in zeros}) == len(zeros)


def test_strides_do_not_make_another_array(images):
    array = images[0]
    same = [array, np.asfortranarray(array), torch.from_numpy(array), array.tolist()]
    assert len({key(image) for image in same[:3]}) == 1
    assert key(array) != key(array[::-1])


def test_a_pil_image_is_known_by_what_becomes_of_it(images):
    image = Image.fromarray(images[0])
    assert key(image) == key(images[0])
    turned = image.copy()
    turned.getexif()[0x0112] = 3  # upside down
    assert key(turned) == key(images[0][::-1, ::-1])
    see_through = image.convert("RGBA")
    see_through.putalpha(0)
    assert key(see_through) == key(np.full_like(images[0], 255))


def test_the_key_is_of_what_was_decoded(paths, images, tmp_path):
    file = tmp_path / "changes.png"
    file.write_bytes(Path(paths[0]).read_bytes())
    before = key(file)
    file.write_bytes(Path(paths[1]).read_bytes())
    now, image = decode_and_hash(str(file), row=0, pixel_range="auto")
    assert now == key(paths[1]) != before
    np.testing.assert_array_equal(np.asarray(image), images[1])
    for same in (images[1], Image.fromarray(images[1])):
        assert decode_and_hash(same, row=0, pixel_range="auto")[0] == key(same)


def test_a_bad_file_is_named():
    with pytest.raises(ValueError, match=r"X\[0\] \('/no/such/file'\).*No such file"):
        key("/no/such/file")
    buffer = io.BytesIO()
    Image.new("L", (3, 3)).save(buffer, "PNG")
    with pytest.raises(ValueError, match=r"X\[5\] \(bytes\)"):
        decode_and_hash(buffer.getvalue()[:30], row=5, pixel_range="auto")
