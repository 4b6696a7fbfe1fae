"""
======================================
Benchmark the accuracy of fine-tuning
======================================

The benchmark compares `FineTunedCNNClassifier` without any tuning, fixed settings of
it, frozen features with a tuned logistic regression, and scripts in plain torch that a
user would write instead (``transfer_scripts.py``, ``transfer_recipes.py``), on data
sets that are near to and far from ImageNet (``transfer_data.py``). In a cell, which is
a data set, a number of labels per class, a network and an image size, all methods have
the same training images, preprocessing and pretrained weights, and are scored on the
same test images, which are used for nothing else. Each seed draws other training and
test images; seed 0 of ants and bees is the split of the data set.

::

    python examples/benchmarks/transfer_quality.py --out FOLDER
    python examples/benchmarks/transfer_quality.py --quick --out FOLDER

The first takes about two hours on two cores, the second a few minutes, without other
data than the digits of scikit-learn. Each result is written to ``FOLDER`` as soon as it
is known, and a second run computes only what is missing there: use another folder after
a change of the code. ``--report`` prints the tables of the results so far.

*Standard errors.* Of the difference of two methods in a cell: the larger one of the
standard error of the mean over the seeds, which is unreliable for three seeds, and of
that over the test images, of which both methods have the same.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transfer_data import (
    CELLS,
    LOADERS,
    MORE_CELLS,
    QUICK_CELLS,
    Cell,
    Images,
    Setting,
    reason_to_skip,
    setting_of,
)
from transfer_recipes import autogluon, fastai_itself, fastai_recipe
from transfer_report import Results, print_report
from transfer_scripts import Script, tutorial

from sktl import FineTunedCNNClassifier, PretrainedFeatures

DATA = Path(os.environ.get("SKTL_TEST_DATA", "../shared/data"))


@dataclass(frozen=True)
class Method:
    """A method to compare.

    Attributes
    ----------
    name : str
        Name on the command line and in the tables.
    build : callable
        From a `Setting` and a seed to an object with ``fit(X, y)`` and ``predict(X)``.
    n_passes : float
        Time of its fit, in training steps per training image, for the estimate.
    """

    name: str
    build: Callable[[Setting, int], Any]
    n_passes: float


def frozen(setting: Setting, seed: int) -> Any:
    """Return frozen features and a logistic regression, tuned by log loss."""
    return make_pipeline(
        PretrainedFeatures(**setting.parameters),
        GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
            {"logisticregression__C": np.logspace(-4, 2, 13)},
            scoring="neg_log_loss",
            cv=StratifiedKFold(5, shuffle=True, random_state=seed),
        ),
    )


def fine_tuned(setting: Setting, seed: int, **parameters: Any) -> Any:
    """Return a `FineTunedCNNClassifier` with other parameters than the defaults."""
    return FineTunedCNNClassifier(**setting.parameters, **parameters, random_state=seed)


def script(train: Callable[[Any], Any]) -> Callable[[Setting, int], Script]:
    """Return a function that builds a script."""
    return partial(Script, train)


# Settings of fine-tuning besides the learning rate that nothing in the data changes.
FIXED = {
    "head_init": "linear_probe",
    "wise_ft_alpha": 1.0,
    "lr_schedule": "cosine",
    "batch_size": 32,
}

METHODS = [
    Method("frozen", frozen, 1 / 3),
    Method("probe", partial(fine_tuned, max_epochs=0), 1 / 3),
    Method("default", fine_tuned, 25),
    Method(
        "fixed-1e-4",
        partial(fine_tuned, **{**FIXED, "wise_ft_alpha": 0.4}, lr=1e-4),
        10,
    ),
    Method("fixed-1e-3", partial(fine_tuned, **FIXED, lr=1e-3), 10),
    Method(
        "random-1e-3",
        partial(fine_tuned, **{**FIXED, "head_init": "random"}, lr=1e-3),
        10,
    ),
    # Small batches take longer per image.
    Method("tutorial-all", script(partial(tutorial, tune_all=True)), 25 * 1.5),
    Method("tutorial-head", script(partial(tutorial, tune_all=False)), 25 / 2),
    Method("fastai-recipe", script(fastai_recipe), 11),
    Method("autogluon", script(autogluon), 20),
]
if find_spec("fastai"):
    METHODS.append(Method("fastai", script(fastai_itself), 11))


@dataclass(frozen=True)
class Unit:
    """What is computed and stored at once."""

    cell: Cell
    seed: int
    method: Method

    def file(self, folder: Path) -> Path:
        """Return the path of the result."""
        return folder / f"{self.cell.name}-seed{self.seed}-{self.method.name}.json"

    def estimated_seconds(self, images: Images) -> float:
        """Return a rough estimate of the time on two cores."""
        train, test = images.split(self.cell.n_labels, self.seed)
        n_steps = self.method.n_passes * len(train) + len(test) / 3
        return n_steps * self.cell.milliseconds / 1000


def units(
    cells: Sequence[Cell], methods: Sequence[Method], n_seeds: int
) -> Iterator[Unit]:
    """Yield the units so that a run that is interrupted has complete seeds."""
    for data in dict.fromkeys(cell.data for cell in cells):
        for seed in range(n_seeds):
            for cell in cells:
                if cell.data == data:
                    for method in methods:
                        yield Unit(cell, seed, method)


def compute(unit: Unit, images: Images, folder: Path) -> dict[str, Any]:
    """Fit and score a method: one result, as it is stored."""
    train, test = images.split(unit.cell.n_labels, unit.seed)
    setting = setting_of(unit.cell, images, folder)
    classifier = unit.method.build(setting, unit.seed)
    start = time.perf_counter()
    classifier.fit(images.X[train], images.y[train])
    fitted = time.perf_counter()
    correct = classifier.predict(images.X[test]) == images.y[test]
    predicted = time.perf_counter()
    chosen = {
        name: getattr(classifier, name)
        for name in ("lr_", "head_init_", "wise_ft_alpha_")
        if hasattr(classifier, name)
    }
    return {
        "cell": unit.cell.name,
        "seed": unit.seed,
        "method": unit.method.name,
        "n_train": len(train),
        "accuracy": float(np.mean(correct)),
        "correct": "".join("01"[int(each)] for each in correct),
        "fit_seconds": round(fitted - start, 2),
        "predict_seconds": round(predicted - fitted, 2),
        "chosen": {k: v if isinstance(v, str) else float(v) for k, v in chosen.items()},
        "torch": torch.__version__,
        "n_threads": torch.get_num_threads(),
    }


def write(result: dict[str, Any], file: Path) -> None:
    """Write a result, so that the file is complete or missing."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(file)


