"""Makes the rows of a training step, and divides them: over processes, updates and micro-batches.

One process samples its completions, rewards them and adds what the estimator compares them with. `refill`
replaces groups whose rewards are all equal by groups of new prompts. Advantages and weights are computed from
the whole step, identically on every process, and then sliced; the completions of a prompt stay on one process.
Processes may make different numbers of passes, of different widths, because their gradients are summed only
after the last pass of an update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.memories import Memory, read
from tokenrl.core.objectives import check_rewards
from tokenrl.core.rows import LossTerms, unrounded, zero_spread
from tokenrl.errors import Refused, Stopped
from tokenrl.language.rollout.rewarded import Rewarded, failures_of, reward_rows, sample_rows
from tokenrl.language.rollout.rollout import (
    ABSENT,
    OF_PROMPTS,
    Rollout,
    cat,
    pad_right,
    to_device,
    to_host,
)
from tokenrl.language.rollout.scoring import Scores
from tokenrl.runs.files import canonical
from tokenrl.runs.processes import gather_rows, local

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator
    from tokenrl.language.rewards.environments import Environments
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.rollout.sampling import Sampling
    from tokenrl.language.training.learner import Learner

Prompts = list[tuple[int, Mapping[str, Any]]]  # (number in the stream of prompts, row of the task)
DrawPrompts = Callable[[int], Prompts]  # takes a number and returns that many further prompts


@dataclass(frozen=True, kw_only=True)
class Experience(Rollout):
    """What the policy learns from: rewarded rows without their texts, as the estimator compares them.

    The rows of the whole step, which every process holds, have no columns with three dimensions and no
    `teacher_prompts`; these stay with the process that sampled the rows.

    Attributes:
        rewards, by_function, valid, replayed, dense_rewards, greedy_rewards: those of `Rewarded`.
        ref_logprobs: log-probabilities under the reference [N, T]; None without a KL.
        ref_states: what the head of the reference is given before each action [N, T, H], for a KL in closed form.
            Its logits [N, T, V], if no head can be taken apart. None where they are computed again in each pass.
        values: the critic's value of the state before each action [N, T]; None without a critic.
        keys: a number for each row that its prompt and the other columns of its data determine [N]; None
            without a memory of prompts.
        old_logprobs: log-probabilities under the policy that sampled, as the trainer computes them [N, T];
            None while that is the present policy.
        teacher_prompts: ids of the prompt that the teacher reads in place of each row's, N lists of any lengths;
            None where it reads the same.
    """

    rewards: Tensor
    by_function: Tensor
    valid: Tensor
    replayed: Tensor
    dense_rewards: Tensor | None = None
    greedy_rewards: Tensor | None = None
    ref_logprobs: Tensor | None = None
    ref_states: Tensor | None = None
    values: Tensor | None = None
    keys: Tensor = ABSENT
    old_logprobs: Tensor | None = None
    teacher_prompts: Sequence[list[int]] | None = None

    @property
    def rewarded(self) -> Tensor:
        """True on completions of this step that have a reward [N]."""
        return self.valid & ~self.replayed


def sample(
    learner: Learner, prompts: Prompts, sampling: Sampling, environments: Environments | None
) -> Rollout:
    """Sample completions with the run's generator, and compute the columns that the estimator needs."""
    estimator = learner.estimator
    greedy = not sampling.num_generations
    if not greedy:
        sampling = learner.keeping(sampling)
    rollout = sample_rows(
        learner.policy, learner.generator, prompts, sampling, "training", environments
    )
    if greedy:  # greedy completions are only rewarded, never learnt from
        return rollout
    if estimator.importance_centre and rollout.sampling_distribution is None:
        raise Refused(
            "importance_centre needs the sampler's probability of every token, and this generator returns "
            "none: its Rollout has no sampling_distribution. Set importance_centre to False, or return it, with "
            "top_ids if it is that of the most probable tokens only."
        )
    rollout = learner.with_missing_fields(rollout)
    learner.generator.check(rollout, sampling)
    return rollout


def collect_rows(
    learner: Learner, rewards: Rewards, prompts: Prompts, sampling: Sampling
) -> Rewarded:
    """Sample completions of a step and reward them."""
    rows = sample(learner, prompts, sampling, rewards.environments)
    return reward_rows(learner.policy, rewards, rows, [row for _, row in prompts])


