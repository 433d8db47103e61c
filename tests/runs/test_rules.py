"""The table of rules: each fires on a case, is silent on its neighbour and where a fact is missing."""

import math
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

import tokenrl
from tokenrl.control.arguments import ControlArguments
from tokenrl.core import Estimator
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs import rules
from tokenrl.runs.findings import Part, facts
from tokenrl.runs.rules import RULES, judge

RATE = {"learning_rate": 0.1}
COLLAPSED = {"steps": "steps 2 to 4", "latest_reward": 0.2, "latest_entropy": 0.2, "first_reward": 0.2,
             "first_entropy": 1.0, "signs": "90% of the groups had equal rewards", **RATE}  # fmt: skip
LOST = COLLAPSED | {"latest_reward": 0.0, "latest_stderr": 0.01, "latest_entropy": 1.0, "before_reward": 0.2,
                    "best_reward": 0.2, "best_stderr": 0.012}  # fmt: skip
GAIN = {"gain": 0.01, "gain_stderr": 0.02, "before_reward": 0.3, "after_reward": 0.31, "held_out": 16,
        "share_without_signal": 0.6, **RATE}  # fmt: skip
PEAK = {"fell": True, "peak_reward": 0.9, "peak_step": 20, "now_reward": 0.5, "learning_rate": 1e-3}
GREEDY = {"best_greedy_reward": 0.8, "best_greedy_stderr": 0.03, "best_greedy_step": 0, "keep": "last",
          "after_greedy_reward": 0.1, "after_greedy_stderr": 0.02}  # fmt: skip
GAP = {"before_greedy_reward": 0.8, "before_greedy_stderr": 0.03, "before_reward": 0.07, "eval_generations": 4,
       "before_most_reward": 0.1, "before_most_stderr": 0.02}  # fmt: skip
