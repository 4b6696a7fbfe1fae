"""The examples run on small data, and resume after an interruption."""

import http.server
import importlib
import io
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared_fixtures import five_stages
from sklearn.model_selection import ParameterGrid

from sktl import (
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedFeatures,
    register_backbone,
)

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch):
    """Give a function that runs an example as the command line does."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module = importlib.import_module(name)
        module.main()
        return module

    return run


@pytest.fixture
def folder(images, tmp_path):
    """Write the images to a folder per class, 15 to learn from and 5 to score."""
    for i, image in enumerate(images):
        part = "val" if i % 4 == 0 else "train"
        path = tmp_path / part / ("china", "flower")[i // 20] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path


@pytest.fixture
def five_categories():
    """Register a small network with stages and categories; return its name."""
    register_backbone(
        "five categories",
        five_stages,
        preprocessing=Preprocessing(64, 64),  # stage3 has 4 x 4 positions
        categories=tuple("abcde"),
    )
    return "five categories"


def test_ants_and_bees(run, folder, capsys):
    run("ants_and_bees", "--data", folder, "--backbone", "tiny")
    out = capsys.readouterr().out
    assert "30 training and 10 validation photographs" in out
    assert "validation accuracy" in out


@pytest.mark.docs
def test_fine_tune(run, folder, five_categories, capsys):
    arguments = ["--data", folder, "--backbone", five_categories]
    run("fine_tune", *arguments, "--epochs", 1, "--folds", 2)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("±")[0].rsplit(maxsplit=1) for line in lines if "±" in line]
    assert len(rows) == 6
    assert all(0 <= float(accuracy) <= 1 for _, accuracy in rows)
    assert lines[-1].startswith("validation accuracy of ")


@pytest.fixture
def server(tmp_path):
    """Serve an archive of photographs that are not the tutorial's."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hymenoptera_data/train/ants/1.jpg", b"not an ant")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive.getvalue())))
            self.end_headers()
            self.wfile.write(archive.getvalue())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/data.zip"
        running.shutdown()
        thread.join()


def test_photographs_that_are_fetched_are_verified(run, folder, server, tmp_path):
    example = run("ants_and_bees", "--data", folder, "--backbone", "tiny")
    example.URL = server
    with pytest.raises(SystemExit, match="do not match those of the tutorial"):
        example.fetch(tmp_path / "cache")
    example.URL = "http://127.0.0.1:9/closed.zip"
    with pytest.raises(SystemExit, match=r"Cannot download .* pass --data"):
        example.fetch(tmp_path / "other")


@pytest.mark.docs
def test_the_digest_is_of_the_real_photographs(run, folder, test_data):
    example = run("ants_and_bees", "--data", folder, "--backbone", "tiny")
    assert example.digest_of(test_data / "hymenoptera") == example.DIGEST


def test_three_strategies_fine_tune_with_the_defaults(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    strategies = importlib.import_module("three_strategies").strategies
    estimators = strategies({"backbone": "tiny"})
    tuned = estimators["fine-tuned: from pretrained weights"]
    default = FineTunedCNNClassifier("tiny", random_state=0)
    assert tuned.get_params() == default.get_params()
    assert estimators["fine-tuned: from random weights"].weights is None


def test_three_strategies_search_every_layer_of_the_frozen_rows(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    strategies = importlib.import_module("three_strategies").strategies
    search = strategies({"backbone": "tiny"})["frozen: layer and pooling searched"]
    names = ("pretrainedfeatures__layer", "pretrainedfeatures__pooling")
    tried = [tuple(each[n] for n in names) for each in ParameterGrid(search.param_grid)]
    assert len(tried) == len(set(tried)) == 7
    assert ("penultimate", "avg") in tried


@pytest.mark.docs
def test_three_strategies_on_ones_own_folder(run, folder, five_categories, capsys):
    arguments = ["--data", folder / "train", "--backbone", five_categories]
    run("three_strategies", *arguments, "--labels", 4, "--repeats", 1)
    out = capsys.readouterr().out
    for row in ("raw pixels", "no training", "frozen: penultimate", "frozen: layer"):
        assert row in out
    for row in ("fine-tuned: from pretrained", "fine-tuned: from random"):
        assert row in out
    assert "chosen by the last search: layer=" in out


@pytest.mark.docs
def test_choosing_a_backbone_computes_each_image_once(run, monkeypatch, capsys):
    example = importlib.import_module("choose_a_backbone_by_grid_search")
    monkeypatch.setattr(example, "LAYERS", ["stage2", "penultimate"])
    monkeypatch.setattr(example, "C", [0.01, 0.1])
    run("choose_a_backbone_by_grid_search", "--labels", 3)
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line.split()[-2].replace(",", "")) for line in lines[2:5]]
    # 8 candidates and 3 folds each see 30 images; then once more for the best. There
    # are two networks and two layers.
    assert counts == [8 * 3 * 30 + 30, 2 * 2 * 30, 0]
    assert "cached rows: 120" in lines[5]


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Write two files of 40 and 10 random images in 4 categories."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("val", 10)):
        files = []
        for _ in range(n):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "jpeg")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        np.savez(
            tmp_path / f"{part}.npz",
            jpeg=np.concatenate(files),
            offsets=np.cumsum([0, *map(len, files)]),
            label=np.arange(n) % 4,
            name=["cat, Felis", "dog", "cow", "hen"],
        )
    return tmp_path


