"""Makes the rewarded rows of a training step, and what the loss takes of them in updates and micro-batches.

One process samples its completions and rewards them. `refill` replaces groups whose rewards are all equal by
groups of new prompts. Advantages and weights are computed from the whole step, identically on every process, and
then sliced; the completions of a prompt stay on one process. Processes may make different numbers of passes, of
different widths, because their gradients are summed only after the last pass of an update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.memories import Memory, read
from tokenrl.core.objectives import check_rewards
from tokenrl.core.rows import LossTerms, unrounded, zero_spread
from tokenrl.core.schedules import policy_steps
from tokenrl.language.rollout.rewarded import Rewarded, Row, reward_rows, sample_rows
from tokenrl.language.rollout.rollout import cat, pad_right, to_device
from tokenrl.language.rollout.scoring import Scores
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.experience import Experience, gathered
from tokenrl.language.training.logged import logged_rows
from tokenrl.runs.processes import agreed, gather_objects, local

if TYPE_CHECKING:
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.rollout.sampling import Sampling
    from tokenrl.language.training.learner import Learner

Prompts = list[tuple[int, Row]]  # (number in the stream of prompts, row of the task)


@agreed
def collect_rows(
    learner: Learner, rewards: Rewards, prompts: Prompts, sampling: Sampling
) -> Rewarded:
    """Sample completions of a step with the columns that the estimator reads, and reward them.

    Greedy completions are only rewarded, never learnt from. What has a number below 0 is a group of the log, whose
    rows stand last; what rewards log of them counts where the policy samples none.
    """
    sampled = [prompt for prompt in prompts if prompt[0] >= 0]
    groups = prompts[len(sampled) :]
    tables = [logged_rows(learner, rewards, groups)] if groups else []
    if not sampled:
        return tables[0]
    policy = learner.policy
    greedy = not sampling.num_generations
    if not greedy:
        sampling = replace(sampling, **learner.kept)
    rollout = sample_rows(
        policy, learner.generator, sampled, sampling, "training", rewards.environments
    )
    if not greedy:
        rollout = learner.with_missing_fields(rollout)
        learner.generator.check(rollout, sampling)
    return cat([reward_rows(policy, rewards, rollout, [row for _, row in sampled]), *tables])


def rows_of_step(
    learner: Learner, rewards: Rewards, sampling: Sampling, stream: PromptStream
) -> Rewarded:
    """Sample and reward the rows of a step, with those that replace equal groups and those that are replayed.

    They have the reward of the greedy completion, if the baseline reads it (ReMax, arXiv 2310.10505); NaN where
    every function abstained from it. And they have the factors of their prompts, if the gradient is divided by the
    chances.
    """
    args = learner.args
    prompts = stream.draw_prompts(args.prompts_per_step - args.logged_prompts)
    if learner.log is not None:
        # Numbers below 0 mark groups of the log.
        prompts += [(-1 - i, group) for i, group in learner.log.draw_prompts(args.logged_prompts)]
    rows = collect_rows(learner, rewards, local(learner.accelerator, prompts), sampling)
    if learner.estimator.zero_spread == "refill":
        rows = refill(learner, rewards, sampling, rows, stream)
    rows = replace(rows, logged=(*rows.logged, (learner.generator.settle(), 1)))
    if learner.replay is not None and learner.args.replay:
        rows = learner.replay.join(learner, rows, sampling.step)
    if "greedy_rewards" in learner.estimator.needs:
        size = learner.group_size
        prompts = list(zip(rows.prompt_index.tolist(), rows.data, strict=True))[::size]
        greedy = collect_rows(learner, rewards, prompts, replace(sampling, num_generations=0))
        of_prompts = greedy.rewards.masked_fill(~greedy.valid, math.nan)
        rows = replace(rows, greedy_rewards=of_prompts.repeat_interleave(size))
    if learner.estimator.prompts == "inverse":
        rows = replace(rows, factors=stream.factors(rows.prompt_index))
    return rows


def refill(
    learner: Learner,
    rewards: Rewards,
    sampling: Sampling,
    rows: Rewarded,
    stream: PromptStream,
) -> Rewarded:
    """Replace groups whose rewards are all equal by groups of new prompts, in up to `max_refills` rounds.

    This is the dynamic sampling of DAPO (arXiv 2503.14476): with a group baseline, such groups have no
    gradient. The metric `refilled` is the number of groups replaced, over all processes.

    Args:
        learner: the policy and the settings.
        rewards: the reward functions.
        sampling: how completions are sampled.
        rows: this process's groups.
        stream: draws further prompts, the same on every process.
    """
    accelerator = learner.accelerator
    size = sampling.group_size
    refilled = 0
    logged = rows.logged
    for _ in range(learner.args.max_refills):
        dead = zero_spread(rows.rewards, size, rows.valid)
        counts = gather_objects([int(dead.sum())])
        if not sum(counts):
            break
        refilled += sum(counts)
        # Every process draws the same prompts and takes those that replace its own groups.
        first = sum(counts[: accelerator.process_index])
        prompts = stream.draw_prompts(sum(counts))[first:][: counts[accelerator.process_index]]
        if not prompts:
            agreed(list)()  # the others may end the run
        else:
            new = collect_rows(learner, rewards, prompts, sampling)
            order = torch.arange(len(rows))
            order[dead.repeat_interleave(size)] = len(rows) + torch.arange(len(new))
            rows = cat([rows, new]).take(order)
            logged += new.logged
    count = ({"refilled": float(refilled)}, 1)  # the same number on every process
    return replace(rows, logged=(*logged, count))


@agreed
def loss_terms(
    learner: Learner,
    rows: Experience,
    sampling: Sampling,
    memory: Memory,
    rewards: Rewards,
    data: Mapping[str, Sequence[Any]],
) -> LossTerms:
    """Return the advantages and what counts of all N rows, in loss and divisor.

    Nothing is in the gradient where the policy may not move yet. `data` holds what `own_columns` returns.

    Raises:
        Refused: A row that does not abstain has a reward that the objective does not take.
    """
    estimator = learner.estimator
    check_rewards(estimator.objective, rows.rewards, rows.valid)
    dtype = rows.logprobs.dtype
    names = (
        "mask",
        "truncated",
        "turns",
        "logprobs",
        "ref_logprobs",
        "values",
        "score_norms",
        "greedy_rewards",
        "sampling_logprobs",
        "entropy",
        "present_logprobs",
    )
    inputs = {name: getattr(rows, name) for name in names} | {"valid": rows.compared}
    if rows.dense_rewards is not None:
        inputs["turn_rewards"] = unrounded(rows.dense_rewards, dtype)
    terms = estimator.loss_terms(
        unrounded(rows.rewards, dtype),
        group_size=sampling.group_size,
        max_length=sampling.max_completion_length,
        baseline_value=None if rows.keys is None else read(memory, rows.keys),  # [N]
        components=unrounded(rows.by_function, dtype),
        component_weights=torch.from_numpy(rewards.weights),  # [F]
        data=data,
        **inputs,
    )
    if not policy_steps(learner.args, sampling.step):  # the critic learns alone
        terms = terms._replace(in_gradient=terms.in_gradient & False)
    return terms.to(dtype)


def own_columns(learner: Learner, rows: Rewarded) -> dict[str, list[Any]]:
    """Return the columns of the data of all processes, if a baseline of the user's may read them."""
    if not callable(learner.estimator.baseline):
        return {}
    table = gather_objects([*rows.data])
    return {name: [row[name] for row in table] for name in table[0]}


