"""
==================================================
Classify ants and bees: features and a grid search
==================================================

This example extracts features from photographs in folders, tunes a logistic regression
in a pipeline by grid search, scores it on held-out photographs, and lists those that
are misclassified.

::

    python examples/ants_and_bees.py

downloads the photographs of PyTorch's transfer learning tutorial and torchvision's
weights once, 45 MB each, and compares both with a known digest. With local copies:

::

    python examples/ants_and_bees.py --data FOLDER --backbone NAME --weights FILE

where ``FOLDER`` contains ``train`` and ``val``, each with one folder per class. The
environment variables ``ANTS_AND_BEES_DATA``, ``ANTS_AND_BEES_BACKBONE`` and
``ANTS_AND_BEES_WEIGHTS`` set the defaults of these options.
"""

import argparse
import hashlib
import os
import time
import zipfile
from pathlib import Path

import torch
from sklearn.datasets import load_files
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from sktl import PretrainedFeatures

URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
FOLDER = "hymenoptera_data"
# Digest of the photographs in the archive, see `digest_of`.
DIGEST = "72ced508e764af85254b64d7815596bdfb7da77aa5a5cb19cd812f3abe9dc7ff"


def digest_of(folder: Path) -> str:
    """Return the SHA-256 digest of names and contents of the photographs."""
    digest = hashlib.sha256()
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*.jp*g"))
    for name in sorted(names):
        content = (folder / name).read_bytes()
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def fetch(parent: Path) -> Path:
    """Return the folder of the tutorial's photographs; download them if missing."""
    data = parent / FOLDER
    if not data.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        archive = parent / f"{FOLDER}.zip"
        try:
            torch.hub.download_url_to_file(URL, str(archive))
        except OSError as error:
            raise SystemExit(
                f"Cannot download the photographs from {URL}: {error}. Download and "
                "unpack them elsewhere, and pass --data FOLDER."
            ) from error
        with zipfile.ZipFile(archive) as file:
            file.extractall(parent)
        archive.unlink()
    if digest_of(data) != DIGEST:
        raise SystemExit(
            f"The photographs in {data} do not match those of the tutorial. Expected "
            f"digest {DIGEST}. Got {digest_of(data)}. Remove the folder and run this "
            "example again."
        )
    return data


def search_on(estimator: PretrainedFeatures) -> GridSearchCV:
    """Return a grid search over the regularization of the classifier."""
    pipeline = Pipeline(
        [
            ("features", estimator),
            ("scaler", StandardScaler()),
            ("classifier", LogisticRegression(max_iter=1000)),
        ]
    )
    return GridSearchCV(pipeline, {"classifier__C": [0.1, 1, 10]})


def main() -> None:
    """Fit on ``train``, score on ``val``, and list misclassified photographs."""
    getenv = os.environ.get
    parser = argparse.ArgumentParser(description="Classify ants and bees")
    parser.add_argument("--data", type=Path, default=getenv("ANTS_AND_BEES_DATA"))
    parser.add_argument(
        "--backbone", default=getenv("ANTS_AND_BEES_BACKBONE", "resnet18")
    )
    parser.add_argument("--weights", default=getenv("ANTS_AND_BEES_WEIGHTS", "DEFAULT"))
    arguments = parser.parse_args()
    data = arguments.data or fetch(Path(torch.hub.get_dir()) / "datasets")

    train = load_files(data / "train", load_content=False)
    val = load_files(data / "val", load_content=False)
    features = PretrainedFeatures(
        arguments.backbone, weights=arguments.weights, n_jobs=-1
    )
    print("Features are computed for each fold and candidate: a minute or two ...")
    start = time.perf_counter()
    search = search_on(features).fit(train.filenames, train.target)
    predicted = search.predict(val.filenames)
    seconds = time.perf_counter() - start

    print(f"{len(train.target)} training and {len(val.target)} validation photographs")
    for parameters, score in zip(
        search.cv_results_["params"],
        search.cv_results_["mean_test_score"],
        strict=True,
    ):
        print(f"cross-validated accuracy {score:.3f} with {parameters}")
    accuracy = (predicted == val.target).mean()
    print(f"validation accuracy {accuracy:.3f} in {seconds:.0f} s\n")

    print(f"{'predicted':>10}  {'true':>10}  photograph")
    for name, p, t in zip(val.filenames, predicted, val.target, strict=True):
        if p != t:
            names = val.target_names
            print(f"{names[p]:>10}  {names[t]:>10}  {Path(name).name}")


if __name__ == "__main__":
    main()
