"""Each image goes through the network once; cached rows keep their bits."""

import errno
import os
import pickle
import shutil
import time
from pathlib import Path
from unittest import mock

import joblib
import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from store_rows import find_shards

import sktl._inference.cached_forward
from sktl import (
    FeatureStore,
    FineTunedCNNClassifier,
    PretrainedClassifier,
    PretrainedFeatures,
)
from sktl._images.validation import validate_images
from sktl._inference.forward import batches


class Counting(PretrainedFeatures):
    """Log the number of images that go through the network, in any process."""

    def __init__(
        self,
        backbone="resnet_mini",
        *,
        log=None,
        batch_size=4,
        memory=None,
        layer="stem",
    ):
        super().__init__(backbone, batch_size=batch_size, memory=memory, layer=layer)
        self.log = log

    def transform(self, X):
        def counted(*arguments, **options):
            for positions, out in batches(*arguments, **options):
                with open(self.log, "a") as log:
                    print(f"{time.time()} {os.getpid()} {len(positions)}", file=log)
                yield positions, out

        with mock.patch("sktl._inference.cached_forward.batches", counted):
            return super().transform(X)


@pytest.fixture
def counting(tmp_path):
    (tmp_path / "log").touch()
    return Counting(log=str(tmp_path / "log"), memory=str(tmp_path / "store"))


def n_through(estimator):
    return sum(
        int(line.split()[2]) for line in Path(estimator.log).read_text().splitlines()
    )


@pytest.mark.parametrize("shuffle", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["paths", "arrays"])
def test_a_grid_search_runs_each_image_once(counting, paths, images, kind, shuffle):
    X = np.array(paths) if kind == "paths" else images
    y = np.arange(len(X)) % 2
    search = GridSearchCV(
        make_pipeline(counting, RidgeClassifier()),
        {"ridgeclassifier__alpha": [0.1, 1, 10]},
        cv=StratifiedKFold(3, shuffle=shuffle, random_state=0 if shuffle else None),
    )
    search.fit(X, y)
    assert n_through(counting) == len(X)
    search.fit(X, y)
    assert n_through(counting) == len(X)


class Noting(Counting):
    """Log lookups, computed and written rows, in order, in any process."""

    def transform(self, X):
        def note(event, keys=()):
            moment = time.monotonic_ns()  # one clock for all processes
            with open(self.log, "a") as log:
                for key in keys or [b""]:
                    print(os.getpid(), moment, event, key.hex(), file=log)

        def lookup(method):
            def noted(*arguments):
                note("look")
                return method(*arguments)

            return noted

        def noted_put(store, space, keys, rows):
            put(store, space, keys, rows)
            note("written", keys)

        def noted_batches(network, missing, *arguments, **options):
            for positions, out in batches(network, missing, *arguments, **options):
                note(
                    "computed",
                    [missing.rows.hashes[position] for position in positions],
                )
                yield positions, out

        put = FeatureStore.put
        with (
            mock.patch.object(FeatureStore, "get", lookup(FeatureStore.get)),
            mock.patch.object(FeatureStore, "known", lookup(FeatureStore.known)),
            mock.patch.object(FeatureStore, "put", noted_put),
            mock.patch("sktl._inference.cached_forward.batches", noted_batches),
            mock.patch("sktl._inference.cached_forward._MIN_ROWS_PER_WRITE", 4),
        ):
            return PretrainedFeatures.transform(self, X)


@pytest.mark.slow
def test_two_workers_share_the_work(tmp_path, paths):
    mine = Noting(log=str(tmp_path / "log"), memory=str(tmp_path / "store"))
    search = GridSearchCV(
        make_pipeline(mine, RidgeClassifier()),
        {"ridgeclassifier__alpha": [0.1, 1, 10]},
        cv=5,
        n_jobs=2,
    )
    both_awake = joblib.delayed(PretrainedFeatures("resnet_mini").transform)
    joblib.Parallel(n_jobs=2)(both_awake(paths) for _ in range(4))
    search.fit(paths, np.arange(len(paths)) % 2)
    log = [line.split(" ") for line in Path(mine.log).read_text().splitlines()]
    written, looked, n_since = {}, {}, {}
    for _, moment, event, key in log:
        if event == "written":
            written[key] = min(int(moment), written.get(key, 2**63))
    assert len(written) == len(paths)
    # A worker computes no row that was written before its last lookup; it looks up
    # before each batch. So only rows in progress at the same time are computed twice.
    for process, moment, event, key in log:
        if event == "look":
            looked[process], n_since[process] = int(moment), 0
        elif event == "computed":
            n_since[process] += 1
            assert n_since[process] <= mine.batch_size
            assert looked[process] <= written[key]
    search.fit(paths, np.arange(len(paths)) % 2)
    assert Path(mine.log).read_text().count("written") == str(log).count("written")


