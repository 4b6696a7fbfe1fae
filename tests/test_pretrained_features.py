"""PretrainedFeatures in scikit-learn models, and on real photographs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from reference import needs_native_bfloat16, normalized
from shared_fixtures import TinyNet
from sklearn import config_context
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_files, load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn
from torchvision import models

from sktl import Preprocessing, PretrainedFeatures, register_backbone
from sktl._backbones.registry import load_backbone


@pytest.fixture
def table(paths):
    """Paths, and two columns that do not separate the classes."""
    n = len(paths)
    return pd.DataFrame(
        {"path": paths, "altitude": np.arange(n) % 7, "site": list("abcd") * (n // 4)},
        index=range(1000, 1000 + n),
    )


@pytest.fixture
def y():
    return np.repeat(["china", "flower"], 20)


@pytest.mark.parametrize("column", ["path", ["path"]])
def test_column_transformer_in_cross_validation(table, y, column):
    columns = ColumnTransformer(
        [
            ("image", PretrainedFeatures("tiny"), column),
            ("number", StandardScaler(), ["altitude"]),
            ("category", OneHotEncoder(sparse_output=False), ["site"]),
        ]
    ).set_output(transform="pandas")
    model = make_pipeline(columns, StandardScaler(), LogisticRegression())
    assert cross_val_score(model, table, y, cv=4).mean() > 0.8
    frame = columns.fit_transform(table)
    pd.testing.assert_index_equal(frame.index, table.index)
    assert frame.columns[0] == "image__tiny_penultimate_0"
    assert frame.shape == (40, 16 + 1 + 4)


def test_union_of_two_backbones(paths):
    first = PretrainedFeatures("tiny", engine="torch")
    second = PretrainedFeatures("squeezenet1_1", weights=None, image_size=32)
    second.set_params(engine="torch")
    union = FeatureUnion([("a", first), ("b", second)]).set_output(transform="pandas")
    frame = union.fit_transform(paths)
    assert frame.shape == (40, 16 + 512)
    assert frame.columns[16] == "b__squeezenet1_1_penultimate_0"
    alone = first.transform(paths)
    np.testing.assert_array_equal(frame.iloc[:, :16], alone)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_network_of_one_channel(images, engine):
    layers = ["penultimate", "stage1"]
    mine = PretrainedFeatures("grey", layer=layers, engine=engine).fit(images)
    got = mine.transform(images)
    backbone = load_backbone("grey")
    grey = [Image.fromarray(image).convert("L") for image in images]
    x = normalized(grey, backbone.preprocessing)  # (n, 1, 16, 16)
    with torch.inference_mode():
        maps = backbone.network.stages["stage1"](backbone.network.stages["stem"](x))
    expected = maps.mean((2, 3)).numpy()
    np.testing.assert_allclose(got[:, :16], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[:, 16:], expected, rtol=1e-4, atol=1e-5)
    assert len(mine.get_feature_names_out()) == 32


@pytest.mark.slow
def test_grid_search_over_networks_layers_and_pooling(paths, y):
    model = make_pipeline(PretrainedFeatures("tiny"), LogisticRegression())
    grid = {
        "pretrainedfeatures__backbone": ["tiny", "squeezenet1_1"],
        "pretrainedfeatures__weights": [None],
        "pretrainedfeatures__image_size": [64],
        "pretrainedfeatures__layer": ["penultimate", ["stem", "stage1"]],
        "pretrainedfeatures__pooling": ["avg", 2],
    }
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(paths, y)
    assert len(search.cv_results_["params"]) == 8
    assert search.best_score_ > 0.7


@pytest.mark.slow
def test_grid_search_in_other_processes(images, y):
    estimator = PretrainedFeatures("squeezenet1_1", weights=None, image_size=32)
    model = make_pipeline(estimator, LogisticRegression())
    alone, spread = (
        GridSearchCV(model, {"logisticregression__C": [0.1, 1]}, cv=2, n_jobs=n_jobs)
        .fit(images, y)
        .cv_results_["mean_test_score"]
        for n_jobs in (1, 2)
    )
    np.testing.assert_array_equal(alone, spread)


def test_feature_names_have_backbone_layer_and_index(paths):
    mine = PretrainedFeatures("tiny", layer=["stage1", "stem"]).fit(paths)
    names = mine.get_feature_names_out()
    assert names[0] == "tiny_stage1_0"
    assert names[16] == "tiny_stem_0"
    assert len(names) == mine.transform(paths[:1]).shape[1] == 24
    # Parameters that are set after fit change the names as well.
    mine.set_params(layer="stem", pooling="flatten", image_size=32)
    assert len(mine.get_feature_names_out()) == mine.transform(paths[:1]).shape[1]


def test_set_params_changes_the_network(paths):
    mine = PretrainedFeatures("squeezenet1_1", weights=None, image_size=32).fit(paths)
    mine.set_params(backbone="tiny", image_size=None)
    expected = PretrainedFeatures("tiny").fit_transform(paths)
    np.testing.assert_array_equal(mine.transform(paths), expected)


def saved(network, path):
    torch.save(network.state_dict(), path)
    return path


def test_weights_that_changed_since_fit_raise_an_error(paths, tmp_path):
    torch.manual_seed(0)
    file = saved(models.squeezenet1_1(), tmp_path / "mine.pth")
    mine = PretrainedFeatures("squeezenet1_1", weights=file, image_size=32)
    mine.set_params(engine="torch").fit(paths)
    before = mine.transform(paths[:2])
    saved(models.squeezenet1_1(), file)
    with pytest.raises(ValueError, match=r"they changed\. Call fit again"):
        mine.transform(paths[:2])
    assert (mine.fit(paths).transform(paths[:2]) != before).any()


@pytest.mark.slow
def test_random_weights_are_the_same_in_every_process(paths):
    mine = PretrainedFeatures("squeezenet1_1", weights=None, image_size=32)
    here = mine.transform(paths[:3])
    code = (
        "import sys, numpy, sktl; numpy.save(sys.argv[1], sktl.PretrainedFeatures("
        "'squeezenet1_1', weights=None, image_size=32).transform(sys.argv[2:]))"
    )
    file = f"{paths[0]}.npy"
    subprocess.run([sys.executable, "-c", code, file, *paths[:3]], check=True)
    np.testing.assert_allclose(np.load(file), here, atol=1e-5 * np.abs(here).max())


def test_clones_share_one_compiled_model(paths, monkeypatch):
    mine = PretrainedFeatures("squeezenet1_1", weights=None, image_size=48)
    mine.fit(paths).transform(paths[:2])
    built = []
    monkeypatch.setattr(
        "sktl._inference.model_spec.FeatureExtractor", lambda *_: built.append(1)
    )
    clone(mine).fit(paths).transform(paths[:2])
    assert not built


def test_fit_and_feature_names_compile_no_model(paths, monkeypatch):
    monkeypatch.setattr("sktl._inference.model_spec.get_compiled_model", None)
    for layer in ("penultimate", ["stage1", "layer2.0"], "stem"):
        mine = PretrainedFeatures("resnet18", weights=None, layer=layer).fit(paths)
        assert mine.get_feature_names_out().size in {512, 64 + 128, 64}


WARM = """
import sys
from unittest import mock
import joblib
from sktl import PretrainedFeatures
folder, *paths = sys.argv[1:]
mine = joblib.load(f"{folder}/fitted.joblib")
with (
    mock.patch("torch.nn.Module.__init__", side_effect=AssertionError("a network")),
    mock.patch("sktl._inference.model_spec.get_compiled_model", None),
):
    frame = mine.transform(paths)
    again = PretrainedFeatures(**mine.get_params()).transform(paths)
