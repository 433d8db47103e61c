"""One workshop for all promises."""

import pytest

from tests.promises.runs import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))
