"""
=====================================================
Check every architecture of timm and of torchvision
=====================================================

The script builds each network with random weights and checks what the library does with
it:

- *penultimate*: the features are those of ``forward_head(forward_features(x),
  pre_logits=True)`` of timm, or the input of the last layer in torchvision;
- *stages*: the stages, followed by the head, have the output of the network;
- *fine-tunes*: a step of training with a new head changes the first stage, and a step
  with half of the stages frozen leaves these bit-equal;
- *OpenVINO* converts the network, and its features are those of torch.

Images have 96 pixels a side, or the next larger size that the network supports; for
OpenVINO, images for a vision transformer have its own size. Two outputs are equal if
they differ by at most 1e-4 of the largest value.

*Kind*. Two operations are counted: products of activations with activations, which are
attention, and convolutions whose windows overlap. A network with more than one product
per four convolutions is a transformer, one with fewer is a CNN, and one with neither,
such as MLP-Mixer, is "other".

::

    python examples/benchmarks/coverage.py --out FOLDER
    python examples/benchmarks/coverage.py --out FOLDER --only "timm/*vit*" --workers 2
    python examples/benchmarks/coverage.py --out FOLDER --checks penultimate stages
    python examples/benchmarks/coverage.py --out FOLDER --report

The first takes many hours, and two of the checks about a third of it. Each result is a
file in ``FOLDER``, and a second run checks only what is missing there. The order is
random, so that a part of the results is representative. A network that ends its
process, or takes longer than ``--limit-seconds``, is reported as such. ``--report``
prints the tables of the results so far.
"""

import argparse
import fnmatch
import json
import multiprocessing
import random
import re
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from coverage_checks import CHECKS, Result, examine, family_of
from torchvision import models

from sktl import list_backbones

NETWORKS_PER_PROCESS = 50  # memory of traced graphs is never returned


def serve(connection: Any, max_parameters: float, checks: list[str]) -> None:
    """Check the networks whose names arrive; send results, and which is the last."""
    warnings.simplefilter("ignore")
    while True:
        name, result = connection.recv(), {}
        try:
            for result in examine(name, max_parameters, checks):
                connection.send((False, result))
        except Exception as error:  # it cannot be built, or does not run
            line = (str(error).strip().splitlines() or [""])[0][:300]
            result["error"] = f"{type(error).__name__}: {line}"
        connection.send((True, result))


class Process:
    """A process that checks networks, and that may die."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._child: Any = None

    def check(self, name: str) -> Result:
        """Return the result for a network."""
        if self._child is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            limits = (self._arguments.max_parameters, self._arguments.checks)
            self._child = context.Process(
                target=serve, args=(other, *limits), daemon=True
            )
            self._child.start()
            other.close()
            self._n_left = NETWORKS_PER_PROCESS
        result: Result = {"name": name, "family": family_of(name), "kind": "unknown"}
        end = time.monotonic() + self._arguments.limit_seconds
        is_complete = False
        try:
            self._connection.send(name)
            while not is_complete:
                if not self._connection.poll(max(0, end - time.monotonic())):
                    result["error"] = "it takes longer than the limit"
                    break
                is_complete, result = self._connection.recv()
        except (EOFError, OSError):
            result["error"] = "its process has ended"
        self._n_left -= 1
        if not is_complete or not self._n_left:
            self.stop()
        return result

    def stop(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._connection.close()
            self._child.join()
            self._child = None


def file_of(name: str, out: Path) -> Path:
    """Return the path of a result."""
    return out / f"{name.replace('/', '-')}.json"


def is_missing(name: str, arguments: argparse.Namespace) -> bool:
    """Return whether a check has no result, or the network was too large for it."""
    file = file_of(name, arguments.out)
    if not file.exists():
        return True
    result = json.loads(file.read_text())
    if "skipped" in result:
        return bool(result["n_parameters"] <= arguments.max_parameters)
    return "error" not in result and not set(arguments.checks) <= result.keys()


def run(names: list[str], arguments: argparse.Namespace) -> None:
    """Check networks in processes, and write each result."""
    local = threading.local()

    def check(name: str) -> None:
        if not hasattr(local, "process"):
            local.process = Process(arguments)
        result = local.process.check(name)
        file = file_of(name, arguments.out)
        if file.exists():
            stored = json.loads(file.read_text())
            result = {c: stored[c] for c in CHECKS if c in stored} | result
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(file)
        failed = [f"{c}: {r}" for c, r in outcomes(result).items() if r != "yes"]
        print(name, result.get("seconds", ""), *failed, sep=" | ", flush=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        for _ in pool.map(check, names):
            pass


def outcomes(result: Result) -> dict[str, str]:
    """Return "yes" or a reason for each check that was run."""
    if "error" in result:
        return {check: result.get(check, result["error"]) for check in CHECKS}
    return {check: result[check] for check in CHECKS if check in result}


def report(results: list[Result]) -> None:
    """Print the tables."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    reasons: Counter[tuple[str, str]] = Counter()
    for result in results:
        found = outcomes(result)
        for row in ((result["family"], result["kind"]), ("all", result["kind"])):
            rows.setdefault(row, []).extend([found] if found else [])
        for check, reason in found.items():
            if reason != "yes":
                general = re.sub(r"\b[\d.]+(e[+-]?\d+)?\b", "N", reason)
                reasons[check, general[:160]] += 1
    print(f"| family | kind | networks | {' | '.join(CHECKS)} |")
    print("|---|---|" + "---:|" * (1 + len(CHECKS)))
    for row in sorted(rows, key=lambda row: (row[0] == "all", row)):
        cells = [f"{len(rows[row])}"]
        for check in CHECKS:
            found = [each[check] for each in rows[row] if check in each]
            cells.append(f"{found.count('yes')} of {len(found)}")
        if rows[row]:
            print(f"| {' | '.join((*row, *cells))} |")
    n_skipped = sum("skipped" in result for result in results)
    print(f"\n{len(results)} results, {n_skipped} of networks that are too large\n")
    for (check, reason), count in reasons.most_common():
        print(f"- {count} {check}: {reason}")


def main() -> None:
    """Check what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description="Check all architectures")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--only", default="*", help="glob of names, as 'timm/*vit*'")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--max-parameters", type=float, default=400e6)
    parser.add_argument("--limit-seconds", type=float, default=600, help="per network")
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    parser.add_argument("--report", action="store_true", help="print what is stored")
    arguments = parser.parse_args()
    names = list_backbones("timm/*") + models.list_models(module=models)
    names = fnmatch.filter(names, arguments.only)
    random.Random(0).shuffle(names)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        missing = [name for name in names if is_missing(name, arguments)]
        print(f"{len(missing)} of {len(names)} networks to check", flush=True)
        run(missing, arguments)
    files = [file_of(name, arguments.out) for name in names]
    report([json.loads(file.read_text()) for file in files if file.exists()])


if __name__ == "__main__":
    main()
