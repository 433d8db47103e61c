"""Plans: arms, the budget in samples, paired seeds and learning rates; and that a comparison goes on as planned."""

import json
import math
from itertools import product

import pytest
from folders import write_rows
from refusals import refused

import tokenrl
from tokenrl.cli import COMMANDS
from tokenrl.core.estimator import Estimator
from tokenrl.flags import parse
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.plan import check_plan, read_plan, start_plan
from tokenrl.lab.compare.problems import make_plan, read_arm
from tokenrl.lab.compare.table import points
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
        ("rloo,max_grad_norm=0.5,lora_target_modules=('q','v'),warm_start=true", {}, "rloo", {},
         {"max_grad_norm": 0.5, "lora_target_modules": ("q", "v"), "warm_start": True}),
        ("rloo,num-generations=4,learning-rate=1e-4", {}, "rloo", {}, {"num_generations": 4}),
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
    assert (planned.budget, planned.unit) == (40 * 16 * 8, "completions")
    assert points(planned.budget, planned.every)[-1] == planned.budget
    runs = [run.settings for run in planned.runs({})[: len(planned.arms)]]
    every = runs[0]["eval_every"]
    assert [run["max_steps"] for run in runs] == [40, math.ceil(40 * 8 / 9), 80, 20, 40, 40]
    evaluations = [every, round(every * 8 / 9), 2 * every, every // 2, every, every]
    assert [run["eval_every"] for run in runs] == evaluations, "after the same samples"
    assert [run["learning_rate"] for run in runs] == [2e-4] * 4 + [1e-3, 2e-4]
    rates = {"rloo": 5e-4}
    assert [run.settings["learning_rate"] for run in planned.runs(rates)[:2]] == [5e-4, 2e-4]
    assert planned.describe()["steps"] == (
        "rloo: 40; remax: 36; grpo,num_generations=4: 80; rloo,prompts_per_step=32: 20; "
        "rloo,learning_rate=1e-3: 40; dapo: 40"
    )


def test_a_rate_of_all_arms_is_one_for_an_optimiser_without_a_recommended_rate():
    planned = toy("rloo", "grpo", shared={"optimizer": "sgd"}, learning_rate=0.06)
    assert [arm.rates for arm in planned.arms] == [(0.06,)] * 2
    with refused("optimizer='sgd' was given without a learning_rate"):
        toy("rloo", "grpo", shared={"optimizer": "sgd"})


def test_the_margin_is_a_share_of_the_declared_range():
    assert toy("rloo", "grpo").margin == pytest.approx(0.02)
    assert toy("rloo", "grpo", margin=0.1).margin == 0.1
    assert plan().margin is None, "without a declared range there is no margin"
    assert "no arm is called as good as another (--margin" in plan().describe()["on walk"]
    assert toy("rloo", "grpo").describe()["on sort_digits"].endswith("margin 0.02")


def test_the_declared_bias_of_an_arm_is_that_of_its_runs(tmp_path):
    capped = "rloo,sync_every=4,importance=sequence"
    earlier = "as weights of earlier steps sample"
    planned = toy(
        "rloo",
        "rloo,sync_every=4",
        capped,
        "rloo,replay=2",
        "rloo,ratio=token,num_iterations=2",
        "grpo,num_minibatches=2",
    )
    assert planned.describe()["arms"] == (
        f"rloo (exact), rloo,sync_every=4 (biased, {earlier}), {capped} (exact_for_policy, {earlier}), "
        "rloo,replay=2 (biased, as rewards choose the replayed completions), "
        "rloo,ratio=token,num_iterations=2 (exact at the first update of a step; later ones learn from an older "
        "policy), "
        "grpo,num_minibatches=2 (biased)"
    )
    both = toy("rloo", "grpo", shared={"max_steps": 40, "sync_every": 2})
    assert both.describe()["arms"] == f"rloo (biased, {earlier}), grpo (biased, {earlier})"
    write_rows(tmp_path / "log.jsonl", [{"prompt": "1>", "completion": "1", "reward": 1.0}])
    of_log = toy(
        "rloo", "reinforce,num_generations=1", shared={"rows": str(tmp_path / "log.jsonl")}
    )
    assert "as the reward-weighted likelihood" in of_log.describe()["arms"]


def test_a_control_is_the_first_other_arm_with_a_setting():
    """With its rates, changes of its own and equal completions; a search tries one rate alone."""
    arms = ("random", "grpo,learning_rate=(1e-4,2e-4),num_generations=4", "rloo", "best_of_n,eta=2")
    planned = toy(*arms)
    random, usual, _, search = planned.arms
    assert random.settings == {**usual.settings, "control_arm": "random"}
    assert random.rates == usual.rates and search.rates == usual.rates[:1]
    assert search.estimator == Estimator.preset("grpo", eta=2.0)
    assert search.settings["control_arm"] == "best_of_n"
    assert {arm.settings["max_steps"] for arm in (random, usual, search)} == {80}
    words = planned.describe()["arms"]
    assert (
        "random (a control: the rewards" in words and "best_of_n,eta=2 (a control without" in words
    )
    assert toy("rloo", "grpo", "random", reference="grpo").arms[2].estimator == Estimator.preset(
        "grpo"
    )


@pytest.mark.parametrize(
    ("rate", "rates", "words"),
    [
        ("fixed", [[2e-4], [1e-4, 4e-4], [1.0]], "0.0001, 0.0002, 0.0004, 1; of several"),
        ("tuned", [[5e-5, 1e-4, 2e-4, 4e-4, 8e-4], [1e-4, 4e-4], [1.0]], "5e-05, 0.0001, 0.0002"),
        (3e-4, [[3e-4], [1e-4, 4e-4], [1.0]], "0.0001, 0.0003, 0.0004, 1; of several"),
        ((3e-4, 1e-3, 3e-4), [[3e-4, 1e-3], [1e-4, 4e-4], [1.0]], "0.0001, 0.0003, 0.0004, 0.001"),
    ],
)
def test_an_arm_has_its_own_rates_or_those_of_all(rate, rates, words):
    arms = ("rloo", "grpo,learning_rate=(1e-4,4e-4)", "remax,learning_rate=1")
    planned = toy(*arms, learning_rate=rate, first_seed=3)
    assert [list(arm.rates) for arm in planned.arms] == rates
    tried = {(run.arm, run.settings["learning_rate"], run.seed) for run in planned.tuning_runs()}
    expected = set()
    for arm, of_arm in zip(arms, rates, strict=True):
        seeds = (20_003, 20_004, 20_005) if len(of_arm) > 1 else ()
        expected |= {(arm, x, seed) for x, seed in product(of_arm, seeds)}
    assert tried == expected and len(planned.tuning_runs()) == len(expected)
    assert planned.describe()["learning rate"].startswith(words)
    assert planned.describe()["runs"].endswith(f"{len(tried)} for the choice of learning rates")


def test_an_environment_is_a_problem_and_shared_by_the_arms(tmp_path):
    file = tmp_path / "env.py"
    methods = (
        "def reset(self, seed=None): return '', {}",
        "def step(self, text): return '', 1.0, True, False, {}",
    )
    file.write_text("\n    ".join(["class Env:", *methods]))
    name = f"{file}:Env"
    shared = {"max_steps": 40, "max_turns": 3, "eval_size": 4, "model": "tiny"}
    of_task = toy("rloo", "grpo", task=name, shared=shared)
    alone = toy("rloo", "grpo", task=(), shared={**shared, "environment": name})
    for planned in (of_task, alone):
        assert planned.problem == name
        settings = planned.runs({})[1].settings
        assert (settings["task"], settings["max_turns"]) == (name, 3)
    with refused("max_turns must be the same for all arms"):
        toy("rloo,max_turns=2", "grpo", task=name, shared=shared)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arms": ["rloo"]}, "two or more"),
        ({"arms": ["rloo", "rloo"]}, "would have the same directory, rloo"),
        (
            {"arms": ["a2c,stop='a,b'", "a2c,stop='a;b'"], "env": ()},
            "would have the same directory",
        ),
        ({"arms": ["rlo", "grpo"]}, "Did you mean 'rloo'"),
        (
            {"arms": ["rloo,max_stepz=3", "grpo"]},
            "there is no setting 'max_stepz'",
        ),
        ({"arms": ["rloo,grpo", "dapo"]}, "write 'grpo' as NAME=VALUE, .*; spaces separate names"),
        ({"arms": ["", "grpo"]}, "is empty"),
        ({"arms": ["random", "best_of_n"], "env": ()}, "name such an arm too"),
        ({"arms": ["rloo", "random"]}, "a comparison of language models"),
        ({"arms": ["rloo,eval_every=3", "grpo"]}, "the same for all arms"),
        ({"arms": ["rloo,learning_rate=(1,-1)", "grpo"]}, "learning_rate was given as"),
        (
            {"arms": ["rloo,num_generations=None", "grpo"], "env": ()},
            "num_generations was given as None",
        ),
        ({"arms": ["remax", "reinforce"]}, "cannot train on walk"),
        ({"reference": "rlo"}, "must be one of"),
        ({"learning_rate": ("tuned", 2e-3)}, "given as .*; give fixed, tuned or numbers"),
        ({"shared": {"seed": 3}}, "set by the comparison itself"),
        ({"shared": {"estimator": "rloo"}}, "as arms"),
        ({"task": ("sort_digits",)}, "one task or one environment"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_few_words_before_anything_runs(options, words):
    with refused(words) as caught:
        make_plan(arguments(CompareArguments, {**WALK, **options}), lambda text: None)
    assert len(str(caught.value)) < 700, "and no list of all settings"


@pytest.fixture
def begun(tmp_path):
    """The directory of a comparison that has begun."""
    start_plan(plan(), tmp_path).release()
    return tmp_path


def test_the_same_plan_goes_on_and_is_read_back(begun):
    check_plan(plan(), begun)
    assert read_plan(begun).runs({}) == plan().runs({})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared": {"max_steps": 5}}, "budget is 32 there and 40 here"),
        (
            {"shared": {"max_grad_norm": 5}},
            "arms.reinforce.settings.max_grad_norm is None there and 5 ",
        ),
        ({"seeds": 5}, r"seeds is \[0, 1, 2\] there and \[0, 1, 2, 3, 4\] here"),
        ({"arms": (*WALK["arms"], "a2c")}, "arms.a2c.label is None there and a2c here"),
        ({"metric": "reward"}, "metric is area there and reward here"),
        ({"learning_rate": 0.5}, "rates is .* there and .*0.5. here"),
    ],
)
def test_another_comparison_in_the_same_directory_is_refused(begun, options, words):
    for look in (check_plan, start_plan):
        with refused(f"holds another comparison: .*{words}"):
            look(plan(**options), begun)


