"""Look after a feature store from the command line.

``python -m sktl.store DIRECTORY info|verify|clear``
"""

import argparse
import os
import sys

from sktl._store.feature_store import FeatureStore


def main(arguments: list[str] | None = None) -> int:
    """Run a command; give its exit status: 1 if verify found damage."""
    parser = argparse.ArgumentParser(prog="sktl.store", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("command", choices=["info", "verify", "clear"])
    given = parser.parse_args(arguments)
    if not os.path.isdir(os.path.expanduser(given.directory)):
        parser.error(f"there is no directory {given.directory!r}")
    store = FeatureStore(given.directory)
    if given.command == "clear":
        store.clear()
    elif given.command == "verify":
        result = store.verify()
        print(f"{result['rows']} rows intact, {result['corrupt']} files put aside")
        return int(result["corrupt"] > 0)
    info = store.info()
    print(f"{info['rows']} rows, {info['bytes'] / 2**20:.1f} MiB")
    for name, space in info["spaces"].items():
        print(f"  {space['rows']} rows, {space['bytes'] / 2**20:.1f} MiB: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