USUAL = {"lowest_rate": 1e-3, "highest_rate": 1e-3, "whose": "this model", **RATE}
CRITIC = {"recent_explained_variance": -0.5, "num_envs": 64, "learning_rate": 0.01}
OFF = {"recent_logp_difference": 0.06, "recent_effective_samples": 0.9, "importance": "none"}
PASSES = {"recent_clip_ratio": 0.4, "num_iterations": 4, "learning_rate": 1e-3}
NONE = {"has_baseline": False, "num_generations": 4, "horizon": 501}
FLAT = {"gained": False, "fell": False, "is_early": False, "learning_rate": 1e-3}
TIMES = {"reward_seconds": 1.2, "step_seconds": 2.0, "timed_steps": 5, "slowest_reward": "f"}
QUIET = {"steps_without_signal": 3, "step_reward": 0.5, "had_signal": True, **RATE}
CASES = [  # flag, weight, facts, changes advised (None: any), and what of the facts makes the rule silent
    ("policy-destroyed", "void", LOST, {"learning_rate": 0.025}, {"signs": ""}),
    ("policy-destroyed", "void", LOST, {"learning_rate": 0.025}, {"latest_stderr": 0.05}),
    ("policy-destroyed", "void", LOST, None, {"latest_reward": 0.15}),
    ("policy-destroyed", "void", LOST, None, {"best_reward": 0.8, "before_reward": 0.8}),  # easier prompts
    ("policy-destroyed", "void", LOST | {"best_reward": 0.6, "latest_reward": 0.3}, None,
     {"latest_reward": 0.5}),
    ("entropy-collapsed", "act", COLLAPSED, {"learning_rate": 0.025}, {"latest_entropy": 0.26}),
    ("entropy-collapsed", "act", COLLAPSED | {"solved_at": 0.9, "latest_reward": 0.5}, None,
     {"solved_at": 0.7}),
    ("entropy-collapsed", "act", {"recent_entropy": 0.09}, {"estimator.entropy_coef": 0.01},
     {"recent_entropy": 0.1}),
    ("entropy-collapsed", "act", {"recent_entropy": -1.0}, None, {"has_entropy_bonus": True}),
    ("entropy-collapsed", "watch", {"recent_entropy": 0.05, "is_solved": True}, {}, {"recent_entropy": 1}),
    ("entropy-collapsed", "act", {"early_entropy": 0.05, "gain": 0.0}, {}, {"gain": 0.1}),
    ("entropy-collapsed", "void", {"step_entropy": 0.001, "groups": "4 groups"}, {}, {"step_entropy": 0.1}),
    ("entropy-collapsed", "watch", {"step_entropy": 0.05, "groups": "4 groups"}, {}, {"step_entropy": 0.1}),
    ("sampling-differs", "void", {"gap": 0.06, "largest_gap": 0.5}, {}, {"gap": 0.005}),
    ("sampling-differs", "act", OFF, {}, {"recent_logp_difference": 0.05}),
    ("sampling-differs", "act", OFF | {"recent_logp_difference": 0.01, "recent_effective_samples": 0.4}, {},
     {"recent_effective_samples": 0.5}),
    ("sampling-differs", "act", OFF | {"importance": "token"}, {}, {"importance_centre": True}),
    ("sampling-differs", "watch", {"gap": 0.04, "largest_gap": 1.0}, {}, {"gap": 1e-3}),
    ("sampling-differs", "act", OFF | {"short_texts": "shorten"}, {}, {"recent_logp_difference": 0.05}),
    ("no-signal", "void", {"step_equal": 1, "step_reward": 0.5, "groups": "4 groups"}, {},
     {"step_equal": 0.8}),
    ("no-signal", "watch", {"step_equal": 1, "step_reward": 0.5, "groups": "4 groups", "others_differ": True}, {},
     {"step_equal": 0.8}),
    ("no-signal", "watch", {"step_equal": 0.95, "groups": "4 groups"}, {}, {"step_equal": 0.8}),
    ("no-signal", "void", QUIET, {}, {"steps_without_signal": 2}),
    ("no-signal", "act", {"early_equal": 0.6, "gain": 0.0}, {}, {"early_equal": 0.5}),
    ("no-signal", "act", {"early_equal": 0.6, "gain": -0.1}, {}, {"gain": 0.2}),
    ("no-signal", "act", {"recent_equal": 0.6, "needs_groups": True, "num_generations": 4},
     {"num_generations": 8}, {"recent_equal": 0.25}),
    ("already-solved", "watch", {"before_greedy": 1.0, "pass_mark": 1.0, "who": "x"}, {},
     {"before_greedy": 0.9}),
    ("nothing-learnt", "act", GAIN, {}, {"gain": 0.05}),
    ("reward-fell", "act", PEAK, {"learning_rate": 5e-4}, {"fell": False}),
    ("reward-fell", "act", PEAK, None, {"is_solved": True}),
    ("greedy-fell", "act", GREEDY, {"keep": "best"}, {"after_greedy_reward": 0.75}),
    ("greedy-fell", "act", GREEDY, {"keep": "best"}, {"keep": "best"}),
    ("greedy-fell", "act", GREEDY, {"keep": "best"}, {"is_solved": True}),
    ("greedy-gap", "watch", GAP, {}, {"before_most_reward": 0.75}),
    ("reward-flat", "act", FLAT, {"learning_rate": 2e-3}, {"gained": True}),
    ("still-rising", "watch", {"rising": True, "is_whole": True, "max_steps": 40}, {"max_steps": 80},
     {"is_solved": True}),
    ("truncation", "watch", {"step_cut": 1.0, "max_completion_length": 8, "uncut": "x"}, {},
     {"step_cut": 0.9}),
    ("truncation", "act", {"recent_cut": 0.2, "max_completion_length": 16}, {"max_completion_length": 32},
     {"recent_cut": 0.05}),
    ("truncation", "void", {"recent_cut": 0.6, "max_completion_length": 16}, None, {"recent_cut": 0.0}),
    ("truncation", "act", {"recent_length": 499, "horizon": 500}, {"max_episode_steps": 1000},
     {"horizon": 600}),
    ("truncation", "act", {"recent_length": 499, "horizon": 500}, None, {"is_solved": True}),
    ("unusual-rate", "void", USUAL, {"learning_rate": 1e-3}, {"learning_rate": 1e-2}),
    ("unusual-rate", "void", USUAL | {"learning_rate": 0.031}, None, {"learning_rate": 1e-2}),
    ("unusual-rate", "watch", USUAL | {"learning_rate": 0.02}, None, {"highest_rate": 0.02}),
    ("unusual-rate", "watch", USUAL | {"learning_rate": 1e-5}, None, {"learning_rate": 1e-3 / 29}),
    ("skipped", "void", {"step_grad_norm": math.inf}, {}, {"step_grad_norm": 1e9}),
    ("skipped", "act", {"skipped": 0.02, "learning_rate": 1e-3}, {"learning_rate": 5e-4}, {"skipped": 0}),
    ("skipped", "watch", {"skipped": 0, "idle": 0.25, **RATE}, {}, {"idle": 0.2}),
    ("clipped-updates", "watch", {"grad_clipped": 0.6}, {}, {"grad_clipped": 0.5}),
    ("clipping", "act", PASSES, {"num_iterations": 2}, {"recent_clip_ratio": 0.1}),
    ("clipping", "act", PASSES | {"num_iterations": 1}, {"learning_rate": 5e-4}, {"recent_clip_ratio": 0.15}),
    ("kl", "act", {"recent_kl": 5.0, "target_kl": 2.0, "beta": 0.1}, {"estimator.beta": 0.2},
     {"recent_kl": 2.2}),
    ("kl", "act", {"recent_kl": 5.0, "peak_kl": 2.0, "fell": True}, {"target_kl": 2.0}, {"fell": False}),
    ("critic", "act", CRITIC | {"early_spread": 12.0}, {"reward_scale": 0.08},
     {"recent_explained_variance": 0.0}),
    ("critic", "act", CRITIC | {"early_spread": 2.0}, {"value_learning_rate": 0.02}, {"is_solved": True}),
    ("no-baseline", "act", NONE, {"estimator.baseline": "rloo"}, {"has_baseline": True}),
    ("no-baseline", "watch", NONE | {"horizon": 500}, {"estimator.baseline": "rloo"}, {"horizon": 1}),
    ("slow-reward", "watch", TIMES, {}, {"timed_steps": 4}),
]  # fmt: skip


