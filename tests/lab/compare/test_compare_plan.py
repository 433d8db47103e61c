"""Plans: equal samples, paired seeds, and what may change when a comparison goes on."""

import json

import pytest

from tokenrl.errors import Refused
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.plan_file import settle_plan, write_plan
from tokenrl.lab.compare.planning import make_plan, planned_run, runs_of
from tokenrl.settings import arguments

WALK = {"env": "walk", "arms": ("reinforce", "reinforce_timestep_mean"), "seeds": 3}


def plan(shared=None, **options):
    given = {**WALK, **options, "shared": {"max_steps": 4, "num_envs": 8, **(shared or {})}}
    return make_plan(arguments(CompareArguments, given), lambda text: None)


def toy(*arms, **options):
    given = {"task": "sort_digits", "arms": arms, "shared": {"max_steps": 40}, **options}
    return make_plan(arguments(CompareArguments, given), lambda text: None)


def test_every_arm_has_the_same_seeds_and_the_reference_others_too():
    made = plan()
    runs = runs_of(made)
    seeds = {arm: [r.seed for r in runs if r.arm == arm and r.role == "comparison"] for arm in WALK["arms"]}
    assert seeds == {arm: [0, 1, 2] for arm in WALK["arms"]}
    itself = [r for r in runs if r.role == "itself"]
    assert {r.arm for r in itself} == {"reinforce"} and not {r.seed for r in itself} & {0, 1, 2}
    assert len({r.path for r in runs}) == len(runs)
    assert all(r.settings["max_steps"] == 4 and r.settings["num_envs"] == 8 for r in runs)


def test_all_arms_have_the_budget_of_the_task_in_samples():
    made = toy("rloo", "remax", "grpo,num_generations=4")
    (problem,) = made.problems
    assert problem.budget == 40 * 16 * 8 and problem.unit == "completions"
    runs = {arm.label: planned_run(made, problem, arm, 0, "comparison") for arm in made.arms}
    assert {run.settings["max_samples"] for run in runs.values()} == {40 * 16 * 8}
    assert not any("max_steps" in run.settings for run in runs.values())
    every = {label: run.settings["eval_every"] for label, run in runs.items()}
    assert every["grpo,num_generations=4"] == 2 * every["rloo"], "evaluated at the same samples"
    assert {run.settings["learning_rate"] for run in runs.values()} == {2e-4}


def test_an_arm_may_have_its_own_rate_and_a_tuned_one_comes_on_top():
    made = toy("rloo", "rloo,learning_rate=1e-3")
    (problem,) = made.problems
    own, tuned = (planned_run(made, problem, made.arms[1], 0, "comparison", rate) for rate in (None, 5e-4))
    assert (own.settings["learning_rate"], tuned.settings["learning_rate"]) == (1e-3, 5e-4)


def test_the_margin_is_a_share_of_the_declared_range():
    assert toy("rloo", "grpo").margins == {"sort_digits": pytest.approx(0.02)}
    assert toy("rloo", "grpo", margin=0.1).margins == {"sort_digits": 0.1}
    assert plan().margins == {"walk": None}, "without a declared range there is no margin"


def test_several_values_make_a_problem_each():
    made = toy("rloo", "grpo", num_generations=(4, 8), learning_rate=("1e-4", "2e-4"))
    assert [p.label for p in made.problems] == [
        f"sort_digits, num_generations={size}, learning_rate={rate}"
        for size in (4, 8)
        for rate in ("0.0001", "0.0002")
    ]
    assert {p.learning_rate for p in made.problems} == {1e-4, 2e-4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference": "rlo"}, "which is no arm"),
        ({"learning_rate": ("fixed", "1e-3")}, "cannot be mixed"),
        ({"learning_rate": ("fast",)}, "numbers"),
        ({"shared": {"seed": 3}}, "set by the comparison itself"),
        ({"shared": {"max_stepz": 3}}, "There is no setting"),
        ({"shared": {"estimator": "rloo"}}, "as arms"),
        ({"task": ("sort_digits",)}, "leave these out"),
        ({"arms": ("remax", "reinforce")}, "cannot train on walk"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(options, words):
    with pytest.raises(Refused, match=words):
        make_plan(arguments(CompareArguments, {**WALK, **options}), lambda text: None)


@pytest.fixture
def begun(tmp_path):
    """A comparison of which a run has begun."""
    write_plan(plan(), tmp_path, {})
    (tmp_path / "runs" / "walk").mkdir(parents=True)
    (tmp_path / "runs" / "walk" / "config.json").write_text("{}")
    return tmp_path


def test_the_same_plan_goes_on(begun):
    assert settle_plan(plan(), begun, overwrite=False) == plan()


def test_more_seeds_and_arms_are_allowed_and_called_exploratory(begun):
    more = settle_plan(plan(seeds=5), begun, overwrite=False)
    assert more.changes == ("the number of seeds was changed from 3 to 5 on the way",)
    added = settle_plan(plan(arms=(*WALK["arms"], "rloo,baseline=batch_mean")), begun, overwrite=False)
    assert [arm.exploratory for arm in added.arms] == [False, False, True]
    write_plan(added, begun, {})
    again = settle_plan(plan(arms=(*WALK["arms"], "rloo,baseline=batch_mean")), begun, overwrite=False)
    assert again.changes == added.changes and again.arms == added.arms, "it stays exploratory"


def test_another_metric_or_reference_is_exploratory(begun):
    judged = settle_plan(plan(metric="reward", reference=WALK["arms"][1]), begun, overwrite=False)
    assert len(judged.changes) == 2 and "area to reward" in " ".join(judged.changes)


@pytest.mark.parametrize(
    "options",
    [{"shared": {"max_steps": 5}}, {"env": "costly_walk"}, {"first_seed": 4}, {"arms": ("reinforce", "a2c")}],
)
def test_another_experiment_in_the_same_directory_is_refused(begun, options):
    with pytest.raises(Refused, match="another comparison"):
        settle_plan(plan(**options), begun, overwrite=False)
    assert (begun / "plan.json").is_file()
    assert settle_plan(plan(**options), begun, overwrite=True).changes == ()
    assert not begun.exists()


def test_before_the_first_run_a_plan_is_simply_replaced(tmp_path):
    write_plan(plan(), tmp_path, {})
    assert settle_plan(plan(seeds=5), tmp_path, overwrite=False).changes == ()


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(Refused, match="holds files"):
            settle_plan(plan(), tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").is_file()


def test_a_damaged_plan_is_refused(begun):
    (begun / "plan.json").write_text(json.dumps({"plan": None})[:-3])
    with pytest.raises(Refused, match="cannot be read"):
        settle_plan(plan(), begun, overwrite=False)