frame.to_pickle(f"{folder}/frame.pkl")
assert (again == frame.to_numpy()).all()
"""


@pytest.mark.parametrize(
    "layer",
    [
        "penultimate",
        ["stage1", "stage2"],
    ],
)
@pytest.mark.slow
def test_a_warm_cache_needs_no_network_in_a_new_process(paths, tmp_path, layer):
    mine = PretrainedFeatures("resnet_mini", layer=layer, memory=tmp_path / "cache")
    mine.set_output(transform="pandas").fit(paths)
    expected = mine.transform(paths)
    joblib.dump(mine, tmp_path / "fitted.joblib")
    subprocess.run([sys.executable, "-c", WARM, tmp_path, *paths], check=True)
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "frame.pkl"), expected)


def test_a_failed_fit_leaves_the_estimator_unchanged(images):
    mine = PretrainedFeatures("tiny").fit(images.reshape(len(images), -1)[:, :256])
    state = dict(vars(mine))
    with pytest.raises(ValueError, match="'device' parameter"):
        mine.set_params(device="gpu").fit(images.reshape(len(images), -1)[:, :64])
    assert vars(mine.set_params(device="auto")) == state


def test_the_html_representation_has_no_external_link():
    assert 'href="http' not in PretrainedFeatures()._repr_html_()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"backbone": "resnet19"}, "Do you mean .*resnet18"),
        ({"weights": "IMAGENET_V7"}, r"has the weights .*\.safetensors.*IMAGENET_V7"),
        ({"weights": 3}, "'weights' parameter of PretrainedFeatures must be"),
        ({"layer": []}, "'layer' parameter .* a name or a list of distinct names"),
        ({"layer": ["stem", "stem"]}, "list of distinct names"),
        ({"layer": "stage7"}, r"\(stem, stage1, stage2, stage3, stage4\)"),
        ({"pooling": "mean"}, "'pooling' parameter"),
        ({"pooling": 0}, "'pooling' parameter"),
        ({"image_size": 0}, "'image_size' parameter"),
        ({"image_shape": (3,)}, "image_shape must be 'auto'"),
        ({"pixel_range": (1, 0)}, "pixel_range must be 'auto'"),
        ({"batch_size": 0}, "'batch_size' parameter"),
        ({"device": "gpu"}, "'device' parameter"),
        ({"precision": "int8"}, "'precision' parameter"),
        ({"n_jobs": 1.5}, "'n_jobs' parameter"),
    ],
)
def test_invalid_parameters_raise_an_error(paths, parameters, message):
    mine = PretrainedFeatures(**{"backbone": "resnet18", "weights": None, **parameters})
    for method in (mine.fit, mine.transform):
        with pytest.raises(ValueError, match=message):
            method(paths[:2])


def test_parameters_are_validated_again_only_if_they_change(paths, monkeypatch):
    mine = PretrainedFeatures("tiny").fit(paths)
    with monkeypatch.context() as patch:
        patch.setattr("sklearn.base.validate_parameter_constraints", None)
        mine.transform(paths[:2])
        clone(mine).fit(paths)
    with pytest.raises(ValueError, match="'batch_size' parameter"):
        mine.set_params(batch_size=0).transform(paths[:2])
    with config_context(skip_parameter_validation=True):
        mine = PretrainedFeatures("tiny", n_jobs="2").fit(paths)
    with pytest.raises(ValueError, match="'n_jobs' parameter"):
        mine.transform(paths[:2])


def test_too_small_images_for_a_network(paths):
    mine = PretrainedFeatures("alexnet", weights=None, image_size=40)
    with pytest.raises(ValueError, match="image_size must be at least 63"):
        mine.fit(paths)


def test_an_invalid_image_is_named(paths, tmp_path):
    bad = tmp_path / "broken.png"
    bad.write_bytes(Path(paths[0]).read_bytes()[:200])
    mine = PretrainedFeatures("tiny").fit([*paths, bad])  # files are not read yet
    with pytest.raises(ValueError, match=r"X\[40\].*broken\.png"):
        mine.transform([*paths, bad])


def test_a_read_only_array_is_not_modified(images):
    X = images.copy()
    X.flags.writeable = False
    PretrainedFeatures("tiny").fit(X).transform(X)
    np.testing.assert_array_equal(X, images)


def test_pooling_may_be_a_numpy_integer(paths):
    mine = PretrainedFeatures("tiny", layer="stage1", pooling=np.int64(2))
    expected = PretrainedFeatures("tiny", layer="stage1", pooling=2).transform(paths)
    np.testing.assert_array_equal(mine.transform(paths), expected)


def test_a_backbone_registered_again_replaces_the_old_one(paths):
    def network(sign):
        class Net(nn.Module):
            """Printed the same whatever its forward does."""

            def __init__(self):
                super().__init__()
                self.head = nn.Linear(3, 2, bias=False)
                nn.init.ones_(self.head.weight)

            def forward(self, x):
                return self.head(sign * x.mean((2, 3)))

        return Net

    rows = []
    for sign in (1, -1):
        size = Preprocessing(resize_size=16, crop_size=16)
        register_backbone("again", network(sign), preprocessing=size)
        rows.append(PretrainedFeatures("again").transform(paths))
    np.testing.assert_array_equal(rows[0], -rows[1])


def test_images_too_small_for_a_registered_network(paths):
    def network():
        pooled = nn.Conv2d(3, 4, 40), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*pooled, nn.Linear(4, 2))

    size = Preprocessing(resize_size=64, crop_size=64)
    register_backbone("own", network, preprocessing=size)
    with pytest.raises(ValueError, match=r"does not support images of 32 x 32"):
        PretrainedFeatures("own", image_size=32).fit(paths)


@pytest.fixture
def long_images():
    """Return images of 4:1 whose two classes differ only at the left end."""
    pixels = np.random.default_rng(0).integers(90, 110, (20, 24, 96, 3), np.uint8)
    pixels[10:, 4:20, 2:18] = 255
    return pixels


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_whole_long_images_in_every_form(long_images, resize, tmp_path):
    pixels = long_images[12]
    Image.fromarray(pixels).save(path := tmp_path / "image.png")
    forms = [pixels, torch.from_numpy(pixels), Image.open(path), path]
    forms.append(path.read_bytes())
    mine = PretrainedFeatures(
        "resnet_mini", layer="stage1", resize=resize, engine="torch"
    )
    rows = mine.transform(forms)
    np.testing.assert_array_equal(rows, rows[[0]].repeat(5, axis=0))
    backbone = load_backbone("resnet_mini")
    x = normalized([pixels], backbone.preprocessing_at(None, resize))
    with torch.inference_mode():
        expected = backbone.stages["stage1"](backbone.stages["stem"](x)).mean((2, 3))
    np.testing.assert_allclose(rows[:1], expected, rtol=1e-4, atol=1e-5)


def test_grid_search_over_resize(long_images):
    y = np.repeat(["plain", "marked"], 10)
    features = PretrainedFeatures("tiny", engine="torch")
    model = make_pipeline(features, LogisticRegression())
    grid = {"pretrainedfeatures__resize": [None, "crop", "squash", "pad"]}
    scores = GridSearchCV(model, grid, cv=2).fit(long_images, y).cv_results_
    own, crop, squash, pad = scores["mean_test_score"]
    assert own == crop < 0.9
    assert squash == pad == 1


def test_registered_backbone_has_a_resize_mode_of_its_own(long_images):
    size = Preprocessing(16, 16, resize="squash")
    register_backbone("tiny squashed", TinyNet, preprocessing=size)
    for resize, same in ((None, "squash"), ("crop", None), ("pad", "pad")):
        mine = PretrainedFeatures("tiny squashed", resize=resize, engine="torch")
        expected = PretrainedFeatures("tiny", resize=same, engine="torch")
        expected = expected.transform(long_images)
        np.testing.assert_array_equal(mine.transform(long_images), expected)


# Real photographs and real weights.


@pytest.fixture(scope="module")
def photographs(test_data):
    files = load_files(test_data / "hymenoptera" / "val", load_content=False)
    return sorted(files.filenames)


@pytest.fixture(scope="module")
def weights(test_data):
    return test_data / "weights" / "squeezenet1_1-imagenet.pth"


@pytest.fixture(scope="module")
def plain_features(photographs, weights):
    """Compute features with the network and transform of torchvision, one by one."""
    net = models.squeezenet1_1()
    net.load_state_dict(torch.load(weights, weights_only=True))
    transform = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
    rows = []
    with torch.inference_mode():
        for path in photographs:
            with Image.open(path) as image:
                x = transform(image.convert("RGB"))
            rows.append(net.eval().features(x[None]).mean((2, 3)))
    return torch.cat(rows).numpy()


@pytest.mark.slow
def test_real_features_equal_those_of_torchvision(photographs, weights, plain_features):
    got = PretrainedFeatures("squeezenet1_1", weights=weights).transform(photographs)
    assert len(photographs) == 153
    assert np.abs(got - plain_features).max() <= 1e-4 * np.abs(plain_features).max()


@pytest.mark.slow
@needs_native_bfloat16
def test_real_features_in_bfloat16(photographs, weights, plain_features):
    mine = PretrainedFeatures("squeezenet1_1", weights=weights, precision="bfloat16")
    got = mine.transform(photographs)
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(plain_features, axis=1)
    assert ((got * plain_features).sum(1) / lengths).min() >= 0.999


@pytest.mark.slow
def test_real_rows_do_not_depend_on_order_workers_or_batches(photographs, weights):
    mine = PretrainedFeatures("squeezenet1_1", weights=weights)
    X = np.array(photographs[:100])
    rows = mine.transform(X)
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(mine.transform(X[order]), rows[order])
    np.testing.assert_array_equal(clone(mine).set_params(n_jobs=2).transform(X), rows)
    for batch_size in (1, 7, 64):
        other = clone(mine).set_params(batch_size=batch_size).transform(X)
        assert np.abs(other - rows).max() <= 1e-5 * np.abs(rows).max()
    one = mine.transform(X[:1])
    assert np.abs(one - rows[:1]).max() <= 1e-5 * np.abs(rows).max()


def test_fake_features_equal_those_of_torchvision(paths, tmp_path):
    """The same as for real features, without test data."""
    torch.manual_seed(0)
    net = models.squeezenet1_1().eval()
    file = saved(net, tmp_path / "mine.pth")
    transform = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
    with torch.inference_mode():
        x = torch.stack([transform(Image.open(path)) for path in paths[:5]])
        expected = net.features(x).mean((2, 3)).numpy()
    got = PretrainedFeatures("squeezenet1_1", weights=file).transform(paths[:5])
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


MEMORY = """
import sys, psutil
from sktl import PretrainedFeatures
class Paths(list):
    # Records the memory in use when a row is requested.
    def __getitem__(self, i):
        if isinstance(i, int) and i % 500 == 0:
            sizes[i] = psutil.Process().memory_info().rss
        return super().__getitem__(i)
