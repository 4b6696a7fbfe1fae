"""
=====================================================
Compare strategies and fine-tuning depths in a search
=====================================================

A pretrained network without training, as a fixed feature extractor, and fine-tuned to
several depths are candidates of one ``GridSearchCV`` on photographs of ants and bees.
The table shows the cross-validated accuracy of each candidate, its standard deviation
over the folds, and the fit time. The best candidate is scored on held-out photographs.

::

    python examples/fine_tune.py

downloads the same files as ``ants_and_bees.py``. With local copies:

::

    python examples/fine_tune.py --data FOLDER --backbone NAME --weights FILE

where ``FOLDER`` contains ``train`` and ``val``, each with one folder per class.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from ants_and_bees import fetch
from sklearn.datasets import load_files
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sktl import FineTunedCNNClassifier, PretrainedClassifier, PretrainedFeatures

PRECISIONS = ["float32", "bfloat16"]


def candidates(shared: dict[str, Any], max_epochs: int) -> dict[str, Any]:
    """Return an estimator for each row of the table."""
    tuned = {
        f"fine-tuned, trainable={depth!r}": FineTunedCNNClassifier(
            trainable=depth, max_epochs=max_epochs, random_state=0, **shared
        )
        for depth in ("head", 1, 2, "all")
    }
    return {
        "no training": PretrainedClassifier(**shared),
        "frozen features": make_pipeline(
            PretrainedFeatures(**shared),
            StandardScaler(),
            LogisticRegression(C=0.1, max_iter=1000),
        ),
        **tuned,
    }


def main() -> None:
    """Search, print the table, and score the best candidate."""
    parser = argparse.ArgumentParser(
        description="Compare strategies and fine-tuning depths"
    )
    parser.add_argument(
        "--data", type=Path, help="contains train and val, with one folder per class"
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="DEFAULT", help="name or file")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    arguments = parser.parse_args()
    data = arguments.data or fetch(Path(torch.hub.get_dir()) / "datasets")
    train = load_files(data / "train", load_content=False)
    val = load_files(data / "val", load_content=False)

    with tempfile.TemporaryDirectory() as memory:
        shared = {
            "backbone": arguments.backbone,
            "weights": arguments.weights,
            "precision": arguments.precision,
            "n_jobs": -1,
            "memory": memory,
        }
        rows = candidates(shared, arguments.epochs)
        search = GridSearchCV(
            Pipeline([("strategy", rows["no training"])]),
            {"strategy": list(rows.values())},
            cv=StratifiedKFold(arguments.folds, shuffle=True, random_state=0),
        )
        print(f"{len(rows)} candidates, {arguments.folds} folds: some minutes ...")
        search.fit(train.filenames, train.target)
        accuracy = search.score(val.filenames, val.target)

    found = search.cv_results_
    print(f"{arguments.backbone}, {len(train.target)} photographs, {torch.__version__}")
    print(f"{'':30} accuracy          seconds")
    for i, name in enumerate(rows):
        mean, std = found["mean_test_score"][i], found["std_test_score"][i]
        print(f"{name:30} {mean:.3f} ± {std:.3f}   {found['mean_fit_time'][i]:8.1f}")
    print(f"validation accuracy of {list(rows)[search.best_index_]}: {accuracy:.3f}")


if __name__ == "__main__":
    main()