def later_rows(learner: Learner, rows: Experience, whole: Experience) -> Experience:
    """Return all N rows of a step, scored anew, for an update after which the policy has moved.

    Args:
        learner: the policy.
        rows: this process's n rows.
        whole: all N rows, as they were before the first update.
    """
    forward = learner.forward
    scores = learner.scores(rows, forward.model, forward.regime, learner.sampling)
    moved = gathered(learner.accelerator, {"logprobs": scores.logprobs})
    # both by the same scoring pass, so that they are equal where nothing has moved
    assert whole.old_logprobs is not None
    return replace(whole, logprobs=whole.old_logprobs, present_logprobs=moved["logprobs"])


def update_weights(learner: Learner, terms: LossTerms, chosen: Tensor) -> Tensor:
    """Return the weights [N, T] of the tokens in an update of the chosen rows [N], 0 elsewhere.

    Args:
        learner: the settings.
        terms: which rows and tokens are learnt from.
        chosen: True for the rows of the update [N].
    """
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
        weights: each token's weight in the loss of the whole update, without the factors of the rows, of any
            width [n, ...].
    """
    width = rows.mask.shape[1]
    names = ("mask", "old_logprobs", "sampling_logprobs", "ref_logprobs")
    columns = {name: getattr(rows, name) for name in names}
    columns["advantages"] = advantages if advantages.ndim == 1 else pad_right(advantages, width)
    if rows.factors is not None:
        weights = weights * rows.factors.to(weights)[:, None]
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
