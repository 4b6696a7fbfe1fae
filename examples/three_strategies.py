"""
==========================================
Compare the three strategies on few labels
==========================================

A pretrained network can be used without training, as a fixed feature extractor, or
fine-tuned. Which strategy is best depends on the difference between your images and the
pretraining data, and on the number of labels. This example compares them on scanned
digits, which differ from the photographs that the bundled network was trained on, with
ten labelled images per digit. Nothing is downloaded.

::

    python examples/three_strategies.py

For your own images, in one folder per class:

::

    python examples/three_strategies.py --data FOLDER --backbone resnet18

The network is fine-tuned with the defaults of ``FineTunedCNNClassifier``, which selects
its learning rate on held-out training images.

With matplotlib (``pip install ".[plot]"``), ``--plot FILE`` saves a plot of the
accuracy against the number of labels.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import load_digits, load_files
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sktl import FineTunedCNNClassifier, PretrainedClassifier, PretrainedFeatures

ImageSequence = NDArray[Any]


def raw_pixels(X: ImageSequence) -> NDArray[np.float64]:
    """Return images as rows of pixels; files are resized to 32 x 32."""
    if X.ndim > 1:
        return X.reshape(len(X), -1)
    rows = []
    for path in X:
        with Image.open(path) as image:
            rows.append(np.ravel(image.convert("RGB").resize((32, 32))))
    return np.asarray(rows, dtype=np.float64)


def with_classifier(*steps: Any) -> Pipeline:
    """Append a scaler and a logistic regression to the given steps."""
    return make_pipeline(*steps, StandardScaler(), LogisticRegression(max_iter=1000))


def strategies(shared: dict[str, Any]) -> dict[str, BaseEstimator]:
    """Return an estimator for each strategy, and for the baselines."""
    features = with_classifier(PretrainedFeatures(**shared))
    tuned = FineTunedCNNClassifier(**shared, random_state=0)
    # There is no probe to start from, and a high learning rate distorts nothing.
    scratch = {"weights": None, "head_init": "random", "lr": 1e-3}
    return {
        "raw pixels": with_classifier(FunctionTransformer(raw_pixels)),
        "no training: PretrainedClassifier": PretrainedClassifier(**shared),
        "frozen: penultimate": features,
        "frozen: layer and pooling searched": GridSearchCV(
            clone(features),
            [
                {
                    "pretrainedfeatures__layer": ["penultimate"],
                    "pretrainedfeatures__pooling": ["avg"],
                },
                {
                    "pretrainedfeatures__layer": ["stage1", "stage2", "stage3"],
                    "pretrainedfeatures__pooling": ["avg", 4],
                },
            ],
            cv=3,
        ),
        "fine-tuned: from pretrained weights": tuned,
        "fine-tuned: from random weights": clone(tuned).set_params(**scratch),
    }


def n_trained(fitted: Any) -> int:
    """Count the parameters that were trained."""
    if isinstance(fitted, GridSearchCV):
        fitted = fitted.best_estimator_
    if isinstance(fitted, PretrainedClassifier):
        return int(np.prod(fitted.class_proba_given_category_.shape))
    if isinstance(fitted, FineTunedCNNClassifier):
        return sum(p.numel() for p in fitted.module_.parameters())
    head = fitted[-1]
    return int(head.coef_.size + head.intercept_.size)


def splits(
    y: NDArray[Any], n_labels: int, n_repeats: int, n_test: int
) -> Iterable[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Draw `n_labels` training images per class, and test images."""
    fewest = np.unique(y, return_counts=True)[1].min()
    if fewest <= n_labels:
        raise SystemExit(
            f"Each class must have more than {n_labels} images, for training and "
            f"test. Got {fewest} in the smallest class. Use a smaller --labels."
        )
    n_train = n_labels * len(np.unique(y))
    n_test = min(n_test, len(y) - n_train)
    return StratifiedShuffleSplit(
        n_repeats, train_size=n_train, test_size=n_test, random_state=0
    ).split(y, y)


