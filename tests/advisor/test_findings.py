"""The diagnosis of made-up runs: one run for each verdict on each topic."""

from __future__ import annotations

import pytest

from tokenrl.advisor.diagnosis import advise_run
from tokenrl.core import Estimator
from tokenrl.core.baselines import LONGEST_WITHOUT_BASELINE
from tokenrl.core.entropy import LEAST_ENTROPY

FLAT = {"reward": lambda step: 0.5 + 0.1 * (-1) ** step, "evaluated": {0: 0.5, 40: 0.51}}
"""A reward that only jumps up and down."""
PLAIN = Estimator(baseline="none")
NORMALISED = Estimator(baseline="none", returns="episode_normalized")
KL = Estimator(beta=0.05)
LONG = {"max_completion_length": LONGEST_WITHOUT_BASELINE + 1, "allow_no_baseline": True, "estimator": PLAIN}
PIECES = {"estimator": Estimator.preset("ppo"), "num_steps": 16}


def entropy_of(value):
    """Entropy that reaches `value` only in the last tenth of 40 steps, which are those that count."""
    return lambda step: value if step > 36 else 1.0


BOUNDED = {"reward": lambda step: step / 40, "settings": {"max_samples": 1600}}
"""A reward that still rises; the run may generate 1,600 completions."""
CASES = [
    ("train", {}, "progress", "fine", {}),
    ("train", FLAT, "progress", "act", {"learning_rate": 2e-3}),
    ("train", FLAT | {"running": True, "steps": 12, "evaluated": {0: 0.5, 12: 0.5}}, "progress", "watch", {}),
    ("train", {"evaluated": {0: 0.0, 20: 0.9, 40: 0.5}}, "progress", "act", {"learning_rate": 5e-4}),
    ("train", {"reward": lambda step: step / 40}, "progress", "watch", {"max_steps": 80}),
    ("train", BOUNDED | {"num_samples": lambda step: 45 * step}, "progress", "watch", {"max_samples": 3200}),
    ("train", BOUNDED | {"num_samples": lambda step: 39 * step}, "progress", "watch", {}),
    (
        "train",
        {"reward": lambda step: step / 40, "steps": 30, "evaluated": {0: 0.0}},
        "progress",
        "watch",
        {},
    ),
    ("control", {"evaluated": {0: 20.0, 20: 480, 40: 476}, "solved": 475.0}, "progress", "fine", {}),
    ("train", {}, "entropy", "fine", {}),
    ("train", {"entropy": entropy_of(0.05)}, "entropy", "act", {"estimator.entropy_coef": 0.01}),
    ("train", {"entropy": entropy_of(0.05), "solved": 0.7}, "entropy", "watch", {}),
    (
        "train",
        {"entropy": 0.05, "settings": {"estimator": Estimator(entropy_coef=0.01)}},
        "entropy",
        "watch",
        {},
    ),
    ("control", {"entropy": 0.01, "reward_std": 12.0}, "entropy", "act", {"estimator.entropy_coef": 0.1}),
    (
        "control",
        {"entropy": -3.0, "settings": {"env": "Pendulum-v1", "head": "gaussian"}},
        "entropy",
        "fine",
        {},
    ),
    ("train", {}, "gradient noise", "fine", {}),
    ("train", FLAT, "gradient noise", "watch", {"diagnostics_every": 2}),
    ("train", {"settings": {"diagnostics_every": 50}}, "gradient noise", "fine", {}),
    ("train", FLAT | {"settings": {"diagnostics_every": 50}}, "gradient noise", "watch", {}),
    (
        "train",
        {"gradient__snr": float("nan"), "settings": {"diagnostics_every": 5}},
        "gradient noise",
        "act",
        {},
    ),
    ("train", {"gradient__snr": lambda step: 1.0 + step % 2}, "gradient noise", "fine", {}),
    (
        "train",
        {"gradient__snr": lambda step: 0.05 + 0.01 * (step % 2)},
        "gradient noise",
        "watch",
        {"prompts_per_step": 16},
    ),
    (
        "train",
        FLAT | {"gradient__snr": lambda s: (-1) ** s},
        "gradient noise",
        "act",
        {"prompts_per_step": 16},
    ),
    ("control", FLAT | {"gradient__snr": lambda s: (-1) ** s}, "gradient noise", "act", {"num_envs": 128}),
    ("train", {}, "signal", "fine", {}),
    ("train", {"frac_reward_zero_std": 0.4}, "signal", "watch", {}),
    ("train", {"frac_reward_zero_std": 0.6}, "signal", "act", {"num_generations": 8}),
    ("train", {"frac_reward_zero_std": 0.99, "solved": 0.7}, "signal", "watch", {}),
    ("train", {"frac_reward_zero_std": 0.99, "reward": 0.96}, "signal", "watch", {}),
    ("train", {"frac_reward_zero_std": 0.99, "reward": 9.6}, "signal", "act", {"num_generations": 8}),
    ("control", {"reward_std": lambda step: step % 4}, "signal", "fine", {}),
    ("control", {"reward_std": lambda step: step % 2}, "signal", "watch", {}),
    ("control", {"reward_std": 0.0}, "signal", "act", {"num_envs": 128}),
    ("control", {"reward_std": 0.0, "reward": 500.0, "solved": 475.0}, "signal", "watch", {}),
    ("train", {}, "truncation", "fine", {}),
    ("train", {"completions__clipped_ratio": 0.06}, "truncation", "watch", {}),
    ("train", {"completions__clipped_ratio": 0.1}, "truncation", "act", {"max_completion_length": 32}),
    ("control", {}, "truncation", "fine", {}),
    ("control", {"episode_length": 499.0}, "truncation", "watch", {}),
    ("control", FLAT | {"episode_length": 499.0}, "truncation", "act", {"max_episode_steps": 1000}),
    ("control", {"episode_length": 499.0, "solved": 0.7}, "truncation", "fine", {}),
    ("train", {}, "horizon", "fine", {}),
    ("train", {"settings": {"estimator": PLAIN}}, "horizon", "watch", {"estimator.baseline": "rloo"}),
    ("train", {"settings": LONG}, "horizon", "act", {"estimator.baseline": "rloo"}),
    ("control", {"settings": {"env": "bandit", "estimator": PLAIN}}, "horizon", "fine", {}),
    (
        "control",
        {"settings": {"num_envs": 1, "estimator": PLAIN}},
        "horizon",
        "watch",
        {"estimator.baseline": "running_mean"},
    ),
    ("control", {"settings": {"estimator": NORMALISED}}, "horizon", "fine", {}),
    ("train", {}, "skipped", "fine", {}),
    ("train", {"skipped_steps": lambda step: step // 40}, "skipped", "act", {"learning_rate": 5e-4}),
    (
        "control",
        {"skipped_steps": 1, "settings": PIECES | {"num_iterations": 4}},
        "skipped",
        "watch",
        {},
    ),
    ("train", {"clip_ratio": 0.1}, "clipping", "fine", {}),
    ("train", {"clip_ratio": 0.2}, "clipping", "watch", {}),
    ("train", {"clip_ratio": 0.4}, "clipping", "act", {"learning_rate": 5e-4}),
    ("train", {"kl": 3.0, "settings": {"estimator": KL}}, "KL", "fine", {}),
    ("train", {"kl": 2.2, "settings": {"estimator": KL, "target_kl": 2.0}}, "KL", "fine", {}),
    ("train", {"kl": 3.0, "settings": {"estimator": KL, "target_kl": 2.0}}, "KL", "watch", {}),
    (
        "train",
        {"kl": 5.0, "settings": {"estimator": KL, "target_kl": 2.0}},
        "KL",
        "act",
        {"estimator.beta": 0.1},
    ),
    (
        "train",
        {"kl": lambda step: step / 4, "evaluated": {0: 0, 20: 0.9, 40: 0.5}, "settings": {"estimator": KL}},
        "KL",
        "act",
        {"target_kl": 5.0},
    ),
    ("control", {"explained_variance": 0.5, "settings": PIECES}, "critic", "fine", {}),
    ("control", {"explained_variance": -0.5, "settings": PIECES}, "critic", "watch", {}),
    (
        "control",
        FLAT | {"explained_variance": -0.5, "reward_std": 1.2, "settings": PIECES},
        "critic",
        "act",
        {"value_learning_rate": 0.04},
    ),
    (
        "control",
        FLAT | {"explained_variance": -0.5, "reward_std": 50.0, "settings": PIECES},
        "critic",
        "act",
        {"reward_scale": 0.02},
    ),
]


@pytest.mark.parametrize(("kind", "what", "topic", "verdict", "changes"), CASES)
def test_every_verdict(made_up, kind, what, topic, verdict, changes):
    advice = advise_run(str(made_up(kind, **what)))
    found = {finding.topic: finding for finding in advice.findings}[topic]
    assert (found.verdict, found.changes) == (verdict, changes), found.text
    first, last = found.steps
    assert 0 <= first <= last == what.get("steps", 40)
    for name, value in changes.items():  # the arguments that are advised hold the change
        axis = name.removeprefix("estimator.")
        assert getattr(advice.arguments if axis == name else advice.arguments.estimator, axis) == value


def test_every_topic_has_every_verdict_that_it_can_have():
    seen = {(topic, verdict) for _, _, topic, verdict, _ in CASES}
    topics = {topic for topic, _ in seen}
    assert len(topics) == 9 + 1  # the checks of the diagnosis, and the progress
    assert seen == {(topic, verdict) for topic in topics for verdict in ("fine", "watch", "act")}


def test_the_entropy_is_that_of_the_last_tenth_and_the_threshold_that_of_training(made_up):
    just_above = made_up("train", entropy=entropy_of(LEAST_ENTROPY))
    just_below = made_up("train", entropy=entropy_of(LEAST_ENTROPY - 1e-6))
    earlier = made_up("train", entropy=lambda step: 1.0 if step > 36 else 0.01)
    verdicts = []
    for path in (just_above, just_below, earlier):
        found = {finding.topic: finding for finding in advise_run(str(path)).findings}["entropy"]
        assert found.steps == (37, 40)
        verdicts.append(found.verdict)
    assert verdicts == ["fine", "act", "fine"]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_envs": 1},
        {"estimator": Estimator(baseline="episode_mean", scale="episode_std", returns="reward_to_go")},
        {"estimator": Estimator(baseline="value", returns="episode_normalized")},
    ],
)
def test_equal_returns_are_no_lack_of_signal_where_episodes_are_not_compared(made_up, settings):
    def topics(**chosen):
        return [
            finding.topic
            for finding in advise_run(str(made_up("control", reward_std=0.0, **chosen))).findings
        ]

    assert "signal" in topics()
    assert "signal" not in topics(settings=settings)


