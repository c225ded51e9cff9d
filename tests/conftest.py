"""Settings of all tests: one thread, no network, and the longest files first."""

import os
import shutil

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 lets a worker wait for the tests beside it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Ledgers and stores wait for the disk at every event; in memory they do not, and the tests are done sooner.
MEMORY = "/dev/shm"
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

STORE = os.environ.get("MLFLOW_TRACKING_URI")  # of whoever runs the tests

# Longest files first. Two workers take whole files in turn, so a long file at the end would leave one worker idle.
LONGEST = (
    "test_sweep.py",
    "test_contract.py",
    "test_faults.py",
    "test_exit_codes.py",
    "test_identity.py",
    "test_results.py",
    "test_screen.py",
    "test_decision_error.py",
    "test_models.py",
    "test_own_gates.py",
    "test_train.py",
    "test_report.py",
    "test_security.py",
    "test_tracker.py",
    "test_damage.py",
    "test_checkpoint_kills.py",
    "test_study_paths.py",
)


def pytest_collection_modifyitems(items):
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def no_store_of_another_test():
    """Remove the store that a test's own calls of MLflow name in the environment, where later tests would use it."""
    yield
    if STORE is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