@pytest.mark.docs
def test_pretraining_resumes_to_the_same_weights(
    run, tiny_imagenet, tmp_path, monkeypatch, capsys
):
    common = ["--data", tiny_imagenet, "--epochs", 2, "--precision", "float32"]
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    example = importlib.import_module("pretrain_resnet_mini")
    monkeypatch.setattr(example, "BATCH_SIZE", 16)  # two batches per epoch
    # Muon iterates in bfloat16, which is slow on a processor without native support.
    monkeypatch.setitem(example.MUON, "ns_steps", 1)
    run("pretrain_resnet_mini", *common, "--out", whole)

    train_epoch = example.train_epoch

    def killed(epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(epoch, *rest)

    monkeypatch.setattr(example, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run("pretrain_resnet_mini", *common, "--out", resumed)
    monkeypatch.setattr(example, "train_epoch", train_epoch)
    run("pretrain_resnet_mini", *common, "--out", resumed)

    assert "resumed after epoch 1" in capsys.readouterr().out
    assert whole.read_bytes() == resumed.read_bytes()
    card = whole.with_suffix(".md").read_text()
    assert "| categories | 4 of the ImageNet categories |" in card
    rows = PretrainedFeatures("resnet_mini", weights=whole).transform(
        [np.zeros((32, 32), np.uint8)]
    )
    assert rows.shape == (1, 256)
    assert torch.isfinite(torch.from_numpy(rows)).all()


@pytest.mark.slow
def test_the_throughput_benchmark_measures_all_methods(images, tmp_path):
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg")
    command = [sys.executable, EXAMPLES / "benchmarks" / "throughput.py"]
    command += ["--data", tmp_path, "--backbone", "shufflenet_v2_x0_5"]
    command += ["--images", "32"]
    command += ["--rounds", "1", "--skip", "embetter", "img2vec", "vision", "openvino"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for method in ("network alone", "sktl"):
        assert f"| {method}, torch float32 |" in out
    assert "not measured" not in out


@pytest.mark.slow
def test_the_transfer_benchmark_computes_each_result_once(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    arguments = ["--quick", "--only", "frozen,fastai-recipe"]
    arguments += ["--out", tmp_path / "out", "--data", tmp_path / "none"]
    outputs = []
    for _ in range(2):
        run("transfer_quality", *arguments)
        outputs.append(capsys.readouterr().out)
    assert "2 of 2 results to compute" in outputs[0]
    assert "0 of 2 results to compute" in outputs[1]
    tables = [out[out.index("Accuracy per cell") :] for out in outputs]
    assert tables[0] == tables[1]
    assert "| cell | n | seeds | frozen | fastai-recipe |" in tables[0]
    for method in ("frozen", "fastai-recipe"):
        assert f"\n| {method} | 0." in tables[0]


def test_the_transfer_benchmark_compares_methods_on_the_same_images(
    monkeypatch, capsys
):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    report = importlib.import_module("transfer_report")

    def results(**correct):
        return {
            name: {
                "accuracy": each.count("1") / len(each),
                "correct": each,
                "n_train": 9,
                "fit_seconds": 2.0,
            }
            for name, each in correct.items()
        }

    seeds = {
        0: results(frozen="1110", default="1000", autogluon="1100"),
        1: results(frozen="1111", default="1001", autogluon="1111"),
        2: results(frozen="1111"),  # incomplete
    }
    report.print_report({"cell": seeds}, ["frozen", "default", "autogluon"])
    lines = capsys.readouterr().out.splitlines()
    # The default loses two of four images to frozen features with both seeds. Each of
    # the eight differences has a variance of 1/4, so that of their mean is 1/32.
    assert "| cell | 9 | 2 | 0.875 ± 0.177 | 0.375 ± 0.177 | 0.750 ± 0.354 |" in lines
    assert "| frozen | 0.8750 | 0.1250 | 0.1768 | 1.00 | 2.0 |" in lines
    assert f"  cell: -0.5000 ± {(1 / 32) ** 0.5:.4f}" in lines
    assert lines[-5].endswith("more than one standard error in 1 of 1 cells: cell.")
    # The script wins by one image and by two.
    assert "  cell: autogluon by 0.3750 ± 0.1654" in lines
    assert lines[-1] == "  in 1 of 1 cells"


@pytest.fixture
def coverage_checks(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    return importlib.import_module("coverage_checks")


def check_all(coverage_checks, name):
    *_, result = coverage_checks.examine(name, max_parameters=30e6)
    outcomes = {check: result[check] for check in coverage_checks.CHECKS}
    assert outcomes == dict.fromkeys(coverage_checks.CHECKS, "yes")
    return result["kind"], result["n_stages"]


@pytest.mark.parametrize(
    ("name", "kind", "n_stages"),
    [
        ("squeezenet1_1", "CNN", 4),
        pytest.param("timm/test_efficientnet", "CNN", 5, marks=pytest.mark.slow),
        pytest.param("timm/test_vit", "transformer", 5, marks=pytest.mark.slow),
    ],
)
def test_all_checks_of_coverage_pass(coverage_checks, name, kind, n_stages):
    assert check_all(coverage_checks, name) == (kind, n_stages)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mnasnet0_5", "CNN"),
        ("timm/edgenext_xx_small", "transformer"),
        ("timm/hrnet_w18_small", "CNN"),
        ("timm/mixer_s32_224", "other"),
        ("timm/mobilenetv4_conv_small_050", "CNN"),
        ("timm/pvt_v2_b0", "transformer"),
        ("timm/test_byobnet", "CNN"),
        ("timm/test_coatnet", "transformer"),
        ("timm/test_convnext", "CNN"),
        ("timm/test_mambaout", "CNN"),
        ("timm/test_nfnet", "CNN"),
        ("timm/test_vit_relpos", "transformer"),
        ("timm/xcit_nano_12_p16_224", "transformer"),
    ],
)
def test_all_checks_of_coverage_pass_for_more_families(coverage_checks, name, kind):
    assert check_all(coverage_checks, name)[0] == kind


def test_coverage_finds_another_neck_and_other_stages(coverage_checks):
    name = "timm/test_resnet"
    backbone = coverage_checks.declare_without_weights(name, None, on_meta=False)
    backbone.neck.append(torch.nn.Softplus())
    del backbone.stages["stage1"][0]
    for check in (coverage_checks.check_penultimate, coverage_checks.check_stages):
        assert coverage_checks.attempt(lambda c=check: c(backbone, 96)) != "yes"


@pytest.mark.slow
def test_coverage_resumes_and_reports_each_network(tmp_path):
    pytest.importorskip("timm")
    command = [sys.executable, EXAMPLES / "benchmarks" / "coverage.py"]
    command += ["--out", tmp_path, "--only"]

    def lines(*arguments):
        done = subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()

    row = "| resnet | CNN | 1 | {0} | 1 of 1 | {0} | {0} |"
    assert row.format("0 of 0") in lines("timm/test_resnet", "--checks", "stages")
    first = lines("timm/test_resnet")
    assert first[0] == "1 of 1 networks to check"
    second = lines("timm/test_[nr]*net", "--limit-seconds", "0")
    assert second[0] == "1 of 2 networks to check"
    for out in (first, second):
        assert row.format("1 of 1") in out
    assert f"| nfnet | unknown | 1{' | 0 of 1' * 4} |" in second
    assert "- 1 stages: it takes longer than the limit" in second


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("name", "needs"),
    [("features_on_dask", "dask.dataframe"), ("features_on_ray", "ray.data")],
)
def test_features_on_a_cluster(name, needs):
    pytest.importorskip(needs)
    # As a program: other processes import what it defines.
    command = [sys.executable, EXAMPLES / f"{name}.py", "--digits", "30"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "cached rows: 30\n" in out
    assert "equal to the rows of the first call: True" in out