SETTINGS = {
    field.name for kind in (TrainArguments, ControlArguments, Estimator) for field in fields(kind)
}


@pytest.mark.parametrize(("flag", "weight", "numbers", "changes", "neighbour"), CASES)
def test_a_rule_fires_on_its_case_and_is_silent_on_its_neighbour_and_without_a_fact(
    flag, weight, numbers, changes, neighbour
):
    (finding,) = judge(numbers, flag)
    assert finding.weight == weight and not re.search(r"[{}]", finding.text)
    assert finding.text.endswith((".", "x")) and (changes is None or finding.changes == changes)
    assert judge(numbers | neighbour, flag) == []
    for name in numbers:
        for missing in (None, math.nan):
            texts = [finding.text for finding in judge(numbers | {name: missing}, flag)]
            assert not re.search(r"\bnan\b|None", " ".join(texts)), name


def test_every_rule_has_a_case():
    assert {flag for flag, *_ in CASES} == {rule.flag for rule in RULES}


def test_every_fact_that_a_rule_names_is_filled_by_some_reader():
    """A name that is spelt in another way here and there would silence its rule for ever."""
    code = Path(rules.__file__).read_text()
    names = set(re.findall(r"\bfacts\.(?!get\b)(\w+)|{([a-z_]+)(?::[^}]*)?}", code))
    evaluation = {f"eval_{name}": 0.0 for name in ("reward", "reward_greedy", "best@4")}
    rows = [row(1, 0.0) | evaluation] * 3
    numbers = facts(rows, settings_of(prompts_per_step=16), *get_args(Part))
    sources = [path for path in Path(tokenrl.__file__).parent.rglob("*.py") if path.stem != "rules"]
    words = set(re.findall(r"""\b(\w+)=|"(\w+)\"""", "".join(path.read_text() for path in sources)))
    filled = SETTINGS | numbers.keys() | {word for pair in words for word in pair}
    texts = {"advice", "cause"}  # of which a sentence is made
    assert {name for pair in names for name in pair if name} - filled - texts == set()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (
            LOST | {"usual_rate": 0.001},
            "The policy is destroyed: in steps 2 to 4 the mean reward fell from 0.2 (evaluation before "
            "training) to 0, and 90% of the groups had equal rewards. The learning rate, 0.1, is the likely "
            "cause: try --learning-rate 0.001, which is usual here.",
        ),
        (LOST | {"usual_rate": 0.2}, "try --learning-rate 0.025, although 0.2 is usual here."),
        (GAIN, "In 60% of the steps no two rewards that are compared differed. Use prompts that"),
        (GAIN | {"share_without_signal": 0.1}, "More steps"),
        (GAIN | {"pass_mark": 0.2}, "The policy already solves these prompts"),
        (GAIN | {"gain": -0.1}, "It has fallen. The learning rate"),
    ],
)
def test_a_loss_names_the_usual_rate_and_the_lack_of_a_gain_its_cause(numbers, words):
    (finding,) = judge(numbers)
    assert words in finding.text