sizes = {}
n = int(sys.argv[1])
X = Paths((sys.argv[2:] * n)[:n])
mine = PretrainedFeatures("squeezenet1_1", weights=None, image_size=32, layer="stem")
mine.transform(X)
late = max(size for i, size in sizes.items() if i >= n // 10)
print((late - sizes[n // 10]) / 2**20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_paths(paths):
    command = [sys.executable, "-c", MEMORY, "20000", *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    grown = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout
    output = 20_000 * 64 * 4 / 2**20  # MB, filled while rows are computed
    assert float(grown) <= output + 50


@pytest.mark.skipif(shutil.which("mkfifo") is None, reason="needs named pipes")
def test_a_named_pipe_raises_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"X\[0\].*pipe\.jpg"):
        PretrainedFeatures("tiny").transform([tmp_path / "pipe.jpg"])


def test_reducing_gap_decodes_large_jpeg_files_at_reduced_size(tmp_path, monkeypatch):
    photograph = Image.fromarray(load_sample_images().images[0]).resize((1280, 854))
    photograph.save(path := tmp_path / "large.jpg", quality=95)
    sizes = []
    resized = Preprocessing.__call__
    monkeypatch.setattr(
        Preprocessing,
        "__call__",
        lambda self, image: sizes.append(image.size) or resized(self, image),
    )
    mine = PretrainedFeatures("resnet_mini", memory=tmp_path / "store")
    whole = mine.transform([path])
    reduced = clone(mine).set_params(reducing_gap=2.0).transform([path])
    assert sizes == [(1280, 854), (160, 107)]
    assert 0 < np.abs(reduced - whole).max() < 0.2 * np.abs(whole).max()
    np.testing.assert_array_equal(mine.transform([path]), whole)
    assert len(sizes) == 2  # both are cached, separately
