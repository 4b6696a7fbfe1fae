"""Fuzzing of the shards of a feature store, for `fuzz.py`."""

import os
import shutil

import numpy as np
import safetensors.numpy
from mutations import damage_bytes, damage_header, damage_text

from sktl import FeatureStore
from sktl._store import feature_store
from sktl._store.shard_index import ShardIndex

SPACE = {"backbone": "tiny", "layer": "stage1"}


class Shards:
    """Store of a few shards, which may have been read before they are damaged."""

    def __init__(self, folder):
        os.fsync = lambda descriptor: None  # slow, and irrelevant for reading
        self.folder = folder / "input" / "store"
        rng = np.random.default_rng(0)
        keys = [rng.bytes(32) for _ in range(24)]
        self.rows = {key: rng.random(3, np.float32) for key in keys}
        parts = [keys[:8], keys[8:16], keys[14:20]]  # four keys are in no shard
        self.others = self._make_files(folder / "made", {"backbone": "other"}, parts)
        self.files = self._make_files(folder / "made", SPACE, parts)

    def _make_files(self, folder, namespace, parts):
        """Return the files of a store with a shard for each part, by relative path."""
        store = FeatureStore(folder)
        for part in parts:
            store.put(namespace, part, np.stack([self.rows[key] for key in part]))
        files = {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        shutil.rmtree(folder)
        return files

    def case(self, rng):
        """Damage one or two files of a store, and check the rows that it returns."""
        feature_store._indexes.clear()
        for path, content in self.files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content)
        store = FeatureStore(self.folder)
        if rng.random() < 0.3:  # indexed before it is damaged
            self._get(rng, store)
        for _ in range(rng.choice([1, 1, 2])):
            self._damage(rng)
        for _ in range(rng.randrange(4)):
            rng.choice([self._get, self._put, self._info, self._verify])(rng, store)
        n_read = self._get(rng, store, list(self.rows))
        store.verify()  # rejects shards that were not read
        self._put(rng, store)  # writes rows that were lost
        assert self._get(rng, store, list(self.rows)) == len(self.rows)
        assert store.verify()["corrupt"] == 0
        shutil.rmtree(self.folder)
        return f"{n_read:2} rows read, all of them correct"

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
        """Damage one file of the store."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        shards = [path for path in files if path.suffix == ".safetensors"]
        if not shards:
            return
        path = rng.choice(shards)
        content = path.read_bytes()
        others = [each for each in self.others.values() if len(each) > 200]
        kind = rng.randrange(10)
        if kind < 3:
            path.write_bytes(damage_bytes(rng, content, others))
        elif kind < 5:
            path.write_bytes(self._damage_header(rng, content))
        elif kind == 5:
            path.write_bytes(self._exchange_rows(rng, content, path.parent))
        elif kind == 6:
            path.rename(path.with_name(self._random_name(rng)))
        elif kind == 7:  # a shard of another namespace, or another shard
            other = rng.choice([*others, rng.choice(shards).read_bytes()])
            rng.choice([path, path.with_name(self._random_name(rng))]).write_bytes(
                other
            )
        elif kind == 8:
            self._replace_file(rng, path)
        else:
            path = rng.choice([files[0], *self.folder.rglob("space.json")])
            content = path.read_bytes()
            if path.name == "space.json" and rng.random() < 0.7:
                content = damage_text(rng, content.decode("utf-8", "replace"))
                path.write_text(content, errors="replace")
            else:
                path.write_bytes(damage_bytes(rng, content))

    def _random_name(self, rng):
        timestamp = rng.choice([0, 1, 10**19, 10**20 - 1])
        name = f"{timestamp:020d}-{rng.randbytes(6).hex()}.safetensors"
        return rng.choice([name, name, name[1:], f"{name}.corrupt", "merge.lock"])

    def _damage_header(self, rng, content):
        try:
            return damage_header(rng, content)
        except (ValueError, OverflowError, LookupError, MemoryError):
            return damage_bytes(rng, content)  # the file is already damaged

    def _exchange_rows(self, rng, content, folder):
        """Permute rows, keys or checksums; half of the time with valid checksums."""
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
                # Not for rows with the key of another image: no check can detect them.
                detectable = [
                    not np.isfinite(row).all() or (row == self.rows[key]).all()
                    for key, row in zip(keys, rows, strict=True)
                ]
                tensors["rows"] = rows
                tensors["checksums"] = np.where(detectable, checksums, 0).astype(
                    np.uint32
                )
            return safetensors.numpy.save(tensors)
        except (safetensors.SafetensorError, LookupError, ValueError):
            return damage_bytes(rng, content)  # the file is already damaged

    def _replace_file(self, rng, path):
        """Replace a shard by a folder, pipe or link, or delete it."""
        path.unlink()
        kind = rng.randrange(5)
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            path.symlink_to("/dev/zero")
        elif kind == 3:
            path.symlink_to(path.with_name(self._random_name(rng)))