def compare(
    X: ImageSequence, y: NDArray[Any], estimators: dict[str, BaseEstimator], cv: Any
) -> dict[str, list[float]]:
    """Fit and score each estimator on each split, and print one row of the table."""
    print(f"{'':36} accuracy          seconds    trained")
    accuracies: dict[str, list[float]] = {}
    for name, estimator in estimators.items():
        accuracies[name] = []
        start = time.perf_counter()
        for train, test in cv:
            estimator.fit(X[train], y[train])
            accuracies[name].append(estimator.score(X[test], y[test]))
        seconds = (time.perf_counter() - start) / len(cv)
        mean, spread = np.mean(accuracies[name]), np.std(accuracies[name])
        trained = n_trained(estimator)
        print(f"{name:36} {mean:.3f} ± {spread:.3f}   {seconds:8.1f}   {trained:8,}")
        if isinstance(estimator, GridSearchCV):
            best = [
                f"{k.split('__')[1]}={v}" for k, v in estimator.best_params_.items()
            ]
            print(f"{'':36} chosen by the last search: {', '.join(best)}")
    return accuracies


def plot(file: Path, run: Callable[[int], dict[str, list[float]]]) -> None:
    """Plot accuracy against the number of labels per class."""
    import matplotlib.pyplot as plt

    labels = [3, 10, 30]
    curves: dict[str, list[float]] = {}
    for n_labels in labels:
        print(f"\n{n_labels} labels per class")
        for name, accuracies in run(n_labels).items():
            curves.setdefault(name, []).append(float(np.mean(accuracies)))
    _, ax = plt.subplots(layout="constrained")
    for name, accuracies in curves.items():
        ax.plot(labels, accuracies, marker="o", label=name)
    ax.set(xlabel="labels per class", ylabel="accuracy", xscale="log", xticks=labels)
    ax.set_xticklabels(labels)
    ax.legend()
    ax.figure.savefig(file)


def main() -> None:
    """Compare the strategies on digits, or on a folder of images."""
    parser = argparse.ArgumentParser(description="Compare the three strategies")
    parser.add_argument("--data", type=Path, help="one folder per class")
    parser.add_argument("--backbone", default="resnet_mini")
    parser.add_argument("--weights", default="DEFAULT", help="name or file")
    parser.add_argument("--labels", type=int, default=10, help="per class")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="file to save a plot to")
    arguments = parser.parse_args()

    shared: dict[str, Any] = {
        "backbone": arguments.backbone,
        "weights": arguments.weights,
    }
    if arguments.data:
        files = load_files(arguments.data, load_content=False)
        X, y = files.filenames, np.array(files.target_names)[files.target]
    else:
        digits = load_digits()  # (1797, 8, 8), values from 0 (black) to 16 (white)
        X, y = digits.images, digits.target
        shared |= {"pixel_range": (0, 16), "image_size": 32}

    def run(n_labels: int) -> dict[str, list[float]]:
        cv = list(splits(y, n_labels, arguments.repeats, n_test=500))
        # Folds, candidates and repeats use the same images, so features are cached.
        with tempfile.TemporaryDirectory() as memory:
            return compare(X, y, strategies({**shared, "memory": memory}), cv)

    print(
        f"{arguments.labels} labels for each of {len(np.unique(y))} classes, "
        f"{arguments.backbone}, {arguments.repeats} repeats"
    )
    accuracies = run(arguments.labels)
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}
    best = max(means, key=lambda name: means[name])
    print(
        f"\nMost accurate: {best}.\nOn photographs, penultimate features are often "
        "sufficient. On other images, features of\nlower stages, pooled over a grid, "
        "are often more accurate."
    )
    if arguments.plot:
        plot(arguments.plot, run)


if __name__ == "__main__":
    main()
