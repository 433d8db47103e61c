"""The rule for the number of threads, the and the block that sets it."""

import pytest
import torch

from tokenrl.errors import Stopped
from tokenrl.runs.threads import choose_threads, using_threads


@pytest.mark.parametrize(
    ("parameters", "given", "variable", "number", "why"),
    [
        (10**9, 3, "2", 3, "as set"),
        (10, None, "2", 2, "OMP_NUM_THREADS"),
        (999_999, None, None, 1, "fewer than 1 M"),
        (1_000_000, None, None, 2, "as many as"),
    ],
)
def test_a_setting_comes_first_then_the_variable_then_the_size(
    monkeypatch, parameters, given, variable, number, why
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with using_threads(2):
        found, words = choose_threads(parameters, given)
    assert found == number and why in words


def test_a_block_has_its_threads_and_those_after_it_have_theirs():
    before = torch.get_num_threads()
    with pytest.raises(Stopped), using_threads(before + 2):
        with using_threads(None):
            assert torch.get_num_threads() == before + 2
        raise Stopped("an error")
    assert torch.get_num_threads() == before
