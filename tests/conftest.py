"""Environment of the tests, and the fixtures that they share."""

import os

import pytest

# The processes of pytest-xdist share the cores. numpy and torch read it on import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Enables scikit-learn's check of array API input. scipy reads it on import.
os.environ["SCIPY_ARRAY_API"] = "1"
# No usage statistics are sent over the network.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures in processes that run tests.

    The process that starts those of pytest-xdist runs none. Without the imports, it
    starts them ten seconds earlier.
    """
    starts_others = config.getoption("dist", "no") != "no"
    if hasattr(config, "workerinput") or not starts_others:
        config.pluginmanager.import_plugin("shared_fixtures")
