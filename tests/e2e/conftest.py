"""Nothing that a test has started outlives it, whatever the test ended in."""

from collections.abc import Iterator

import pytest

from tests.e2e import lives


@pytest.fixture(autouse=True)
def no_life_is_left() -> Iterator[None]:
    yield
    for life in lives.started:
        life.kill(range(len(life.ranks)))
    lives.started.clear()
