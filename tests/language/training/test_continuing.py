"""A run that is saved and loaded into freshly made parts continues bit for bit."""

from __future__ import annotations

import pytest
from saved_states import equal, through_a_checkpoint
from tiny_models import PROMPTS, make_learner, make_policy, make_task, one_step, vowel_reward

from tokenrl.core import Estimator
from tokenrl.errors import Refused
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.training import loop
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.setup import make_accelerator
from tokenrl.language.training.supervised import SupervisedTraining
from tokenrl.language.training.verdicts import judge_step
from tokenrl.runs.session import Session
from tokenrl.settings import arguments

CYCLE = {"num_iterations": 2, "num_minibatches": 2, "micro_batch_size": 3}
KINDS = {
    "rloo": ("rloo", {"diagnostics_every": 1, "max_grad_norm": 0.5}),
    "ppo": ("ppo", CYCLE),
    "kl": (Estimator.preset("grpo", beta=0.5), {"target_kl": 0.3, "kl_gain": 2.0, "weight_decay": 0.1}),
}


def weights_of(learner):
    return dict(learner.policy.model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_continues(kind):
    estimator, options = KINDS[kind]
    learners = [make_learner(make_policy(), estimator, **options) for _ in range(2)]
    whole, part = learners
    for step in (1, 2):
        one_step(whole, step=step)
    whole.skipped, whole.nonfinite, whole.idle = 3, 2, 1
    state, weights = (through_a_checkpoint(x) for x in (whole.state_dict(), weights_of(whole)))
    one_step(part, reward=lambda completions, **_: [float(i) for i in range(len(completions))])
    part.load_state_dict(state)
    part.policy.model.load_state_dict(weights)
    assert equal(part.state_dict(), whole.state_dict())
    for step in (3, 4):
        records = [one_step(learner, step=step) for learner in learners]
        assert equal(*(dict(record.metrics) for record in records))
        assert equal(*map(weights_of, learners)) and equal(*(one.state_dict() for one in learners))
    assert (part.skipped, part.idle) == (3, 1)
    if kind == "kl":
        assert part.estimator.beta != 0.5 and part.estimator.baseline == whole.estimator.baseline
    else:
        assert state["critic" if kind == "ppo" else "diagnostics"] is not None


def prepared(folder, session):
    options = {
        **{"model": None, "task": make_task(), "reward": vowel_reward, "output_dir": folder},
        **{"estimator": "reinforce_running_mean", "max_steps": 9, "prompts_per_step": 3},
        **{"num_generations": 2, "learning_rate": 0.01, "max_completion_length": 6, "cpu": True},
        **{"lr_scheduler_type": "cosine", "warmup_steps": 2, "eval_generations": 2, "threads": 1},
    }
    args = arguments(TrainArguments, options | {"model": make_policy()})
    task = make_task([*PROMPTS, "the log"])
    return loop._prepare(args, task, Rewards(vowel_reward), make_accelerator(args), session)


def trained(run, session, number):
    """One step of the loop as far as it changes state; returns its metrics."""
    for step in session.steps(session.step + number):
        record = loop._one_step(run, step)
        run.rows.append({"step": step, **record.metrics})
        judge_step(run, session)
        if step % 2 == 0:
            loop._evaluate(run, step)
    return dict(record.metrics)


def test_a_run_continues(tmp_path):
    with (
        Session("train", tmp_path / "a", quiet=True) as first,
        Session("train", tmp_path / "b", quiet=True) as second,
    ):
        whole, part = prepared(tmp_path / "a", first), prepared(tmp_path / "b", second)
        loop._evaluate(whole, 0)
        trained(whole, first, 3)
        whole.step_seconds = 2.5
        states = {name: through_a_checkpoint(one.state_dict()) for name, one in first._saver._parts.items()}
        weights = through_a_checkpoint(weights_of(whole.learner))
        for name, one in second._saver._parts.items():
            one.load_state_dict(states[name])
        part.learner.policy.model.load_state_dict(weights)
        second.step, part.rows = 3, list(whole.rows)  # as metrics.jsonl gives them back
        part.set_rate(3)
        assert part.step_seconds == 2.5 and equal(part.state_dict(), whole.state_dict())
        assert equal(trained(part, second, 4), trained(whole, first, 4))
        assert equal(weights_of(part.learner), weights_of(whole.learner))
        for one in (whole, part):
            one.step_seconds = 0.0
        assert equal(part.state_dict(), whole.state_dict())
        assert equal(part.learner.state_dict(), whole.learner.state_dict())
        assert len(part.means) == 2
        assert part.learner.schedule.get_last_lr() == whole.learner.schedule.get_last_lr()


def supervised(policy, max_steps=7, **options):
    rows = [{"prompt": prompt, "completion": " dog" * (i % 4 + 1)} for i, prompt in enumerate(PROMPTS * 2)]
    how = {"max_steps": max_steps, "batch_size": 3, "learning_rate": 0.01, "seed": 4} | options
    return SupervisedTraining(policy, rows, **how)


@pytest.mark.parametrize("at", [0, 4])
def test_a_supervised_training_continues(at):
    policies = [make_policy() for _ in range(2)]
    whole, part = map(supervised, policies)
    for _ in range(at):
        whole.learn()
    state, weights = (through_a_checkpoint(x.state_dict()) for x in (whole, policies[0].model))
    part.learn()
    part.load_state_dict(state)
    policies[1].model.load_state_dict(weights)
    for _ in range(at, 7):
        assert equal(part.learn(), whole.learn())
    assert equal(*(through_a_checkpoint(one.state_dict()) for one in (whole, part)))
    assert equal(*(dict(policy.model.state_dict()) for policy in policies))
    assert part.step == 7 and part.loss_before == whole.loss_before
    with pytest.raises(Refused, match="seed 4 and this run has 5"):
        supervised(make_policy(), seed=5).load_state_dict(state)


def test_a_longer_supervised_training_continues_with_its_own_rates():
    whole, longer = supervised(make_policy()), supervised(make_policy(), max_steps=70)
    for _ in range(6):
        whole.learn()
    longer.load_state_dict(through_a_checkpoint(whole.state_dict()))
    assert whole.learning_rate == pytest.approx(0.01 / 7)
    assert longer.learning_rate == pytest.approx(0.01 * 64 / 70)