def test_other_files_are_left_alone_and_a_damaged_plan_is_refused(begun, tmp_path_factory):
    foreign = tmp_path_factory.mktemp("other")
    (foreign / "thesis.tex").write_text("years of work")
    with refused("holds files"):
        start_plan(plan(), foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    with refused("cannot be used"):
        start_plan(plan(), foreign / "thesis.tex")
    for text in (json.dumps({"plan": None})[:-3], "{}", '{"plan": {}}'):
        (begun / "plan.json").write_text(text)
        with refused("cannot be read"):
            check_plan(plan(), begun)


def parsed(text):
    return parse("compare", COMMANDS["compare"], text.split())


def test_flags_of_the_runs_are_shared_and_the_others_are_its_own():
    args = parsed(
        "--task sort_digits reverse_text --arms rloo grpo,scale=none --seeds 8 --max-steps 50 --lora-r 4 "
        "--estimator.aggregation sequence_mean --no-chat --learning-rate 1e-4 --optimizer=sgd"
    )
    assert args.task == ("sort_digits", "reverse_text")
    assert args.arms == ("rloo", "grpo,scale=none")
    assert args.seeds == (8,) and args.learning_rate == (1e-4,)
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
    assert (args.env, args.seeds, args.arms) == (("walk",), (9,), ("a2c", "rloo"))
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
        ("model", object()),
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
    assert planned.arms[0].settings["stop_after_zero_spread"] == usual
    assert (
        make_plan(parsed("--arms rloo grpo"), print).arms[0].settings["stop_after_zero_spread"] == 0
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--estimator grpo", "as --arms"),
        ("--print-commands", "executor ray takes more machines"),
        ("--overwrite", "give another output_dir for another comparison"),
    ],
)
def test_flags_that_cannot_be_compared_are_refused_with_exit_code_2(text, words, refusal):
    assert words in refusal("compare", *text.split())
