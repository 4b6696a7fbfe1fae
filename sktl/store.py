"""Inspect, verify or clear a feature store from the command line.

``python -m sktl.store DIRECTORY info|verify|clear``
"""

import argparse
import os
import sys

from sktl._store.feature_store import FeatureStore


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 1 if `verify` found damaged files."""
    parser = argparse.ArgumentParser(prog="sktl.store", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("command", choices=["info", "verify", "clear"])
    args = parser.parse_args(arguments)
    if not os.path.isdir(os.path.expanduser(args.directory)):
        parser.error(f"{args.directory!r} is not a directory")
    store = FeatureStore(args.directory)
    if args.command == "clear":
        store.clear()
    elif args.command == "verify":
        result = store.verify()
        print(f"{result['rows']} rows intact, {result['corrupt']} files corrupt")
        return int(result["corrupt"] > 0)
    info = store.info()
    print(f"{info['rows']} rows, {info['bytes'] / 2**20:.1f} MiB")
    for namespace in info["spaces"].values():
        # Digests are shortened.
        fields = ", ".join(
            f"{name}={value if len(value) <= 32 else value[:8]}"
            for name, value in namespace["space"].items()
        )
        size = namespace["bytes"] / 2**20
        print(f"  {namespace['rows']} rows, {size:.1f} MiB: {fields}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