def test_rows_written_by_another_process_meanwhile_are_not_computed(counting, paths):
    expected = clone(counting).set_params(memory=None).transform(paths)
    other = clone(counting)
    put = FeatureStore.put
    calls = []

    def then_the_other(store, space, keys, rows):
        put(store, space, keys, rows)
        if not calls:
            calls.append(1)
            other.transform(paths)

    with (
        mock.patch.object(FeatureStore, "put", then_the_other),
        mock.patch.object(sktl._inference.cached_forward, "_MIN_ROWS_PER_WRITE", 4),
    ):
        got = counting.transform(paths)
    # Together they compute each image once.
    assert n_through(counting) == len(paths)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("estimator", [PretrainedFeatures, PretrainedClassifier])
def test_cold_warm_and_no_cache_have_equal_bits(estimator, paths, tmp_path):
    method = "transform" if estimator is PretrainedFeatures else "decision_function"
    plain = estimator("resnet_mini", image_size=24).fit(paths)
    expected = getattr(plain, method)(paths)
    mine = estimator("resnet_mini", image_size=24, memory=tmp_path).fit(paths)
    for X in (paths, paths, paths[::-1]):
        got = getattr(mine, method)(X)
        np.testing.assert_array_equal(
            got[:: 1 if X is paths or X == paths else -1], expected
        )
    few = getattr(mine, method)(paths[:3])  # cached from a padded batch
    np.testing.assert_array_equal(few, expected[:3])


def test_a_partly_filled_cache(paths, tmp_path):
    expected = PretrainedFeatures("resnet_mini").transform(paths)
    mine = PretrainedFeatures("resnet_mini", memory=tmp_path)
    mine.transform(paths[:5])  # one by one, which rounds differently
    got = mine.transform(paths)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_duplicates_are_computed_once(counting, paths, tmp_path):
    copy = shutil.copy(paths[0], tmp_path / "copy.png")
    rows = counting.transform([paths[0], copy, paths[1], paths[0], paths[1]])
    assert n_through(counting) == 2
    np.testing.assert_array_equal(rows[[0, 0, 2]], rows[[1, 3, 4]])


def test_a_cache_hit_decodes_nothing(counting, paths, monkeypatch):
    expected = counting.transform(paths)
    monkeypatch.setattr(Image, "open", None)
    np.testing.assert_array_equal(counting.transform(paths), expected)


@pytest.mark.filterwarnings("ignore:precision='bfloat16' is slow")
@pytest.mark.parametrize(
    "change",
    [
        {"layer": "stage1"},
        {"resize": "squash"},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                {"pooling": "max"},
                {"image_size": 24},
                {"resize": "pad"},
                {"precision": "bfloat16"},
                {"weights": None},
                {"pixel_range": (0, 300)},
            )
        ),
    ],
)
def test_settings_that_change_rows_have_their_own_namespace(change, paths, tmp_path):
    mine = PretrainedFeatures("resnet_mini", layer="stem", memory=tmp_path)
    mine.transform(paths[:4])
    mine.set_params(**change)
    expected = clone(mine).set_params(memory=None).transform(paths[:4])
    np.testing.assert_array_equal(mine.transform(paths[:4]), expected)
    assert len(FeatureStore(tmp_path).info()["spaces"]) == 2


def test_another_version_of_the_decoder_has_its_own_namespace(
    counting, paths, monkeypatch
):
    counting.transform(paths)
    monkeypatch.setattr("PIL.__version__", "99.0.0")
    counting.transform(paths)
    assert n_through(counting) == 2 * len(paths)


def test_a_file_replaced_by_another_of_the_same_size(counting, tmp_path):
    file = tmp_path / "a.bmp"
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(file)
        os.utime(file, ns=(10**18, 10**18))
        expected = clone(counting).set_params(memory=None).transform([file])
        np.testing.assert_array_equal(counting.transform([file]), expected)


@pytest.mark.parametrize("kind", ["path", "store", "joblib"])
def test_memory_may_be_a_directory_or_have_one(kind, paths, tmp_path):
    memory = {
        "path": tmp_path,
        "store": FeatureStore(tmp_path),
        "joblib": joblib.Memory(tmp_path, verbose=0),
    }[kind]
    mine = PretrainedFeatures("resnet_mini", memory=memory)
    mine.fit(paths).transform(paths[:3])
    again = pickle.loads(pickle.dumps(clone(mine).fit(paths)))
    again.transform(paths[:3])
    assert FeatureStore(tmp_path).info()["rows"] == 3
    off = PretrainedFeatures("resnet_mini", memory=joblib.Memory(None))
    assert off.transform(paths[:3]).shape == (3, 256)


