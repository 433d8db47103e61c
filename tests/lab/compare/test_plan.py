"""Plans: arms, the budget in samples, paired seeds, tuned rates, and what may change when a comparison goes on."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from refusals import refused

import tokenrl
from tokenrl.cli import COMMANDS
from tokenrl.core.estimator import Estimator
from tokenrl.flags import parse
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.loop import continue_plan, missing
from tokenrl.lab.compare.plan import lock_plan, read_plan, write_plan
from tokenrl.lab.compare.problems import make_plan, read_arm
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import arguments

WALK = {"env": "walk", "arms": ("reinforce", "reinforce_timestep_mean"), "seeds": 3}


def plan(shared=None, **options):
    settings = {**WALK, **options, "shared": {"max_steps": 4, "num_envs": 8, **(shared or {})}}
    return make_plan(arguments(CompareArguments, settings), lambda text: None)


def toy(*arms, **options):
    settings = {"task": "sort_digits", "arms": arms, "shared": {"max_steps": 40}, **options}
    return make_plan(arguments(CompareArguments, settings), lambda text: None)


@pytest.mark.parametrize(
    ("text", "shared", "preset", "axes", "changes"),
    [
        ("grpo,scale=none", {}, "grpo", {"scale": "none"}, {}),
        ("rloo", {"aggregation": "token_mean"}, "rloo", {"aggregation": "token_mean"}, {}),
        ("rloo,aggregation=token_mean", {"aggregation": "sequence_mean", "gamma": 0.9}, "rloo",
         {"aggregation": "token_mean", "gamma": 0.9}, {}),
        ("rloo, --estimator.scale = batch_std", {}, "rloo", {"scale": "batch_std"}, {}),
        ("baseline=group_mean", {}, "rloo", {"baseline": "group_mean"}, {}),
        ("rloo,max_grad_norm=0.5,lora_target_modules=('q','v'),chat=true", {}, "rloo", {},
         {"max_grad_norm": 0.5, "lora_target_modules": ("q", "v"), "chat": True}),
        ("rloo,num-generations=4,learning-rate=1e-4", {}, "rloo", {},
         {"num_generations": 4, "learning_rate": 1e-4}),
    ],
)  # fmt: skip
def test_an_arm_is_its_preset_with_its_own_axes_and_settings(text, shared, preset, axes, changes):
    arm = read_arm(text, shared, TrainArguments)
    assert arm.estimator == Estimator.preset(preset, **axes)
    assert {name: value for name, value in arm.settings.items() if name != "estimator"} == changes


def test_all_arms_have_the_budget_of_the_task_in_samples():
    planned = toy(
        "rloo",
        "remax",
        "grpo,num_generations=4",
        "rloo,prompts_per_step=32",
        "rloo,learning_rate=1e-3",
        "dapo",
    )
    (problem,) = planned.problems
    assert (problem.budget, problem.unit) == (40 * 16 * 8, "completions")
    assert problem.evaluated_at[-1] == problem.budget
    runs = [planned.run(problem, arm, 0).settings for arm in planned.arms]
    every = runs[0]["eval_every"]
    assert [run["max_steps"] for run in runs] == [40, math.ceil(40 * 8 / 9), 80, 20, 40, 40]
    evaluations = [every, round(every * 8 / 9), 2 * every, every // 2, every, every]
    assert [run["eval_every"] for run in runs] == evaluations, "after the same samples"
    assert [run["learning_rate"] for run in runs] == [2e-4] * 4 + [1e-3, 2e-4]
    assert planned.run(problem, planned.arms[4], 0, rate=5e-4).learning_rate == 5e-4
    assert planned.describe()["length on sort_digits"] == (
        "rloo: 40 steps of 128; remax: 36 steps of 144; grpo,num_generations=4: 80 steps of 64; "
        "rloo,prompts_per_step=32: 20 steps of 256; rloo,learning_rate=1e-3: 40 steps of 128; "
        "dapo: 40 steps of 128 and refills, read at 5,120 completions"
    )


def test_the_margin_is_a_share_of_the_declared_range():
    assert toy("rloo", "grpo").margins == {"sort_digits": pytest.approx(0.02)}
    assert toy("rloo", "grpo", margin=0.1).margins == {"sort_digits": 0.1}
    assert plan().margins == {"walk": None}, "without a declared range there is no margin"
    assert "no arm is called as good as another. Give --margin" in plan().describe()["on walk"]
    assert toy("rloo", "grpo").describe()["on sort_digits"].endswith("margin 0.02")
    undeclared = toy("rloo", "grpo", shared={"max_steps": 40, "reward": ("length(target=20)",)})
    assert "f.range = (0, 1)" in undeclared.describe()["on sort_digits"]


def test_arms_that_sample_from_earlier_weights_are_declared_off_policy():
    capped = "rloo,sync_every=4,importance=sequence"
    planned = toy("rloo", "rloo,sync_every=4", capped)
    assert planned.describe()["arms"] == (
        f"rloo (exact), rloo,sync_every=4 (off-policy biased), {capped} (off-policy exact_for_policy)"
    )
    both = toy("rloo", "grpo", shared={"max_steps": 40, "sync_every": 2})
    assert both.describe()["arms"] == "rloo (off-policy biased), grpo (off-policy biased)"


def test_several_values_make_a_problem_each():
    planned = toy("rloo", "grpo", num_generations=(4, 8), learning_rate=(1e-4, 2e-4))
    assert [p.label for p in planned.problems] == [
        f"sort_digits, num_generations={size}, learning_rate={rate}"
        for size in (4, 8)
        for rate in ("0.0001", "0.0002")
    ]
    assert {p.settings["learning_rate"] for p in planned.problems} == {1e-4, 2e-4}
    # a whole number
    assert toy("rloo", "grpo", learning_rate=1).problems[0].settings["learning_rate"] == 1


def test_arms_whose_labels_make_one_folder_have_two(tmp_path):
    planned = toy("rloo,stop='a,b'", "rloo,stop='a;b'")
    assert len({run.path for run in planned.runs()}) == len(planned.runs())


def test_an_environment_is_a_problem_and_shared_by_the_arms(tmp_path):
    file = tmp_path / "env.py"
    methods = (
        "def reset(self, seed=None): return '', {}",
        "def step(self, text): return '', 1.0, True, False, {}",
    )
    file.write_text("\n    ".join(["class Env:", *methods]))
    name = f"{file}:Env"
    shared = {"max_steps": 40, "max_turns": 3, "eval_size": 4}
    of_task = toy("rloo", "grpo", task=name, model="tiny", shared=shared)
    alone = toy("rloo", "grpo", task=(), model="tiny", shared={**shared, "environment": name})
    for planned in (of_task, alone):
        assert [problem.label for problem in planned.problems] == [name]
        settings = planned.run(planned.problems[0], planned.arms[1], 5).settings
        assert (settings["task"], settings["max_turns"]) == (name, 3)
    with refused("max_turns must be the same for all arms"):
        toy("rloo,max_turns=2", "grpo", task=name, model="tiny", shared=shared)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arms": ["rloo"]}, "two or more"),
        ({"arms": ["rloo", "baseline=rloo"]}, "the same settings"),
        ({"arms": ["rlo", "grpo"]}, "Did you mean 'rloo'"),
        ({"arms": ["rloo,max_stepz=3", "grpo"]}, "there is no setting 'max_stepz'"),
        ({"arms": ["rloo,grpo", "dapo"]}, "write 'grpo' as NAME=VALUE, .*; spaces separate names"),
        ({"arms": ["", "grpo"]}, "is empty"),
        ({"arms": ["rloo,reward=mine.py:f", "grpo"]}, "the same for all arms"),
        ({"arms": ["rloo,learning_rate=None", "grpo"]}, "learning_rate was given as None"),
        ({"arms": ["remax", "reinforce"]}, "cannot train on walk"),
        ({"reference": "rlo"}, "must be one of"),
        ({"learning_rate": ("tuned", 1e-3)}, "tuned alone"),
        ({"shared": {"seed": 3}}, "set by the comparison itself"),
        ({"shared": {"estimator": "rloo"}}, "as arms"),
        ({"task": ("sort_digits",)}, "without these"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_few_words_before_anything_runs(options, words):
    with refused(words) as caught:
        make_plan(arguments(CompareArguments, {**WALK, **options}), lambda text: None)
    assert len(str(caught.value)) < 700, "and no list of all settings"


@pytest.fixture
def begun(tmp_path):
    """A comparison of which a run has begun."""
    write_plan(plan(), tmp_path)
    run = tmp_path / plan().runs()[0].path
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"versions": {"tokenrl": "1"}}')
    Path(f"{run}.json").write_text("{}")
    return tmp_path


def test_the_same_plan_goes_on_and_is_read_back(begun):
    assert continue_plan(plan(), begun) == plan()
    assert read_plan(begun).runs() == plan().runs()


def test_more_seeds_and_arms_are_allowed_and_called_exploratory(begun):
    added = continue_plan(plan(seeds=5), begun)
    change = "seeds changed from (0, 1, 2) to (0, 1, 2, 3, 4) after runs had begun"
    assert added.changes == (change,)
    wider = plan(arms=(*WALK["arms"], "rloo,baseline=batch_mean"))
    added = continue_plan(wider, begun)
    assert len(added.changes) == 1 and added.changes[0].startswith("labels changed from")
    write_plan(added, begun)
    assert continue_plan(wider, begun).changes == added.changes, "it stays exploratory"


def test_another_way_to_judge_is_exploratory(begun):
    judged = {
        "metric": "reward",
        "reference": WALK["arms"][1],
        "failure_below": 0.2,
        "all_pairs": True,
    }
    changes = continue_plan(plan(**judged), begun).changes
    assert len(changes) == 4 and "metric changed from area to reward" in " ".join(changes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared": {"max_steps": 5}}, "reinforce/seed_0 has max_steps 4, now 5"),
        ({"seeds": 2}, "it has runs/walk/reinforce/seed_2, which"),
        ({"arms": ("reinforce", "a2c")}, "it has runs/walk/reinforce_timestep_mean/seed_0, which"),
        ({"learning_rate": ("tuned",)}, "its learning rates are chosen in another way"),
    ],
)
def test_another_experiment_in_the_same_directory_is_refused(begun, options, words):
    with refused(f"another comparison: .*{words}"):
        continue_plan(plan(**options), begun)


def test_before_the_first_run_a_plan_is_simply_replaced(tmp_path):
    write_plan(plan(), tmp_path)
    assert continue_plan(plan(seeds=5), tmp_path).changes == ()


def test_other_files_are_left_alone_and_a_damaged_plan_is_refused(begun, tmp_path_factory):
    foreign = tmp_path_factory.mktemp("other")
    (foreign / "thesis.tex").write_text("years of work")
    with refused("holds files"):
        continue_plan(plan(), foreign)
    assert (foreign / "thesis.tex").is_file()
    with refused("cannot be used"):
        lock_plan(foreign / "thesis.tex")
    for text in (json.dumps({"plan": None})[:-3], "{}", '{"plan": {}}'):
        (begun / "plan.json").write_text(text)
        with refused("cannot be read"):
            continue_plan(plan(), begun)


TUNED = {
    "arms": ("reinforce,learning_rate=0.1", "a2c,learning_rate=0.1"),
    "learning_rate": ("tuned",),
}


def tuned(score, by="arm", **options):
    """The runs for tuning that are planned if a function of the run gives its score, and the rates by arm."""
    planned = plan(**TUNED | options)
    rows = []
    while (runs := missing(planned, rows)) and runs[0].role == "tuning":
        for run in runs:
            rows.append(vars(run) | {"learning_rate": run.learning_rate, "area": score(run)})
    assert {run.role for run in runs} == {"comparison"} and len(runs) == len(planned.runs())
    return rows, {getattr(run, by): run.learning_rate for run in runs}


def peak(best, by="arm"):
    """Scores that fall with the distance of the rate from the best one of its arm, in powers of 2."""
    return lambda run: -abs(math.log2(run.learning_rate / best[getattr(run, by)]))


def test_the_best_rate_of_each_arm_wins_and_fewer_rates_go_on():
    best = dict(zip(TUNED["arms"], (0.05, 0.2), strict=True))
    rows, rates = tuned(peak(best))
    assert rates == best
    assert len({row["path"] for row in rows}) == len(rows)
    planned = plan(**TUNED)
    assert not set(planned.tuning_seeds) & set(planned.seeds)
    runs = Counter((row["arm"], row["seed"]) for row in rows)
    assert [runs[arm, seed] for arm in best for seed in planned.tuning_seeds] == [5, 3, 2] * 2


def test_the_runs_of_each_problem_choose_its_rates():
    best = {"walk": 0.05, "costly_walk": 0.2}
    assert tuned(peak(best, "problem"), "problem", env=tuple(best))[1] == best


def test_a_best_rate_at_the_edge_widens_the_grid_but_not_without_end():
    rows, rates = tuned(peak(dict(zip(TUNED["arms"], (0.0125, 100.0), strict=True))))
    assert rates == dict(zip(TUNED["arms"], (0.0125, 1.6), strict=True))
    least = min(row["learning_rate"] for row in rows if row["arm"] == TUNED["arms"][0])
    assert least == 0.00625, "one beyond the best one, which shows that it is best"


@pytest.mark.parametrize(
    ("first", "later", "best"),
    [
        ({0.1: 1.0, 0.2: 0.9}, {0.1: 0.0, 0.2: 0.9}, 0.2),  # a run without a score is the worst
        ({0.1: -1.0, 0.2: -2.0}, {0.1: -1.0, 0.2: -2.0}, 0.1),  # also where all scores are below 0
        ({0.1: 1.0, 0.2: 1.0}, {0.1: 1.0, 0.2: 1.0}, 0.1),  # of equal rates the smaller
        ({0.1: 1.0, 0.2: 0.0}, {0.1: 0.5, 0.2: 0.9}, 0.1),  # of all seeds, and not of the last
        (
            {0.1: 1.0, 0.05: 0.9, 0.2: 0.9, 0.025: 0.8, 0.4: 0.8},
            {0.1: 0.2, 0.05: 0.1, 0.2: 0.1},
            0.1,
        ),
    ],
)
def test_the_mean_over_seeds_decides_and_a_rate_that_was_dropped_cannot_win_by_its_one_score(
    first, later, best
):
    seed = plan(**TUNED).tuning_seeds[0]
    _, rates = tuned(
        lambda run: (first if run.seed == seed else later).get(run.learning_rate, math.nan)
    )
    assert set(rates.values()) == {best}


def parsed(text):
    return parse("compare", COMMANDS["compare"], text.split())


def test_flags_of_the_runs_are_shared_and_the_others_are_its_own():
    args = parsed(
        "--task sort_digits reverse_text --arms rloo grpo,scale=none --seeds 8 --max-steps 50 --lora-r 4 "
        "--estimator.aggregation sequence_mean --no-chat --learning-rate 1e-4 2e-4 --optimizer=sgd"
    )
    assert args.task == ("sort_digits", "reverse_text")
    assert args.arms == ("rloo", "grpo,scale=none")
    assert args.seeds == 8 and args.learning_rate == (1e-4, 2e-4)
    shared = {"max_steps": 50, "lora_r": 4, "chat": False, "optimizer": "sgd"}
    assert args.shared == {**shared, "estimator": {"aggregation": "sequence_mean"}}
    control = parsed("--env walk CartPole-v1 --arms reinforce rloo --num-envs 8 --hidden 16 16")
    assert control.env == ("walk", "CartPole-v1")
    assert control.shared == {"num_envs": 8, "hidden": [16, 16]}
    rewards = ["mine.py:right", "mine.py:short"]
    assert parsed(f"--reward {' '.join(rewards)}").shared["reward"] == rewards


def test_a_file_of_flags_has_shared_settings_too(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("max_steps: 30\nenv: [walk]\nlr: 0.9\nseeds: 7\narms: [a2c, rloo]")
    args = parsed(f"--config {file} --seeds 9 --max-steps 20")
    assert (args.env, args.seeds, args.arms) == (("walk",), 9, ("a2c", "rloo"))
    assert args.shared == {"max_steps": 20, "lr": 0.9}
    with refused("There is no setting 'lr'"):
        make_plan(args, print)
    file.write_text("shared: 3")
    with refused("shared was given as 3"):
        parsed(f"--config {file} --max-steps 20")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", [{"prompt": "1", "answer": "1"}]),
        ("reward", lambda **_: [0.0]),
        ("model", (object(), object())),
        ("arms", ("rloo", Estimator())),
    ],
)
def test_rows_functions_and_objects_are_refused_with_the_names_that_other_processes_need(
    name, value
):
    message = rf"^{name} was given as [^\n]*need names: [^\n]* {name}=[^\n]*$"
    with refused(message):
        tokenrl.compare(**{name: value})


def test_a_flag_that_is_typed_counts_even_if_train_has_the_same_default():
    usual = TrainArguments().stop_after_zero_spread
    typed = parsed(f"--arms rloo grpo --stop-after-zero-spread {usual}")
    planned = make_plan(typed, print)
    assert planned.problems[0].settings["stop_after_zero_spread"] == usual
    assert (
        make_plan(parsed("--arms rloo grpo"), print).problems[0].settings["stop_after_zero_spread"]
        == 0
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--estimator grpo", "as --arms"),
        ("--print-commands", "executor ray takes more machines"),
        ("--overwrite", "give another output_dir, or remove the directory"),
    ],
)
def test_flags_that_cannot_be_compared_are_refused_with_exit_code_2(text, words, refusal):
    assert words in refusal("compare", *text.split())
