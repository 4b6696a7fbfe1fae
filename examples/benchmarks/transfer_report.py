"""
===================================
Tables of the transfer quality test
===================================

Used by ``transfer_quality.py``. The tables contain only the seeds of a cell for which
all methods are computed, so that all are compared on the same images.
"""

import math
from typing import Any

import numpy as np
from scipy.stats import rankdata

# Results by cell, seed and method, as they are stored.
Results = dict[str, dict[int, dict[str, dict[str, Any]]]]
BASELINE, DEFAULT = "frozen", "default"
SCRIPTS = ("tutorial-all", "tutorial-head", "fastai-recipe", "fastai", "autogluon")


def complete(results: Results, methods: list[str]) -> Results:
    """Return the seeds that have results of all methods, and cells that have seeds."""
    kept = {
        cell: {
            seed: by_method
            for seed, by_method in sorted(seeds.items())
            if all(method in by_method for method in methods)
        }
        for cell, seeds in results.items()
    }
    return {cell: seeds for cell, seeds in kept.items() if seeds}


def values(seeds: dict[int, dict[str, Any]], method: str, key: str) -> Any:
    """Return a number of a method for each seed."""
    return np.array([by_method[method][key] for by_method in seeds.values()])


def spread(accuracies: Any) -> float:
    """Return the standard deviation over seeds, NaN for one seed."""
    return float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else math.nan


def difference(
    seeds: dict[int, dict[str, Any]], method: str, other: str
) -> tuple[float, float]:
    """Compare two methods in a cell.

    Returns
    -------
    mean : float
        Accuracy of the first method minus that of the second one.
    standard_error : float
        The larger one of two estimates: from the differences of the seeds, and from
        those of the test images, which are paired in both.
    """
    per_seed, variances = [], []
    for by_method in seeds.values():
        first, second = (
            np.array([int(each) for each in by_method[name]["correct"]])
            for name in (method, other)
        )
        per_seed.append(np.mean(first - second))
        variances.append(np.var(first - second) / len(first))
    over_images = math.sqrt(np.mean(variances) / len(variances))
    over_seeds = spread(per_seed) / math.sqrt(len(per_seed))
    return float(np.mean(per_seed)), float(np.fmax(over_images, over_seeds))


def print_cells(results: Results, methods: list[str]) -> None:
    """Print the mean accuracy, and the spread over the seeds, in each cell."""
    print("\nAccuracy per cell, ± standard deviation over seeds\n")
    print(f"| cell | n | seeds | {' | '.join(methods)} |")
    print("|---" * (3 + len(methods)) + "|")
    for cell, seeds in results.items():
        entries = []
        for method in methods:
            accuracies = values(seeds, method, "accuracy")
            entry = f"{np.mean(accuracies):.3f}"
            if len(accuracies) > 1:
                entry += f" ± {spread(accuracies):.3f}"
            entries.append(entry)
        n_train = values(seeds, methods[0], "n_train")[0]
        print(f"| {cell} | {n_train} | {len(seeds)} | {' | '.join(entries)} |")


def print_methods(results: Results, methods: list[str]) -> None:
    """Print a row per method, averaged over the cells."""
    accuracy = np.array(
        [
            [np.mean(values(seeds, method, "accuracy")) for method in methods]
            for seeds in results.values()
        ]
    )  # (n_cells, n_methods)
    ranks = rankdata(-accuracy, axis=1).mean(axis=0)
    print(
        f"\nMeans over {len(results)} cells. Standard error: of the mean, from the "
        "spread over seeds.\nRank 1 is the most accurate method of a cell; equal ones "
        "share the mean rank.\n"
    )
    print("| method | accuracy | standard error | spread | rank | s per fit |")
    print("|---|---|---|---|---|---|")
    for i, method in enumerate(methods):
        deviations = [
            spread(values(seeds, method, "accuracy")) for seeds in results.values()
        ]
        errors = [
            deviation / math.sqrt(len(seeds))
            for deviation, seeds in zip(deviations, results.values(), strict=True)
        ]
        error = math.sqrt(np.sum(np.square(errors))) / len(errors)
        seconds = [
            np.mean(values(seeds, method, "fit_seconds")) for seeds in results.values()
        ]
        numbers = [
            f"{number:.4f}" if math.isfinite(number) else ""  # of one seed
            for number in (accuracy[:, i].mean(), error, np.mean(deviations))
        ]
        print(
            f"| {method} | {' | '.join(numbers)} | {ranks[i]:.2f} | "
            f"{np.mean(seconds):.1f} |"
        )


def print_comparison(results: Results, methods: list[str]) -> None:
    """Print where the default is worse than frozen features, or than a script."""
    if DEFAULT not in methods:
        return
    if BASELINE in methods:
        worse = []
        print(f"\nThe default minus {BASELINE}, ± standard error of the difference:")
        for cell, seeds in results.items():
            mean, error = difference(seeds, DEFAULT, BASELINE)
            print(f"  {cell}: {mean:+.4f} ± {error:.4f}")
            if mean < -error:
                worse.append(cell)
        print(
            f"The default is worse than {BASELINE} by more than one standard error in "
            f"{len(worse)} of {len(results)} cells{': ' * bool(worse)}"
            f"{', '.join(worse)}."
        )
    scripts = [method for method in methods if method in SCRIPTS]
    if not scripts:
        return
    print("\nScripts that beat the default by more than one standard error:")
    n_cells = 0
    for cell, seeds in results.items():
        lines = []
        for method in scripts:
            mean, error = difference(seeds, method, DEFAULT)
            if mean > error:
                lines.append(f"  {cell}: {method} by {mean:.4f} ± {error:.4f}")
        n_cells += bool(lines)
        print("\n".join(lines), end="\n" if lines else "")
    print(f"  in {n_cells} of {len(results)} cells")


def print_report(results: Results, methods: list[str]) -> None:
    """Print all tables of the complete seeds.

    Parameters
    ----------
    results : dict
        Results by cell, seed and method.
    methods : list of str
        Names of the methods to compare.
    """
    kept = complete(results, methods)
    if not kept:
        print("\nNo cell has results of all methods yet.")
        return
    print_cells(kept, methods)
    print_methods(kept, methods)
    print_comparison(kept, methods)
