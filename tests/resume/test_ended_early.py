"""Two processes end together where code of the user's ends the run in one of them."""

from __future__ import annotations

import pytest
from folders import read_json
from killing import TRAIN

FINISHES = """
import os
import tokenrl

def in_one(completions, trainer_state, **_):
    if trainer_state.global_step == 2 and os.environ["RANK"] == "1":
        raise tokenrl.Finished("the second one has enough")
    return [len(set(completion)) % 2 for completion in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["dapo", "remax"])
def test_processes_end_together_where_one_has_enough(nursery, estimator):
    """Also where they exchange which groups are replaced, or reward greedy completions too."""
    (nursery.folder / "finishes.py").write_text(FINISHES)
    argv = TRAIN.replace("rewards.py:sorted_digits", "finishes.py:in_one").split()
    ended = nursery.run_all(
        [*argv, "--estimator", estimator, "--output-dir", estimator], processes=2
    )
    assert [process["code"] for process in ended] == [0, 0], nursery.log.read_text()[-2000:]
    summary = read_json(nursery.folder / estimator / "summary.json")
    assert (summary["reason"], summary["steps"]) == ("the second one has enough", 2)