def test_an_invalid_memory_raises_an_error(paths):
    with pytest.raises(ValueError, match="'memory' parameter"):
        PretrainedFeatures("resnet_mini", memory=3).transform(paths)
    with pytest.raises(ValueError, match=r"memory must be a directory.*is a file"):
        PretrainedFeatures("resnet_mini", memory=paths[0]).transform(paths)


def test_a_full_disk_does_not_fail_a_fit(counting, paths, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    expected = clone(counting).set_params(memory=None).transform(paths)
    with pytest.warns(UserWarning, match="cannot be written") as warned:
        got = counting.transform(paths)
    assert len(warned) == 1
    np.testing.assert_array_equal(got, expected)


def test_a_damaged_shard_does_not_fail_a_fit(counting, paths):
    expected = counting.transform(paths)
    for shard in find_shards(counting.memory):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1  # in the rows
        shard.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        got = counting.transform(paths)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(counting.transform(paths), expected)


def test_a_store_with_too_small_max_bytes_does_not_fail_a_fit(counting, paths):
    expected = clone(counting).set_params(memory=None).transform(paths)
    for max_bytes in (1, 5_000):
        small = FeatureStore(counting.memory, max_bytes=max_bytes)
        got = clone(counting).set_params(memory=small).transform(paths)
        np.testing.assert_array_equal(got, expected)
        assert small.info()["bytes"] <= max_bytes


def test_rows_deleted_before_they_are_read_are_computed(counting, paths):
    expected = clone(counting).set_params(memory=None).transform(paths)
    images = validate_images(paths, estimator=PretrainedFeatures(), reset=True)
    written = dict.fromkeys(images.content_hashes())
    with mock.patch.object(FeatureStore, "known", return_value=written):
        got = counting.transform(paths)
    np.testing.assert_array_equal(got, expected)


def test_rows_computed_before_an_interrupt_are_cached(counting, paths):
    def interrupted(*arguments, **options):
        for n, result in enumerate(batches(*arguments, **options)):
            if n == 3:
                raise KeyboardInterrupt
            yield result

    with (
        mock.patch("sktl._inference.cached_forward.batches", interrupted),
        pytest.raises(KeyboardInterrupt),
    ):
        PretrainedFeatures.transform(counting, paths)
    assert FeatureStore(counting.memory).info()["rows"] == 12


def test_an_invalid_image_is_named(counting, paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(paths[0]).read_bytes()[:60])
    with pytest.raises(ValueError, match=r"X\[2\] \('.*bad.png'\)"):
        counting.transform([*paths[:2], bad])


def engines_in(store):
    return {
        namespace["space"]["engine"].split()[0]: namespace["rows"]
        for namespace in store.info()["spaces"].values()
    }


def test_few_images_on_a_large_network(images, tmp_path, monkeypatch):
    monkeypatch.setattr("sktl._inference.execution._MIN_LARGE", 1)
    store = FeatureStore(tmp_path)
    cached = PretrainedFeatures("five stages", batch_size=16, memory=store)
    plain = clone(cached).set_params(memory=None)
    full = plain.transform(images)
    compile_ = "sktl._inference.engines._ENGINES"
    with monkeypatch.context() as context:
        context.setattr(compile_, {})  # no engine but torch
        small = plain.transform(images[:15])
        np.testing.assert_array_equal(cached.transform(images[:15]), small)
        assert engines_in(store) == {"torch": 15}
        np.testing.assert_array_equal(cached.transform(images[10:15]), small[10:])
    # Rows of torch are neither used for full batches nor stored as those of OpenVINO.
    np.testing.assert_array_equal(cached.transform(images), full)
    assert engines_in(store) == {"torch": 15, "openvino": 40}
    with monkeypatch.context() as context:
        context.setattr(compile_, {})
        np.testing.assert_array_equal(cached.transform(images[:15]), full[:15])
    assert engines_in(store) == {"torch": 15, "openvino": 40}
    np.testing.assert_allclose(small, full[:15], rtol=0, atol=1e-5 * np.abs(full).max())


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.slow
def test_few_images_on_a_large_fine_tuned_network(
    images, tmp_path, monkeypatch, memory
):
    monkeypatch.setattr("sktl._inference.execution._MIN_LARGE", 1)
    fitted = FineTunedCNNClassifier(
        "resnet_mini",
        trainable=1,
        head_init="random",
        lr=1e-4,
        batch_size=32,
        max_epochs=1,
        image_size=24,
        random_state=0,
        memory=str(tmp_path) if memory else None,
    ).fit(images, np.arange(40) % 2)
    full = fitted.predict_proba(images)
    monkeypatch.setattr("sktl._inference.engines._ENGINES", {})
    unseen = np.concatenate([images[:5], 255 - images[:1]])
    small = fitted.predict_proba(unseen)
    np.testing.assert_allclose(small[:5], full[:5], atol=1e-5)