def test_a_single_episode_has_no_spread_to_judge(made_up):
    """A rollout of pieces records the spread of the episodes that ended in it, 0 for one of them."""
    for episodes, judged in ((1, False), (2, True)):
        path = made_up("control", settings=PIECES, reward_std=0.0, episodes=episodes)
        assert ("signal" in [finding.topic for finding in advise_run(str(path)).findings]) == judged


@pytest.mark.parametrize(
    ("kind", "words"), [("train", "--warm-start, or tokenrl sft"), ("control", "a shaped reward")]
)
def test_what_is_too_hard_gets_the_help_that_fits(made_up, kind, words):
    path = made_up(kind, reward_std=0.0, frac_reward_zero_std=1.0, reward=0.0)
    text = next(finding.text for finding in advise_run(str(path)).findings if finding.topic == "signal")
    assert f"too hard, so {words}" in text or f"too hard, so a warm start ({words})" in text


LOST = {
    "evaluated": {0: 0.4},
    "reward": lambda step: 0.4 if step == 1 else 0.0,
    "reward_stderr": lambda step: 0.05 if step == 1 else 0.0,
    "frac_reward_zero_std": lambda step: 0.1 if step == 1 else 1.0,
    "grad_norm": lambda step: 9.0 if step == 1 else 0.0,
    "completions__clipped_ratio": 0.5,
}


def test_a_destroyed_policy_is_not_mistaken_for_a_task_that_is_too_hard(made_up):
    path = made_up("train", settings={"learning_rate": 8e-4}, **LOST)
    advice = advise_run(str(path))
    found = {finding.topic: finding for finding in advice.findings}
    assert found["policy-destroyed"].verdict == "act" and found["policy-destroyed"].steps == (1, 4)
    assert "fell from 0.4 (evaluation before training) to 0.1," in found["policy-destroyed"].text
    assert "too hard" not in found["signal"].text
    assert advice.again.endswith("--learning-rate 0.0002")  # and no other change
    recovered = LOST | {"evaluated": {0: 0.4, 40: 0.9}}
    topics = {finding.topic for finding in advise_run(str(made_up("train", **recovered))).findings}
    assert "policy-destroyed" not in topics
