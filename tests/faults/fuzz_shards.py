"""What `fuzz.py` damages: the shards of a store."""

import os
import shutil

import numpy as np
import safetensors.numpy
from mutations import bytes_damaged, header_damaged, text_damaged

from sktl import FeatureStore
from sktl._store import feature_store
from sktl._store.shard_index import ShardIndex

SPACE = {"backbone": "tiny", "layer": "stage1"}


class Shards:
    """A store of a few shards, read for the first time or again."""

    def __init__(self, folder):
        os.fsync = lambda descriptor: None  # slow, and of no effect on what is read
        self.folder = folder / "input" / "store"
        rng = np.random.default_rng(0)
        keys = [rng.bytes(32) for _ in range(24)]
        self.rows = {key: rng.random(3, np.float32) for key in keys}
        parts = [keys[:8], keys[8:16], keys[14:20]]  # and four that are not there
        self.others = self._made(folder / "made", {"backbone": "other"}, parts)
        self.files = self._made(folder / "made", SPACE, parts)

    def _made(self, folder, space, parts):
        """Give the files of a store with a shard for each part, by relative path."""
        store = FeatureStore(folder)
        for part in parts:
            store.put(space, part, np.stack([self.rows[key] for key in part]))
        files = {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        shutil.rmtree(folder)
        return files

    def case(self, rng):
        """Damage one or two files of a store, and use it."""
        feature_store._indexes.clear()
        for path, content in self.files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content)
        store = FeatureStore(self.folder)
        if rng.random() < 0.3:  # known, when it changes
            self._get(rng, store)
        for _ in range(rng.choice([1, 1, 2])):
            self._damage(rng)
        for _ in range(rng.randrange(4)):
            rng.choice([self._get, self._put, self._info, self._verify])(rng, store)
        known = self._get(rng, store, list(self.rows))
        store.verify()  # tells what was not read
        self._put(rng, store)  # what was lost is computed again, and then there
        assert self._get(rng, store, list(self.rows)) == len(self.rows)
        assert store.verify()["corrupt"] == 0
        shutil.rmtree(self.folder)
        return f"{known:2} rows read, all of them right"

    def _get(self, rng, store, keys=None):
        if keys is None:
            keys = rng.choices(list(self.rows), k=rng.randrange(1, 30))
        positions, rows = store.get(SPACE, keys)
        expected = [self.rows[keys[position]] for position in positions]
        if expected:
            np.testing.assert_array_equal(rows, np.stack(expected), strict=True)
        return len(expected)

    def _put(self, rng, store):
        store.put(SPACE, list(self.rows), np.stack(list(self.rows.values())))

    def _info(self, rng, store):
        assert store.info()["rows"] <= 2 * len(self.rows)

    def _verify(self, rng, store):
        assert store.verify()["rows"] <= 2 * len(self.rows)

    def _damage(self, rng):
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        shards = [path for path in files if path.suffix == ".safetensors"]
        if not shards:
            return
        path = rng.choice(shards)
        content = path.read_bytes()
        others = [each for each in self.others.values() if len(each) > 200]
        kind = rng.randrange(10)
        if kind < 3:
            path.write_bytes(bytes_damaged(rng, content, others))
        elif kind < 5:
            path.write_bytes(self._header_damaged(rng, content))
        elif kind == 5:
            path.write_bytes(self._exchanged(rng, content, path.parent))
        elif kind == 6:
            path.rename(path.with_name(self._name(rng)))
        elif kind == 7:  # of another space, or another shard
            other = rng.choice([*others, rng.choice(shards).read_bytes()])
            rng.choice([path, path.with_name(self._name(rng))]).write_bytes(other)
        elif kind == 8:
            self._no_file(rng, path)
        else:
            path = rng.choice([files[0], *self.folder.rglob("space.json")])
            content = path.read_bytes()
            if path.name == "space.json" and rng.random() < 0.7:
                content = text_damaged(rng, content.decode("utf-8", "replace"))
                path.write_text(content, errors="replace")
            else:
                path.write_bytes(bytes_damaged(rng, content))

    def _name(self, rng):
        moment = rng.choice([0, 1, 10**19, 10**20 - 1])
        name = f"{moment:020d}-{rng.randbytes(6).hex()}.safetensors"
        return rng.choice([name, name, name[1:], f"{name}.corrupt", "merge.lock"])

    def _header_damaged(self, rng, content):
        try:
            return header_damaged(rng, content)
        except (ValueError, OverflowError, LookupError, MemoryError):
            return bytes_damaged(rng, content)  # damaged before

    def _exchanged(self, rng, content, folder):
        """Exchange rows, keys or checksums; half of the time checksums are right."""
        try:
            tensors = dict(safetensors.numpy.load(content))
            n = len(tensors["rows"])
            which = [rng.randrange(n) for _ in range(n)]
            for part in rng.sample(sorted(tensors), rng.randrange(1, 4)):
                tensors[part] = tensors[part][which]
            if rng.random() < 0.5:
                keys = [key.tobytes() for key in tensors["keys"]]
                rows = np.stack([self.rows[key] for key in keys])
                rows[rng.randrange(n)] = rng.choice([np.nan, np.inf, rows[0]])
                checksums = ShardIndex(folder)._checksums(keys, rows)
                # Rows under a key that is not theirs: nothing could tell.
                right = [
                    not np.isfinite(row).all() or (row == self.rows[key]).all()
                    for key, row in zip(keys, rows, strict=True)
                ]
                tensors["rows"] = rows
                tensors["checksums"] = np.where(right, checksums, 0).astype(np.uint32)
            return safetensors.numpy.save(tensors)
        except (safetensors.SafetensorError, LookupError, ValueError):
            return bytes_damaged(rng, content)  # damaged before

    def _no_file(self, rng, path):
        path.unlink()
        kind = rng.randrange(5)
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            path.symlink_to("/dev/zero")
        elif kind == 3:
            path.symlink_to(path.with_name(self._name(rng)))
