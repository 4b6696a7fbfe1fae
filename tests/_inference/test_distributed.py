"""Rows computed by workers have the same bits as those of this process."""

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import joblib
import numpy as np
import pytest
from joblib.parallel import ThreadingBackend
from logged_model import Logged
from shared_fixtures import FIXED, TinyNet
from sklearn.base import clone
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import sktl
from sktl import (
    FeatureStore,
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedClassifier,
    PretrainedFeatures,
    register_backbone,
)
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.validation import validate_images
from sktl._inference.distributed import _chunks, distributed_forward
from sktl._inference.execution import ExecutionConfig
from sktl._inference.feature_cache import FeatureCache

pytestmark = [
    # Warnings of Dask and Ray about their own code.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Restore the environment afterwards: Dask sets OMP_NUM_THREADS=1."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def dask():
    """Start a Dask cluster of two processes with one thread each."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster),
    ):
        yield {"backend": "dask"}


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """Start two Ray workers that may be restarted."""
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    here = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    # Ray starts such workers in advance, but not those with a runtime_env.
    os.environ["PYTHONPATH"] = here
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    register_ray()
    yield {
        "backend": "ray",
        "ray_remote_args": {"max_restarts": -1, "max_task_retries": -1},
    }
    ray.shutdown()


@pytest.fixture(
    params=[
        pytest.param("dask", marks=pytest.mark.cluster),
        pytest.param("ray", marks=pytest.mark.cluster),
    ]
)
def engine(request):
    return request.getfixturevalue(request.param)


def logged(log, seconds=0.0, weights="DEFAULT"):
    backbone = load_backbone("resnet_mini")
    reference = BackboneSpec.to(backbone, weights)
    estimator = PretrainedFeatures(engine="torch", batch_size=2, n_jobs=2)
    execution = ExecutionConfig.from_estimator(estimator)
    given = reference, ("stem",), "avg", backbone.preprocessing, execution
    return Logged(*given, log=str(log), seconds=seconds)


def run_distributed(network, X, store=None):
    images = validate_images(X, estimator=PretrainedFeatures(), reset=True)
    cache = None if store is None else FeatureCache(store, {"test": "distributed"})
    return distributed_forward(network, images, cache)


def batches_in(log):
    return [line.split() for line in Path(log).read_text().splitlines()]


@pytest.mark.slow
def test_rows_of_a_dask_worker_have_equal_bits(paths, tmp_path):
    """The one test of a cluster that runs by default."""
    distributed = pytest.importorskip("distributed")
    expected = run_distributed(logged(tmp_path / "here"), paths)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        got = run_distributed(logged(tmp_path / "there"), paths)
    np.testing.assert_array_equal(got, expected)
    here, there = (batches_in(tmp_path / name) for name in ("here", "there"))
    assert {pid for pid, _ in here} == {str(os.getpid())}
    assert {pid for pid, _ in there}.isdisjoint({str(os.getpid())})
    assert sum(int(n) for _, n in there) == len(paths)


@pytest.mark.parametrize("builder", [TinyNet, lambda: TinyNet()])
def test_workers_know_registered_networks(engine, images, builder):
    register_backbone("mine", builder, preprocessing=Preprocessing(16, 16))
    mine = PretrainedFeatures("mine", batch_size=8, engine="torch")
    expected = mine.transform(images)
    with joblib.parallel_config(**engine):
        got = mine.set_params(n_jobs=2).transform(images)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["paths", "arrays"])
def test_rows_of_workers_have_equal_bits(engine, paths, images, kind):
    X = paths if kind == "paths" else images
    mine = PretrainedFeatures("resnet_mini", layer=["stem", "penultimate"])
    mine.set_params(batch_size=8)
    expected = clone(mine).transform(X)
    with joblib.parallel_config(**engine):
        got = mine.set_params(n_jobs=2).transform(X)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.cluster
def test_all_estimators_distribute(dask, paths):
    y = np.arange(40) % 2
    tuned = FineTunedCNNClassifier("resnet_mini", **FIXED)
    tuned.set_params(trainable=1, max_epochs=1, batch_size=8, random_state=0)
    tuned.set_params(augmentation="flip", augmentation_views=2)
    tuned.set_params(image_size=32, engine="torch")
    for mine in (PretrainedClassifier("resnet_mini", batch_size=8), tuned):
        expected = clone(mine).fit(paths, y).predict_proba(paths)
        with joblib.parallel_config(**dask):
            fitted = mine.set_params(n_jobs=2).fit(paths, y)
        np.testing.assert_array_equal(fitted.predict_proba(paths), expected)


def test_each_image_is_computed_once_by_a_worker(engine, paths, tmp_path):
    log, store = tmp_path / "log", FeatureStore(tmp_path / "store")
    network = logged(log, seconds=0.05)
    with joblib.parallel_config(**engine):
        rows = run_distributed(network, paths, store)
        batches = batches_in(log)
        assert sum(int(n) for _, n in batches) == len(paths)
        assert len({pid for pid, _ in batches} - {str(os.getpid())}) == 2
        np.testing.assert_array_equal(run_distributed(network, paths, store), rows)
    assert batches_in(log) == batches  # all cached
    assert store.info()["rows"] == len(paths)
    np.testing.assert_array_equal(run_distributed(network, paths, store), rows)
    assert batches_in(log) == batches


@contextlib.contextmanager
def in_a_thread(function):
    """Run a function in parallel with the block."""
    thread = threading.Thread(target=function, daemon=True)  # does not prevent exit
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


def test_chunks_of_a_lost_worker_are_repeated(engine, paths, tmp_path):
    expected = run_distributed(logged(tmp_path / "other"), paths)
    network = logged(tmp_path / "log", seconds=0.1)
    killed = []

    def kill():
        while len(batches_in(tmp_path / "log")) < 3:
            time.sleep(0.01)
        killed.append(int(batches_in(tmp_path / "log")[-1][0]))
        os.kill(killed[0], signal.SIGKILL)

    (tmp_path / "log").touch()
    with joblib.parallel_config(**engine), in_a_thread(kill):
        rows = run_distributed(network, paths)
    assert killed
    assert killed[0] != os.getpid()
    np.testing.assert_array_equal(rows, expected)
    assert len(batches_in(tmp_path / "log")) > len(paths) // 2


def test_a_worker_without_the_weights_raises_an_error(engine, paths, tmp_path):
    network = logged(tmp_path / "log", weights=tmp_path / "nowhere.pth")
    with (
        joblib.parallel_config(**engine),
        pytest.raises(FileNotFoundError, match=r"nowhere.* must be on the machine"),
    ):
        run_distributed(network, paths)


def test_an_invalid_image_is_named_by_its_row(engine, paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with (
        joblib.parallel_config(**engine),
        pytest.raises(ValueError, match=r"X\[30\].*bad\.png"),
    ):
        run_distributed(logged(tmp_path / "log"), [*paths[:30], str(bad), *paths[30:]])


def test_a_search_with_a_shared_memory(engine, paths, tmp_path):
    y = np.arange(40) % 2
    features = PretrainedFeatures("resnet_mini", memory=tmp_path, engine="torch")
    search = GridSearchCV(
        make_pipeline(features, RidgeClassifier()),
        {"ridgeclassifier__alpha": [0.1, 1.0, 10.0]},
        cv=3,
        n_jobs=2,
    )
    expected = clone(search).set_params(n_jobs=None).fit(paths, y)
    with joblib.parallel_config(**engine):
        got = clone(search).fit(paths, y)
    for name in ("mean_test_score", "params"):
        assert list(got.cv_results_[name]) == list(expected.cv_results_[name])
    assert FeatureStore(tmp_path).info()["rows"] == 40


@pytest.mark.cluster
def test_workers_resolve_relative_paths(dask, paths, monkeypatch):
    folder = Path(paths[0]).parent
    monkeypatch.chdir(folder)
    names = [Path(path).name for path in paths]
    mine = PretrainedFeatures("resnet_mini", memory="store", batch_size=8, n_jobs=2)
    mine.set_params(engine="torch")
    with joblib.parallel_config(**dask):
        rows = mine.transform(names)
    np.testing.assert_array_equal(rows, clone(mine).transform(paths))
    assert FeatureStore(folder / "store").info()["rows"] == 40


class InThisProcess(ThreadingBackend):
    """Backend like a Dask worker that runs the tasks started by its own task."""

    supports_sharedmem = False


def test_training_does_not_block_its_own_tasks(images):
    joblib.register_parallel_backend("in this process", InThisProcess)
    mine = FineTunedCNNClassifier("five stages", **FIXED)
    mine.set_params(trainable=1, random_state=0)
    mine.set_params(max_epochs=2, augmentation="flip", augmentation_views=2)
    mine.set_params(batch_size=4, early_stopping=True, engine="torch")
    images, y = images[:24], np.arange(24) % 2
    expected = clone(mine).fit(images, y)

    def fit():
        with joblib.parallel_config("in this process"):
            mine.set_params(n_jobs=2).fit(images, y)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    thread.join(100)
    assert not thread.is_alive()
    assert mine.history_ == expected.history_


@pytest.mark.cluster
def test_a_distributed_search_over_estimators_that_distribute(dask, paths):
    y = np.arange(40) % 2
    mine = FineTunedCNNClassifier("resnet_mini", **FIXED)
    mine.set_params(trainable=1, random_state=0)
    mine.set_params(max_epochs=1, augmentation="flip", augmentation_views=2)
    mine.set_params(image_size=32, engine="torch")
    search = GridSearchCV(mine.set_params(batch_size=8), {"lr": [1e-4, 1e-3]}, cv=2)
    expected = clone(search).fit(paths, y)
    search.set_params(n_jobs=-1, estimator__n_jobs=-1)
    with joblib.parallel_config(**dask):
        search.fit(paths, y)
    scores = [each.cv_results_["mean_test_score"] for each in (search, expected)]
    np.testing.assert_array_equal(*scores)


def test_prediction_needs_no_weights_file(paths, tmp_path):
    file = tmp_path / "mine.safetensors"
    shutil.copy(Path(sktl.__file__).parent / "data" / "resnet_mini.safetensors", file)
    mine = FineTunedCNNClassifier("resnet_mini", **FIXED, weights=file, max_epochs=1)
    mine.set_params(max_epochs=1).set_params(
        trainable="head", memory=tmp_path / "store", n_jobs=2
    )
    mine.set_params(image_size=24, engine="torch").fit(paths, np.arange(40) % 2)
    expected = mine.predict_proba(paths)
    file.unlink()
    with joblib.parallel_config("loky"):
        np.testing.assert_array_equal(mine.predict_proba(paths), expected)


@pytest.mark.cluster
def test_activations_larger_than_memory_are_computed_by_workers(dask, paths, tmp_path):
    mine = FineTunedCNNClassifier("resnet_mini", **FIXED)
    mine.set_params(trainable=1, max_epochs=1)
    mine.set_params(batch_size=8, head_init="random", random_state=0)
    mine.set_params(engine="torch")
    y = np.arange(40) % 2
    limit = "sktl._training.frozen_activations._MAX_BYTES_IN_MEMORY"
    with mock.patch(limit, 4 * 4096 * 10):
        expected = clone(mine).fit(paths, y)
        with (
            joblib.parallel_config(**dask),
            mock.patch("sktl._inference.cached_forward.batches", None),
        ):
            mine.set_params(n_jobs=2, memory=tmp_path).fit(paths, y)
    assert mine.history_ == expected.history_
    assert FeatureStore(tmp_path).info()["rows"] == 40


@pytest.mark.cluster
def test_transform_maps_over_the_partitions_of_a_bag(dask, paths):
    bag = pytest.importorskip("dask.bag").from_sequence(paths, npartitions=2)
    mine = PretrainedFeatures("resnet_mini", batch_size=8, engine="torch")
    rows = bag.map_partitions(lambda part: mine.transform(list(part)))
    parts = [part.compute() for part in rows.to_delayed()]
    np.testing.assert_array_equal(np.concatenate(parts), mine.transform(paths))


def test_without_a_process_backend_nothing_is_distributed(paths, tmp_path):
    network = logged(tmp_path / "log")
    run_distributed(network, paths)
    with joblib.parallel_config("threading", n_jobs=2):
        run_distributed(network, paths)
    assert {pid for pid, _ in batches_in(tmp_path / "log")} == {str(os.getpid())}


# Replacements in the code of the page: names of a cluster, and sizes for a test.
HERE = {
    'Client("scheduler:8786")': "Client.current()",
    '"resnet18"': '"resnet_mini"',
    "(512,)": "(256,)",
    'table.to_zarr("features.zarr")': "blocks = table.compute()",
    "concurrency=64, batch_size=1000": "concurrency=1",
    "ray.data.read_csv": "rows = ray.data.read_csv",
}


@pytest.fixture
def page(tmp_path, paths):
    """Return the code blocks of docs/scaling.md, and the names they use."""
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    names = {**HERE, "/shared/": f"{tmp_path}/", "paths.csv": f"{tmp_path}/paths.csv"}
    for there, here in names.items():
        assert there in text
        text = text.replace(there, here)
    names = {name: globals()[name] for name in ("joblib", "np", "PretrainedFeatures")}
    names |= {"GridSearchCV": GridSearchCV, "make_pipeline": make_pipeline}
    names |= {"LogisticRegression": RidgeClassifier, "grid": {}, "paths": paths}
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL), names


@pytest.mark.cluster
def test_the_page_runs_on_dask(dask, page, paths):
    (one_call, _, search, blocks, _), names = page
    names |= {"da": pytest.importorskip("dask.array"), "y": np.arange(40) % 2}
    exec(one_call, names)
    exec(search, names)
    assert set(names["search"].predict(paths)) <= {0, 1}
    exec(blocks, names)
    np.testing.assert_array_equal(names["blocks"], names["table"])


@pytest.mark.cluster
def test_the_page_runs_on_ray(ray, page, paths, tmp_path):
    (_, one_call, _, _, dataset), names = page
    (tmp_path / "paths.csv").write_text("\n".join(["path", *map(str, paths)]))
    names |= {"features": PretrainedFeatures("resnet_mini", n_jobs=2)}
    exec(one_call, names)
    names["ray"] = pytest.importorskip("ray")
    exec(dataset, names)
    by_path = {row["path"]: row["features"] for row in names["rows"].take_all()}
    rows = np.stack([by_path[str(path)] for path in paths])
    np.testing.assert_array_equal(rows, names["table"])


@pytest.mark.parametrize(
    ("n_images", "batch_size", "expected"),
    [(40, 32, [40]), (100, 32, [64, 36]), (20, 1, [8, 8, 4]), (20, 3, [9, 9, 2])],
)
def test_chunks_are_whole_batches_of_a_useful_size(n_images, batch_size, expected):
    chunks = _chunks(n_images, batch_size)
    assert [len(chunk) for chunk in chunks] == expected
    assert [i for chunk in chunks for i in chunk] == list(range(n_images))
