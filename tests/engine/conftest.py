"""What holds for all tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vit_mechinterp.engine.scheduling import cutting


@pytest.fixture(autouse=True, scope="session")
def forwards_as_wide_as_asked() -> Iterator[None]:
    """A budget decides how many examples share a chunk, as most tests of several chunks want it; that forwards get
    narrower where chunks share more then is left to `test_narrowing`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "NARROWEST", {"cpu": 10**9})
        yield