def rows_of_step(
    learner: Learner, rewards: Rewards, sampling: Sampling, draw_prompts: DrawPrompts
) -> Rewarded:
    """Sample and reward the rows of a step, with those that replace equal groups and those that are replayed.

    They have the reward of the greedy completion, if the baseline reads it (ReMax, arXiv 2310.10505).
    """
    prompts = local(learner.accelerator, draw_prompts(learner.args.prompts_per_step))
    rows = collect_rows(learner, rewards, prompts, sampling)
    if learner.estimator.zero_spread == "refill":
        rows = refill(learner, rewards, sampling, rows, draw_prompts)
    if learner.replay is not None:
        rows = learner.replay.join(learner, rows, sampling.step)
    if "greedy_rewards" in learner.estimator.needs:
        size = learner.group_size
        prompts = list(zip(rows.prompt_index.tolist(), rows.data, strict=True))[::size]
        greedy = collect_rows(learner, rewards, prompts, replace(sampling, num_generations=0))
        greedy = greedy.take(torch.arange(len(prompts)).repeat_interleave(size))
        valid = rows.valid & greedy.valid  # without a greedy reward there is no baseline
        rows = replace(rows, greedy_rewards=greedy.rewards, valid=valid)
    return rows


def refill(
    learner: Learner,
    rewards: Rewards,
    sampling: Sampling,
    rows: Rewarded,
    draw_prompts: DrawPrompts,
) -> Rewarded:
    """Replace groups whose rewards are all equal by groups of new prompts, in up to `max_refills` rounds.

    This is the dynamic sampling of DAPO (arXiv 2503.14476): with a group baseline, such groups have no
    gradient. The metric `refilled` is the number of groups replaced, over all processes.

    Args:
        learner: the policy and the settings.
        rewards: the reward functions.
        sampling: how completions are sampled.
        rows: this process's groups.
        draw_prompts: gives further prompts, the same on every process.
    """
    accelerator = learner.accelerator
    size = sampling.group_size
    refilled = 0
    logged = rows.logged
    for _ in range(learner.args.max_refills):
        dead = zero_spread(rows.rewards, size, rows.valid)
        counts = gather_rows(accelerator, {"dead": dead.sum()[None]})["dead"].tolist()
        if not sum(counts):
            break
        refilled += sum(counts)
        # Every process draws the same prompts and takes those that replace its own groups.
        first = sum(counts[: accelerator.process_index])
        prompts = draw_prompts(sum(counts))[first:][: counts[accelerator.process_index]]
        if prompts:
            new = collect_rows(learner, rewards, prompts, sampling)
            order = torch.arange(len(rows))
            order[dead.repeat_interleave(size)] = len(rows) + torch.arange(len(new))
            rows = cat([rows, new]).take(order)
            logged += new.logged
    count = ({"refilled": float(refilled)}, 1)  # the same number on every process
    return replace(rows, logged=(*logged, count))


def experience(learner: Learner, rows: Rewarded, sampling: Sampling) -> Experience:
    """Return what is learnt from rewarded rows: their tensors, and what the estimator compares them with.

    Args:
        learner: holds the reference, the teacher and the critic.
        rows: this process's n rows.
        sampling: how they were sampled.
    """
    estimator = learner.estimator
    numbers = dict[str, Tensor]()
    columns: dict[str, Any] = rows.tensors()
    prompts = None
    if learner.teacher_prompts is not None:
        prompts = learner.teacher_prompts.of(learner.policy, rows, sampling)
    if estimator.beta:
        keeps = "token_kl" in estimator.needs and learner.forward.keeps_ref_states(rows.mask)
        scores = learner.ref_scores(rows, prompts, states=keeps)
        numbers["ref_logprobs"] = scores.logprobs
        columns["ref_states"] = scores.states
    if learner.critic is not None:
        numbers["values"] = learner.critic.values(rows.hidden).detach()
    if estimator.needs_memory or learner.replay is not None:
        columns["keys"] = data_keys(rows.data)
    columns |= {name: x.to(rows.logprobs) for name, x in numbers.items()}
    old = old_logprobs(learner, rows)
    return Experience(**columns, old_logprobs=old, teacher_prompts=prompts)


def old_logprobs(learner: Learner, rows: Rewarded) -> Tensor | None:
    """Return the log-probabilities [n, T] under the policy that sampled, as the scoring pass computes them.

    They are not taken from the rollout, because the generator's numbers may differ by rounding, and the ratio
    of the first update must be exactly 1. None if no update needs them: the estimator has no ratio, or the
    step has a single update, in which the ratio is 1 by definition.
    """
    several = learner.args.num_iterations * learner.args.num_minibatches > 1
    if "old_logprobs" in learner.estimator.needs and several:
        return learner.logprobs(rows)
    return None


