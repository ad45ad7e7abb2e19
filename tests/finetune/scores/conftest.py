"""Where reference values of other people's metrics lie."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fixtures(test_data: Path) -> Path:
    folder = test_data / "metric_fixtures"
    if not folder.is_dir():
        pytest.skip(f"no metric fixtures in {test_data}")
    return folder