def compute_missing(
    todo: Sequence[Unit], images: dict[str, Images], folder: Path, out: Path
) -> None:
    """Compute and store units, and print a line for each."""
    for i, unit in enumerate(todo, start=1):
        result = compute(unit, images[unit.cell.data], folder)
        write(result, unit.file(out))
        chosen = "".join(f", {k}={v}" for k, v in result["chosen"].items())
        print(
            f"{i}/{len(todo)} {unit.cell.name} seed {unit.seed} {unit.method.name}: "
            f"{result['accuracy']:.3f} in {result['fit_seconds']:.1f} s{chosen}",
            flush=True,
        )


def available(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """Return the cells that can be computed here, and print why others cannot."""
    kept = []
    for cell in cells:
        reason = reason_to_skip(cell, folder)
        if reason is None:
            kept.append(cell)
        else:
            print(f"left out: {cell.name}: {reason}")
    return kept


def select(names: str | None, known: dict[str, Any], option: str) -> list[Any]:
    """Return the values with the names that an option lists, by default all."""
    chosen = list(known) if names is None else names.split(",")
    unknown = sorted(set(chosen) - known.keys())
    if unknown:
        raise SystemExit(
            f"{option} must list some of {', '.join(known)}. Got {', '.join(unknown)}."
        )
    return [known[name] for name in known if name in chosen]


def read(every: Sequence[Unit], out: Path) -> Results:
    """Return the stored results by cell, seed and method."""
    results: Results = {}
    for unit in every:
        result = json.loads(unit.file(out).read_text())
        results.setdefault(unit.cell.name, {}).setdefault(unit.seed, {})[
            unit.method.name
        ] = result
    return results


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Benchmark the accuracy of methods")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data")
    parser.add_argument("--quick", action="store_true", help="one cell, one seed")
    parser.add_argument("--seeds", type=int, help="number of seeds, by default 3")
    parser.add_argument("--only", help="names of methods, separated by commas")
    parser.add_argument("--cells", help="names of cells, separated by commas")
    parser.add_argument(
        "--report", action="store_true", help="compute nothing, print what is stored"
    )
    return parser.parse_args()


def main() -> None:
    """Compute what is missing, and print the tables."""
    arguments = parse_arguments()
    cells = list(QUICK_CELLS if arguments.quick else CELLS)
    if arguments.cells is not None:
        known = {cell.name: cell for cell in (*CELLS, *MORE_CELLS)}
        cells = select(arguments.cells, known, "--cells")
    methods = select(arguments.only, {m.name: m for m in METHODS}, "--only")
    n_seeds = arguments.seeds or (1 if arguments.quick else 3)
    arguments.out.mkdir(parents=True, exist_ok=True)

    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    if not find_spec("fastai"):
        print("left out: fastai: it is not installed")
    if not arguments.report:
        cells = available(cells, arguments.data)
    every = list(units(cells, methods, n_seeds))
    todo = [unit for unit in every if not unit.file(arguments.out).exists()]
    if not arguments.report:
        data = {unit.cell.data for unit in todo}
        images = {name: LOADERS[name](arguments.data) for name in sorted(data)}
        seconds = sum(u.estimated_seconds(images[u.cell.data]) for u in todo)
        print(
            f"{len(cells)} cells, {len(methods)} methods, {n_seeds} seeds: {len(todo)} "
            f"of {len(every)} results to compute, about {seconds / 60:.0f} minutes",
            flush=True,
        )
        compute_missing(todo, images, arguments.data, arguments.out)
    stored = [unit for unit in every if unit.file(arguments.out).exists()]
    print_report(read(stored, arguments.out), [method.name for method in methods])


if __name__ == "__main__":
    main()
