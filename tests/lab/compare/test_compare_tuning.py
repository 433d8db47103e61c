"""Successive halving over learning rates, with runs whose scores are a known function of the rate."""

import math

from tokenrl.lab.compare.records import Arm, Plan, Problem, RunRecord
from tokenrl.lab.compare.tuning import chosen_rates, tune

PROBLEM = Problem("task", "control", {"env": "walk"}, 100, "episodes", 1, 10, 0.1)
ARMS = (Arm("a", {"estimator": {}}), Arm("b", {"estimator": {"baseline": "none"}}))


def plan(rates=(0.25, 0.5, 1.0, 2.0, 4.0), seeds=(7, 8, 9)):
    return Plan((PROBLEM,), ARMS, "a", "area", {"task": None}, (0, 1), tuning_seeds=seeds, rates=rates)


def scored(best):
    """Runs whose score falls with the distance of the rate from the best one of its arm, in powers of 2."""
    made = []

    def score(run):
        return -abs(math.log2(run.settings["learning_rate"] / best[run.arm]))

    def execute(runs):
        made.extend(runs)
        return [RunRecord(run, "finished", scores={"area": score(run)}) for run in runs]

    return execute, made


def test_the_best_rate_of_each_arm_wins_and_fewer_rates_go_on():
    execute, made = scored({"a": 0.05, "b": 0.2})
    tried = tune(plan(), execute)
    assert chosen_rates(tried) == {("task", "a"): 0.05, ("task", "b"): 0.2}
    per_seed = [sum(run.seed == seed and run.arm == "a" for run in made) for seed in (7, 8, 9)]
    assert per_seed == [5, 3, 2]
    assert len({run.path for run in made}) == len(made)
    assert all(run.role == "tuning" for run in made)


def test_a_best_rate_at_the_edge_widens_the_grid():
    execute, _ = scored({"a": 0.0125, "b": 0.1})
    tried = tune(plan(), execute)
    assert chosen_rates(tried)[("task", "a")] == 0.0125
    assert sorted(tried["task", "a"])[0] == 0.00625  # one beyond the best one, which shows that it is best
    execute, _ = scored({"a": 100.0, "b": 0.1})
    assert chosen_rates(tune(plan(), execute))[("task", "a")] == 1.6, "the grid is not widened without end"


def test_a_run_without_a_score_is_the_worst():
    def record(run):
        if run.settings["learning_rate"] > 0.15:
            return RunRecord(run, "failed")
        return RunRecord(run, "finished", scores={"area": 0.0})

    chosen = chosen_rates(tune(plan(), lambda runs: list(map(record, runs))))
    assert all(rate <= 0.1 for rate in chosen.values())


def test_the_mean_over_seeds_decides_and_not_the_first_seed():
    scores = {(0.1, 7): 1.0, (0.1, 8): 0.0, (0.1, 9): 0.0, (0.2, 7): 0.9, (0.2, 8): 0.9, (0.2, 9): 0.9}

    def record(run):
        score = scores.get((run.settings["learning_rate"], run.seed), -1.0)
        return RunRecord(run, "finished", scores={"area": score})

    chosen = chosen_rates(tune(plan(), lambda runs: list(map(record, runs))))
    assert chosen == {("task", "a"): 0.2, ("task", "b"): 0.2}
