"""The table of rules: each fires on a case, and is silent on its neighbour."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from tokenrl.control.arguments import ControlArguments
from tokenrl.core import Estimator
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs.findings import Gain, Latest, Mean, Means, Observed, observe
from tokenrl.runs.rules import judge

SIGNS = "90% of the groups had equal rewards"
FALLEN = Latest(first=Mean(0.2, 0.02, 1), reward=Mean(0.0, 0.01, 4), signs=SIGNS)
LOST = Observed(learning_rate=0.1, sampled=[Mean(0.2, 0.012, 0)], latest=FALLEN)
HARDER = [Mean(0.8, 0.012, 0)]  # held-out prompts may be easier than those of training
RISEN = [Mean(0.2, 0.012, 0), Mean(0.6, 0.012, 9)]
GAIN = Gain(0.01, 0.02, before=0.3, equal=0.6)
ENDED = Observed(learning_rate=0.1, gain=GAIN)
GREEDY = Observed(greedy=[Mean(0.8, 0.03, 0), Mean(0.1, 0.02, 9)])
GAP = Observed(greedy=[Mean(0.8, 0.03, 0)], sampled=[Mean(0.07, 0.01, 0)], most=[Mean(0.1, 0.02, 0)],
               eval_generations=4)  # fmt: skip
LEFT_OUT = Observed(abstention="Judge gave none.", on_abstain="leave-out")
RISING = Latest(first=Mean(0.2, 0.03, 1), reward=Mean(0.9, 0.02, 400), signs="")
HEART = Observed(
    latest=RISING, sampled=[Mean(0.2, 0.1, 0), Mean(0.4, 0.1, 50), Mean(0.3, 0.1, 400)]
)
"""The usual fate of 50 rows, of which ten are held out."""
RATES = Observed(learning_rate=0.1, lowest_rate=1e-3, highest_rate=1e-3)
FAR = Observed(recent=Means(logp_difference=0.06, effective_samples=0.9))
NEAR = Means(logp_difference=0.05, effective_samples=0.5)
TRIAL = Observed(groups="4 groups", step=Means(reward=0.5, equal=1))
IDLE = Observed(idle_steps=3, step=Means(reward=0.5), learning_rate=0.1)
EQUAL = Observed(whole=Means(equal=0.6))
CUT = Observed(whole=Means(cut=0.2), max_completion_length=16)
CASES = [  # flag, weight, what was observed, and what of it makes the rule silent
    ("policy-destroyed", "void", LOST, {"latest": FALLEN._replace(signs="")}),
    ("policy-destroyed", "void", LOST, {"latest": FALLEN._replace(reward=Mean(0, 0.05, 4))}),
    ("policy-destroyed", "void", LOST, {"sampled": HARDER}),
    ("policy-destroyed", "void", replace(LOST, sampled=RISEN),
     {"latest": FALLEN._replace(reward=Mean(0.5, 0.01, 4))}),
    ("entropy-collapsed", "act", Observed(recent=Means(entropy=0.09)),
     {"recent": Means(entropy=0.1)}),
    ("entropy-collapsed", "act", Observed(recent=Means(entropy=-1)),
     {"entropy_coef": 0.01}),

    ("sampling-differs", "act", FAR, {"recent": NEAR}),
    ("sampling-differs", "void", replace(FAR, recent=replace(NEAR, effective_samples=0.4)),
     {"importance_centre": True}),
    ("sampled-elsewhere", "act", Observed(step=Means(evidence=7.0)), {"step": Means(evidence=6.9)}),
    ("rewards-abstain", "watch", Observed(abstention="Judge gave none."), {"abstention": ""}),
    ("rewards-abstain", "watch", LEFT_OUT, {"abstention": ""}),
    ("learnt-by-heart", "act", HEART, {"sampled": [*HEART.sampled, Mean(0.6, 0.1, 450)]}),  # more than half
    ("learnt-by-heart", "act", HEART, {"sampled": [*HEART.sampled, Mean(0.41, 0.1, 450)]}),  # it still rises
    ("learnt-by-heart", "act", HEART, {"latest": RISING._replace(reward=Mean(0.4, 0.05, 400))}),  # noise
    ("learnt-by-heart", "act", HEART, {"num_envs": 4}),
    ("learnt-by-heart", "act", HEART, {"is_solved": True}),
    ("no-signal", "void", TRIAL, {"step": Means(reward=0.5, equal=0.8)}),
    ("no-signal", "watch", replace(TRIAL, others_differ=True), {"groups": ""}),
    ("no-signal", "void", IDLE, {"idle_steps": 2}),
    ("no-signal", "void", replace(IDLE, idle_steps=2, stop_after_zero_spread=2), {"idle_steps": 1}),
    ("no-signal", "void", replace(IDLE, sampled=[Mean(0.9, 0.01, 0)]), {"idle_steps": 0}),
    ("no-signal", "act", EQUAL, {"whole": Means(equal=0.25)}),
    ("no-signal", "act", replace(EQUAL, num_envs=4), {"whole": Means(equal=0.25)}),
    ("nothing-learnt", "act", ENDED, {"gain": replace(GAIN, value=0.05)}),
    ("nothing-learnt", "act", Observed(is_unlearnt=True, learning_rate=1e-6), {"is_unlearnt": False}),
    ("constant-answer", "act", Observed(constant="'7'"), {"constant": ""}),
    ("constant-answer", "watch", Observed(constant="'7'", is_solved=True), {"constant": ""}),
    ("greedy-fell", "act", GREEDY, {"greedy": [Mean(0.8, 0.03, 0), Mean(0.75, 0.02, 9)]}),
    ("greedy-fell", "act", GREEDY, {"keep": "best"}),
    ("greedy-gap", "watch", GAP, {"most": [Mean(0.75, 0.02, 0)]}),
    ("truncation", "watch", Observed(step=Means(cut=1), max_completion_length=8), {"step": Means(cut=0.9)}),
    ("truncation", "act", CUT, {"whole": Means(cut=0.05)}),
    ("truncation", "void", replace(CUT, whole=Means(cut=0.6)),
     {"whole": Means(cut=0)}),
    ("unusual-rate", "void", replace(RATES, learning_rate=0.031), {"learning_rate": 1e-2}),
    ("unusual-rate", "watch", replace(RATES, learning_rate=0.02),
     {"highest_rate": 0.02}),
    ("unusual-rate", "watch", replace(RATES, learning_rate=1e-5),
     {"learning_rate": 1e-3 / 29}),
    ("skipped", "void", Observed(skipped=0.8, learning_rate=1e-3), {"skipped": 0}),
    ("skipped", "watch", Observed(skipped=0.01), {"skipped": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "weight", "observed", "neighbour"), CASES)
def test_a_rule_fires_on_its_case_and_is_silent_on_its_neighbour(flag, weight, observed, neighbour):
    (finding,) = judge(observed, flag)
    assert finding.weight == weight and finding.text.endswith(".")
    assert judge(replace(observed, **neighbour), flag) == []


@pytest.mark.parametrize(
    ("observed", "words"),
    [
        (
            replace(LOST, highest_rate=0.001),
            "The policy is destroyed: the mean reward fell from 0.2 to 0, and 90% of the groups had equal "
            "rewards. The learning rate, 0.1, is the likely cause: try --learning-rate 0.001.",
        ),
        (replace(LOST, highest_rate=0.2), "try --learning-rate 0.025."),
        (ENDED, "It is no gain beyond noise. Use prompts that"),
        (ENDED, "In 60% of the steps no two rewards that are compared differed."),
        (replace(ENDED, gain=replace(GAIN, equal=0.1)), "More steps"),
        (replace(EQUAL, is_solved=True), "no gradient. The policy already solves"),
        (Observed(is_unlearnt=True, learning_rate=1e-6), "a higher --learning-rate than 1e-06 may give one"),
        (Observed(constant="'{7}'"), "are the same, '{7}', though the prompts differ."),
        (replace(ENDED, pass_mark=0.2), "The policy already solves these prompts"),
        (replace(ENDED, gain=replace(GAIN, value=-0.1)), "It has fallen. The learning rate"),
        (LEFT_OUT, "gave none. These completions are left out of their groups (--on-abstain leave-out)"),
        (replace(LEFT_OUT, on_abstain="zero"), "it counts as 0 in their sum"),
        (GREEDY, "to 0.1. Updates follow samples or demonstrations, so look at what became of these too."),
        (HEART, "training prompts rose from 0.2 to 0.9, and that of held-out prompts went from 0.2 to 0.3; its best "
         "was 0.4, at step 50. The policy learns its training prompts by heart. Give more distinct prompts"),
        (replace(TRIAL, groups="{groups} of {0} {"), "In none of {groups} of {0} { do the rewards"),
        (replace(CUT, step=Means(cut=1), whole=Means(), uncut="give --stop }{"), "little: give --stop }{"),
    ],
)  # fmt: skip
def test_a_sentence_names_the_cause_and_keeps_the_braces_of_a_text(observed, words):
    finding, *_ = judge(observed)
    assert words in finding.text


def test_where_prompts_are_learnt_by_heart_no_more_steps_are_advised():
    both = judge(replace(HEART, gain=GAIN))
    assert [finding.flag for finding in both] == ["learnt-by-heart", "nothing-learnt"]
    assert all("Give more distinct prompts" in finding.text for finding in both)


def test_fields_that_are_filled_by_name_are_settings():
    """A setting under another name would leave its field empty, and silence a rule."""
    named = {field.name for field in fields(Observed)} & {
        field.name
        for kind in (TrainArguments, ControlArguments, Estimator)
        for field in fields(kind)
    }
    assert named == {"learning_rate", "max_completion_length", "num_envs", "keep",
                     "eval_generations", "importance_centre", "entropy_coef",
                     "stop_after_zero_spread", "on_abstain", "rows"}  # fmt: skip


def row(step, reward, error=0.03, equal=0.2):
    return {"step": step, "reward": reward, "reward_stderr": error, "frac_reward_zero_std": equal,
            "reward_std": 0.25, "entropy": 1.0, "completions/clipped_ratio": 0.0}  # fmt: skip


def observed_of(rows, **settings):
    return observe(rows, SimpleNamespace(**{"estimator": Estimator()} | settings))


def test_the_latest_steps_hold_enough_groups_and_evaluations_are_read_in_order():
    before = {"step": 0, "eval_reward": 0.2, "eval_reward_stderr": 0.01, "eval_best@4": 0.5}
    rows = [before, *[row(step, 0.1 * step) for step in range(1, 9)]]
    rows[5] |= {"eval_reward": 0.5, "eval_reward_stderr": 0.02}
    assert observed_of(rows[:6], prompts_per_step=8).latest is None  # of 8 groups 6 are needed
    observed = observed_of(rows, prompts_per_step=16, eval_generations=4)
    assert observed.latest.reward == pytest.approx((0.7, 0.03 / math.sqrt(3), 8))
    assert observed.sampled == [(0.2, 0.01, 0), (0.5, 0.02, 5)]
    assert observed.most[0].value == 0.5 and observed.greedy == []
    rows += [row(step, 0.0, error=0.0, equal=1.0) for step in range(9, 12)]
    observed = observed_of(rows, prompts_per_step=16, learning_rate=1.0)
    assert observed.latest.reward.error == pytest.approx(0.03 / math.sqrt(3))  # of the first step
    assert judge(observed, "policy-destroyed")


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
    assert observed_of(rows, prompts_per_step=16).latest.signs == signs


def test_means_leave_out_what_is_no_number_and_count_equal_rewards():
    equal = {"reward_std": 0.0, "frac_reward_zero_std": 1.0}
    rows = [row(1, 0.2), row(2, 0.4) | {"entropy": None} | equal]
    rows += [row(3, 0.3) | {"entropy": "Infinity"}]
    recent = observed_of(rows * 10).recent  # three rows
    assert recent.reward == pytest.approx(0.3) and recent.equal == pytest.approx(
        (0.2 + 1 + 0.2) / 3
    )
    assert recent.entropy == 1.0 and math.isnan(recent.logp_difference)
    alone = {"estimator": Estimator(baseline="batch_mean")}
    assert observed_of(rows * 10, **alone).recent.equal == pytest.approx(1 / 3)
    assert math.isnan(observed_of(rows, **alone, num_envs=1).recent.equal)  # nothing is compared


def test_the_recent_steps_are_the_last_tenth_and_the_entropy_of_a_density_may_be_negative():
    observed = observed_of([row(step, step) for step in range(1, 21)], head="gaussian")
    assert (observed.step.reward, observed.recent.reward) == (20, 19.5)
    assert math.isnan(observed.recent.entropy)
