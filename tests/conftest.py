"""What every test shares: where real data lies, quiet threads, and fresh memory poisoned with NaN."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.fault_table import pytest_collection_modifyitems, pytest_sessionfinish, pytest_terminal_summary

__all__ = ["pytest_collection_modifyitems", "pytest_sessionfinish", "pytest_terminal_summary"]

# A busy machine is no failure.
settings.register_profile("parlance", deadline=None)
settings.load_profile("parlance")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def heard_sigint():
    """A shell lets what it runs in the background ignore SIGINT, and so would all that tests start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data, from PARLANCE_TEST_DATA (default ../shared/data); tests skip where it is absent."""
    folder = Path(os.environ.get("PARLANCE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set PARLANCE_TEST_DATA")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums depend on the number of threads: everything here runs with one, like the processes that tests start."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Makes torch.empty return NaN, so that a kernel that reads what it never wrote is caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser):
    parser.addoption("--update-goldens", action="store_true", help="write tests/goldens/ anew")
    parser.addoption("--fault-table", action="store_true", help="run tests of faults alone and print their table")
    parser.addoption("--gpu-tests-on-cpu", action="store_true", help="run tests/gpu with PyTorch's operators")
