"""
===========================================================
Choose network, layer and regularization by one grid search
===========================================================

One grid searches all three. Without ``memory``, every image passes through the network
for each candidate and fold. With ``memory``, features are cached: each image passes
through each network and layer once, and a second search computes no features.

::

    python examples/choose_a_backbone_by_grid_search.py

compares the bundled network with an untrained one on scanned digits, and needs no
network connection. ``--data FOLDER --backbones resnet18 mobilenet_v3_small`` uses your
own images, in one folder per class.
"""

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from sklearn.datasets import load_digits, load_files
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from sktl import FeatureStore, Preprocessing, PretrainedFeatures

LAYERS = ["stage2", "stage3", "penultimate"]
C = [0.001, 0.01, 0.1]


def digits(n_per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Load scanned digits, `n_per_class` each: 8 x 8 pixels, values from 0 to 16."""
    X, y = load_digits(return_X_y=True)
    rows = np.concatenate([np.flatnonzero(y == c)[:n_per_class] for c in range(10)])
    return X[rows], y[rows]


def search(X, y, grid, memory, pixel_range):
    """Fit the grid; return it, the time, and the number of images computed."""
    model = Pipeline(
        [
            ("features", PretrainedFeatures(memory=memory, pixel_range=pixel_range)),
            ("scaler", StandardScaler()),
            ("classifier", LogisticRegression(max_iter=2000)),
        ]
    )
    cv = StratifiedKFold(3, shuffle=True, random_state=0)
    n = 0
    plain = Preprocessing.__call__

    def counted(self, image):  # called for each image that passes through a network
        nonlocal n
        n += 1
        return plain(self, image)

    start = time.perf_counter()
    with mock.patch.object(Preprocessing, "__call__", counted):
        fitted = GridSearchCV(model, grid, cv=cv).fit(X, y)
    return fitted, time.perf_counter() - start, n


def main() -> None:
    """Search three times, and count the images that pass through the networks."""
    parser = argparse.ArgumentParser(description="Choose a backbone by grid search")
    parser.add_argument("--data", type=Path, help="one folder per class")
    parser.add_argument("--backbones", nargs="+", help="names of list_backbones()")
    parser.add_argument("--labels", type=int, default=6, help="digits of each class")
    arguments = parser.parse_args()

    pixel_range: tuple[float, float] | str = "auto"
    if arguments.data:
        files = load_files(arguments.data, load_content=False)
        X, y = files.filenames, files.target
    else:
        X, y = digits(arguments.labels)
        pixel_range = (0, 16)
    grid = [
        {"features__backbone": [name], "features__layer": LAYERS, "classifier__C": C}
        for name in arguments.backbones or ["resnet_mini"]
    ]
    if not arguments.backbones:
        untrained = {"features__weights": [None], "features__image_size": [32]}
        grid.append({**grid[0], "features__backbone": ["resnet18"], **untrained})

    print(f"{len(X)} images, 3 folds")
    print(f"{'':24}{'images':>10}{'seconds':>10}")
    with tempfile.TemporaryDirectory() as directory:
        for title, memory in [
            ("without memory", None),
            ("with memory", directory),
            ("with memory, again", directory),
        ]:
            fitted, seconds, n = search(X, y, grid, memory, pixel_range)
            print(f"{title:24}{n:10,}{seconds:10.1f}")
        rows = FeatureStore(directory).info()["rows"]
    print(f"cached rows: {rows:,}")
    best = ", ".join(f"{k.split('__')[1]}={v}" for k, v in fitted.best_params_.items())
    print(f"best: {best}; cross-validated accuracy {fitted.best_score_:.3f}")


if __name__ == "__main__":
    main()