def row(step, reward, error=0.03, equal=0.2):
    return {"step": step, "reward": reward, "reward_stderr": error, "frac_reward_zero_std": equal,
            "reward_std": 0.25, "entropy": 1.0, "completions/clipped_ratio": 0.0}  # fmt: skip


def settings_of(**settings):
    return SimpleNamespace(**{"estimator": Estimator(), "learning_rate": 1.0} | settings)


def latest(rows, prompts_per_step):
    return facts(rows, settings_of(prompts_per_step=prompts_per_step), "first", "latest")


def test_the_latest_steps_hold_enough_groups_and_are_compared_with_the_best_evaluation():
    before = {"step": 0, "eval_reward": 0.2, "eval_reward_stderr": 0.01}
    rows = [before, *[row(step, 0.1 * step) for step in range(1, 9)]]
    rows[5] |= {"eval_reward": 0.5, "eval_reward_stderr": 0.02}
    assert math.isnan(latest(rows[:6], 8)["latest_reward"])  # 6 steps of 8 groups are needed
    observed = latest(rows, 16)
    assert observed["steps"] == "steps 6 to 8" and observed["signs"] == ""
    assert observed["latest_reward"] == pytest.approx(0.7)
    assert observed["latest_stderr"] == pytest.approx(0.03 / math.sqrt(3))
    evaluations = {"best_reward": 0.5, "best_stderr": 0.02, "before_reward": 0.2}
    assert evaluations.items() <= observed.items()
    rows += [row(step, 0.0, error=0.0, equal=1.0) for step in range(9, 12)]
    observed = latest(rows, 16)  # equal rewards show no noise
    assert observed["latest_stderr"] == pytest.approx(0.03 / math.sqrt(3))
    assert judge(observed, "policy-destroyed")
    rows = [row(step, 0.2, error=None) for step in range(1, 60)]
    assert math.isnan(latest(rows, 1)["latest_stderr"])  # one prompt a step: its noise is unknown


@pytest.mark.parametrize(
    ("changes", "signs"),
    [
        ({"frac_reward_zero_std": 0.75}, "75% of the groups had equal rewards"),
        ({"completions/clipped_ratio": 0.5}, "50% of the completions were cut"),
        ({"frac_reward_zero_std": 0.74, "entropy": 0.26, "completions/clipped_ratio": 0.4}, ""),
        ({"entropy": 0.2}, "the entropy was 0.2 nats, down from 1"),
        ({"entropy": None, "completions/clipped_ratio": None}, ""),
    ],
)
def test_the_signs_of_a_policy_that_can_hardly_recover(changes, signs):
    rows = [row(1, 0.2), *[row(step, 0.0) | changes for step in range(2, 5)]]
    assert latest(rows, 16)["signs"] == signs


def test_means_leave_out_what_is_no_number_and_count_equal_rewards():
    rows = [row(1, 0.2), row(1, 0.4) | {"entropy": None, "reward_std": 0.0}]
    rows += [row(1, 0.3) | {"entropy": "Infinity"}]
    observed = facts(rows, settings_of(), "step", step_kl=2.0)
    assert observed["step_reward"] == pytest.approx(0.3) and observed["step_entropy"] == 1.0
    assert observed["step_equal"] == pytest.approx(0.2)
    assert observed["step_kl"] == 2.0 and math.isnan(observed["step_grad_norm"])
    alone = settings_of(estimator=Estimator(baseline="batch_mean"))
    assert facts(rows, alone, "step")["step_equal"] == pytest.approx(1 / 3)


def test_the_recent_steps_are_the_last_tenth_and_the_entropy_of_a_density_may_be_negative():
    rows = [row(step, step) for step in range(1, 21)]
    observed = facts(rows, settings_of(head="gaussian"), "recent")
    assert observed["recent_reward"] == 19.5 and "recent_entropy" not in observed
