"""Without the package vllm these tests are skipped, before it is imported."""

from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def _installed():
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed: make test-vllm")
