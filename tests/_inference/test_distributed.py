"""Rows that come from other processes have the bits of those computed here."""

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import joblib
import numpy as np
import pytest
from joblib.parallel import ThreadingBackend
from sklearn.base import clone
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import sktl
from sktl import (
    FeatureStore,
    FineTunedCNNClassifier,
    PretrainedClassifier,
    PretrainedFeatures,
)
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.validation import validate_images
from sktl._inference.distributed import distributed_forward
from sktl._inference.execution import ExecutionConfig
from sktl._inference.feature_cache import FeatureCache
from sktl._inference.model_spec import ModelSpec

pytestmark = [
    # Of the engines, about their own insides.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Leave no OMP_NUM_THREADS=1, as Dask does, for what a later test starts."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def dask():
    """Give a cluster of two processes of Dask, one thread each."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        yield {"backend": "dask"}


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """Start two workers of Ray, which may be lost."""
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    here = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )
    register_ray()
    yield {
        "backend": "ray",
        "ray_remote_args": {"max_restarts": -1, "max_task_retries": -1},
    }
    ray.shutdown()


@pytest.fixture(params=["dask", "ray"])
def engine(request):
    return request.getfixturevalue(request.param)


@dataclass(frozen=True)
class Logged(ModelSpec):
    """Write down each batch, and who computes it; rest a while, if asked to."""

    log: str = ""
    seconds: float = 0.0

    def compile(self):
        made = super().compile()

        def start(pixels):
            with open(self.log, "a") as log:
                print(os.getpid(), len(pixels), file=log)
            time.sleep(self.seconds)
            return made.start(pixels)

        return SimpleNamespace(start=start, execution=made.execution, n_ahead=0)


def logged(log, seconds=0.0, weights="DEFAULT"):
    backbone = load_backbone("resnet_mini")
    reference = BackboneSpec.to(backbone, weights)
    estimator = PretrainedFeatures(engine="torch", batch_size=2, n_jobs=2)
    execution = ExecutionConfig.from_estimator(estimator)
    given = reference, ("stem",), "avg", backbone.preprocessing, execution
    return Logged(*given, log=str(log), seconds=seconds)


def spread(network, X, store=None):
    images = validate_images(X, estimator=PretrainedFeatures(), reset=True)
    cache = None if store is None else FeatureCache(store, {"test": "distributed"})
    return distributed_forward(network, images, cache)


def batches_in(log):
    return [line.split() for line in Path(log).read_text().splitlines()]


@pytest.mark.parametrize("kind", ["paths", "arrays"])
def test_rows_have_the_bits_of_those_computed_here(engine, paths, images, kind):
    X = paths if kind == "paths" else images
    mine = PretrainedFeatures("resnet_mini", layer=["stem", "penultimate"])
    mine.set_params(batch_size=8)
    expected = clone(mine).transform(X)
    with joblib.parallel_config(**engine):
        got = mine.set_params(n_jobs=2).transform(X)
    np.testing.assert_array_equal(got, expected)


def test_all_three_estimators_spread(dask, paths):
    y = np.arange(40) % 2
    tuned = FineTunedCNNClassifier(
        "resnet_mini", trainable=1, max_epochs=1, batch_size=8, random_state=0
    )
    tuned.set_params(augmentation="flip", augmentation_views=2)
    for mine in (PretrainedClassifier("resnet_mini", batch_size=8), tuned):
        expected = clone(mine).fit(paths, y).predict_proba(paths)
        with joblib.parallel_config(**dask):
            fitted = mine.set_params(n_jobs=2).fit(paths, y)
        np.testing.assert_array_equal(fitted.predict_proba(paths), expected)


def test_each_image_is_computed_by_one_of_the_workers(engine, paths, tmp_path):
    log, store = tmp_path / "log", FeatureStore(tmp_path / "store")
    network = logged(log, seconds=0.05)
    with joblib.parallel_config(**engine):
        rows = spread(network, paths, store)
        batches = batches_in(log)
        assert sum(int(n) for _, n in batches) == len(paths)
        assert len({pid for pid, _ in batches} - {str(os.getpid())}) == 2
        np.testing.assert_array_equal(spread(network, paths, store), rows)
    assert batches_in(log) == batches  # nothing the second time
    assert store.info()["rows"] == len(paths)
    np.testing.assert_array_equal(spread(network, paths, store), rows)
    assert batches_in(log) == batches


@contextlib.contextmanager
def in_a_thread(function):
    """Run a function beside the block."""
    thread = threading.Thread(target=function, daemon=True)  # it may wait for ever
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


def test_what_a_lost_worker_had_is_done_again(engine, paths, tmp_path):
    expected = spread(logged(tmp_path / "other"), paths)
    network = logged(tmp_path / "log", seconds=0.1)
    killed = []

    def kill():
        while len(batches_in(tmp_path / "log")) < 3:
            time.sleep(0.01)
        killed.append(int(batches_in(tmp_path / "log")[-1][0]))
        os.kill(killed[0], signal.SIGKILL)

    (tmp_path / "log").touch()
    with joblib.parallel_config(**engine), in_a_thread(kill):
        rows = spread(network, paths)
    assert killed
    assert killed[0] != os.getpid()
    np.testing.assert_array_equal(rows, expected)
    assert len(batches_in(tmp_path / "log")) > len(paths) // 2


def test_a_worker_without_the_weights_says_so(engine, paths, tmp_path):
    network = logged(tmp_path / "log", weights=tmp_path / "nowhere.pth")
    with (
        joblib.parallel_config(**engine),
        pytest.raises(FileNotFoundError, match=r"nowhere.* must be on the machine"),
    ):
        spread(network, paths)


def test_a_bad_image_is_named_by_its_row(engine, paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with (
        joblib.parallel_config(**engine),
        pytest.raises(ValueError, match=r"X\[30\].*bad\.png"),
    ):
        spread(logged(tmp_path / "log"), [*paths[:30], str(bad), *paths[30:]])


def test_a_search_with_a_shared_memory(engine, paths, tmp_path):
    y = np.arange(40) % 2
    features = PretrainedFeatures("resnet_mini", memory=tmp_path, batch_size=8)
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


def test_paths_are_the_same_in_another_working_directory(dask, paths, monkeypatch):
    folder = Path(paths[0]).parent
    monkeypatch.chdir(folder)
    names = [Path(path).name for path in paths]
    mine = PretrainedFeatures("resnet_mini", memory="store", batch_size=8, n_jobs=2)
    with joblib.parallel_config(**dask):
        rows = mine.transform(names)
    np.testing.assert_array_equal(rows, clone(mine).transform(paths))
    assert FeatureStore(folder / "store").info()["rows"] == 40


class InThisProcess(ThreadingBackend):
    """As a worker of Dask that gets the tasks which its own task began."""

    supports_sharedmem = False


def test_a_training_does_not_keep_workers_waiting(images):
    joblib.register_parallel_backend("in this process", InThisProcess)
    mine = FineTunedCNNClassifier("resnet_mini", trainable=1, random_state=0)
    mine.set_params(max_epochs=2, augmentation="flip", augmentation_views=2)
    mine.set_params(batch_size=4, early_stopping=True, engine="torch")
    y = np.arange(40) % 2
    expected = clone(mine).fit(images, y)

    def fit():
        with joblib.parallel_config("in this process"):
            mine.set_params(n_jobs=2).fit(images, y)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    thread.join(100)
    assert not thread.is_alive()
    assert mine.history_ == expected.history_


def test_a_search_whose_candidates_spread_too(dask, paths):
    y = np.arange(40) % 2
    mine = FineTunedCNNClassifier("resnet_mini", trainable=1, random_state=0)
    mine.set_params(max_epochs=2, augmentation="flip", augmentation_views=2)
    search = GridSearchCV(mine.set_params(batch_size=8), {"lr": [1e-4, 1e-3]}, cv=2)
    expected = clone(search).fit(paths, y)
    search.set_params(n_jobs=-1, estimator__n_jobs=-1)
    with joblib.parallel_config(**dask):
        search.fit(paths, y)
    scores = [each.cv_results_["mean_test_score"] for each in (search, expected)]
    np.testing.assert_array_equal(*scores)


def test_a_fitted_network_needs_no_weights_file(paths, tmp_path):
    file = tmp_path / "mine.safetensors"
    shutil.copy(Path(sktl.__file__).parent / "data" / "resnet_mini.safetensors", file)
    mine = FineTunedCNNClassifier("resnet_mini", weights=file, max_epochs=1)
    mine.set_params(trainable="head", memory=tmp_path / "store", n_jobs=2)
    mine.fit(paths, np.arange(40) % 2)
    expected = mine.predict_proba(paths)
    file.unlink()
    with joblib.parallel_config("loky"):
        np.testing.assert_array_equal(mine.predict_proba(paths), expected)


def test_more_than_memory_holds_is_left_to_the_workers(dask, paths, tmp_path):
    mine = FineTunedCNNClassifier("resnet_mini", trainable=1, max_epochs=1)
    mine.set_params(batch_size=8, head_init="random", random_state=0)
    y = np.arange(40) % 2
    with mock.patch("sktl._training.frozen_activations._MOST_KEPT", 4 * 4096 * 10):
        expected = clone(mine).fit(paths, y)
        with (
            joblib.parallel_config(**dask),
            mock.patch("sktl._inference.cached_forward.batches", None),
        ):
            mine.set_params(n_jobs=2, memory=tmp_path).fit(paths, y)
    assert mine.history_ == expected.history_
    assert FeatureStore(tmp_path).info()["rows"] == 40


def test_a_bag_of_paths_gives_rows_by_partition(dask, paths):
    bag = pytest.importorskip("dask.bag").from_sequence(paths, npartitions=2)
    mine = PretrainedFeatures("resnet_mini", batch_size=8)
    rows = bag.map_partitions(lambda part: mine.transform(list(part)))
    parts = [part.compute() for part in rows.to_delayed()]
    np.testing.assert_array_equal(np.concatenate(parts), mine.transform(paths))


def test_without_a_choice_of_the_users_all_stays_here(paths, tmp_path):
    network = logged(tmp_path / "log")
    spread(network, paths)
    with joblib.parallel_config("threading", n_jobs=2):
        spread(network, paths)
    assert {pid for pid, _ in batches_in(tmp_path / "log")} == {str(os.getpid())}


# What has another name on a cluster of one's own, or is too large for a test.
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
    """Give the blocks of code of docs/scaling.md, and the names they start from."""
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    names = {**HERE, "/shared/": f"{tmp_path}/", "paths.csv": f"{tmp_path}/paths.csv"}
    for there, here in names.items():
        assert there in text
        text = text.replace(there, here)
    names = {name: globals()[name] for name in ("joblib", "np", "PretrainedFeatures")}
    names |= {"GridSearchCV": GridSearchCV, "make_pipeline": make_pipeline}
    names |= {"LogisticRegression": RidgeClassifier, "grid": {}, "paths": paths}
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL), names


def test_the_blocks_of_the_page_run_on_dask(dask, page, paths):
    (one_call, _, search, blocks, _), names = page
    names |= {"da": pytest.importorskip("dask.array"), "y": np.arange(40) % 2}
    exec(one_call, names)
    exec(search, names)
    assert set(names["search"].predict(paths)) <= {0, 1}
    exec(blocks, names)
    np.testing.assert_array_equal(names["blocks"], names["table"])


def test_the_blocks_of_the_page_run_on_ray(ray, page, paths, tmp_path):
    (_, one_call, _, _, dataset), names = page
    (tmp_path / "paths.csv").write_text("\n".join(["path", *map(str, paths)]))
    names |= {"features": PretrainedFeatures("resnet_mini", n_jobs=2)}
    exec(one_call, names)
    names["ray"] = pytest.importorskip("ray")
    exec(dataset, names)
    by_path = {row["path"]: row["features"] for row in names["rows"].take_all()}
    rows = np.stack([by_path[str(path)] for path in paths])
    np.testing.assert_array_equal(rows, names["table"])