def data_keys(data: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return a number of 63 bits for each row of the data, from a hash of all its columns [n]."""
    digests = [hashlib.sha256(canonical(row).encode()).digest() for row in data]
    return torch.tensor([int.from_bytes(digest[:8], "big") >> 1 for digest in digests])


def gather(accelerator: Any, rows: Experience, failures: Sequence[str]) -> Experience:
    """Gather the rows of all processes, in the order of the prompts, with the log-probabilities in one precision.

    An engine may have another one, and so may a process that sampled no token at all.

    Args:
        accelerator: accelerate's handle of device and processes.
        rows: this process's n rows.
        failures: what failed in their episodes; empty without an environment.

    Raises:
        Stopped: no row of the step has a reward.
    """
    rows = replace(rows, sampling_logprobs=rows.sampling_logprobs.to(rows.logprobs))
    if accelerator.num_processes > 1:
        own = {name: x for name, x in rows.tensors().items() if x.ndim < 3}
        gathered = gather_rows(accelerator, own, OF_PROMPTS)
        host = zip(gathered, to_host(gathered.values()), strict=True)
        columns: dict[str, Any] = {name: x.to(own[name].dtype) for name, x in host}
        rows = Experience(**columns)
    if not rows.valid.any():
        failed = failures_of(failures)
        raise Stopped(
            f"Reward functions abstained from every completion of this step. {failed}".strip()
        )
    return rows


def loss_terms(
    estimator: Estimator, rows: Experience, sampling: Sampling, memory: Memory, rewards: Rewards
) -> LossTerms:
    """Return the advantages and what counts of all N rows, in loss and divisor.

    Raises:
        Refused: A row that does not abstain has a reward that the objective does not take.
    """
    check_rewards(estimator.objective, rows.rewards, rows.valid)
    dtype = rows.logprobs.dtype
    names = (
        "mask",
        "valid",
        "truncated",
        "turns",
        "logprobs",
        "ref_logprobs",
        "values",
        "score_norms",
        "greedy_rewards",
        "sampling_logprobs",
    )
    inputs = {name: getattr(rows, name) for name in names}
    if rows.dense_rewards is not None:
        inputs["turn_rewards"] = unrounded(rows.dense_rewards, dtype)
    terms = estimator.loss_terms(
        unrounded(rows.rewards, dtype),
        group_size=sampling.group_size,
        max_length=sampling.max_completion_length,
        baseline_value=None if rows.keys is None else read(memory, rows.keys),  # [N]
        components=unrounded(rows.by_function, dtype),
        component_weights=torch.from_numpy(rewards.weights),  # [F]
        **inputs,
    )
    return terms.to(dtype)


def update_weights(learner: Learner, terms: LossTerms, chosen: Tensor) -> Tensor:
    """Return the weights [N, T] of the tokens in an update of the chosen rows [N], 0 elsewhere."""
    return learner.estimator.token_weights(
        terms.in_gradient.to(terms.weights),  # so that 1/N has that precision
        max_length=learner.sampling.max_completion_length,
        valid=terms.in_divisor,
        chosen=chosen,
    )


def learning_rows(learner: Learner, terms: LossTerms, chosen: Tensor) -> Tensor:
    """Return True for the rows of an update that can have a gradient [N]; other rows count in divisors only.

    Args:
        learner: the settings.
        terms: the advantages, and which rows and tokens are learnt from.
        chosen: True for the rows of the update [N].
    """
    learning = chosen & terms.in_gradient.any(dim=1)
    if not learner.estimator.loss_side_terms:  # a KL or an entropy term has a gradient everywhere
        learning &= (terms.advantages != 0).reshape(len(learning), -1).any(dim=1)
    return learning


def loss_inputs(
    rows: Experience, scores: Scores, advantages: Tensor, weights: Tensor
) -> dict[str, Any]:
    """Return the arguments of `Estimator.loss` for the n rows of a micro-batch; they are on the device of the scores.

    If the present policy is also the one that sampled, the denominator of the ratio is the same number
    without its gradient: the ratio is 1, and its gradient is that of the log-probabilities.

    Args:
        rows: the rows.
        scores: their present scores.
        advantages: one for each row [n] or for each token, of any width [n, ...].
        weights: each token's weight in the loss of the whole update, of any width [n, ...].
    """
    width = rows.mask.shape[1]
    names = ("mask", "old_logprobs", "sampling_logprobs", "ref_logprobs")
    columns = {name: getattr(rows, name) for name in names}
    columns["advantages"] = advantages if advantages.ndim == 1 else pad_right(advantages, width)
    columns["weights"] = pad_right(weights, width)
    device = scores.logprobs.device
    inputs = {name: None if x is None else to_device(x, device) for name, x in columns.items()}
    if rows.old_logprobs is None:
        inputs["old_logprobs"] = scores.logprobs.detach()
    return inputs | {
        "logprobs": scores.logprobs,
        "entropy": scores.entropy,
        "centres": scores.centres,
        "token_kl": scores.token_kl,
    }
