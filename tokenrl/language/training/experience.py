"""Holds what the policy learns from in a step, and computes the metrics of the step from it.

One process adds to its rewarded rows what the estimator compares them with. The rows of all processes are gathered
then, because advantages, weights and metrics are of the whole step.

The metrics of sampling say how far the sampler's log-probabilities are from the trainer's, at the first update
of a step. A generator with weights or arithmetic of its own (another engine, another precision) samples from
a policy that is not quite the one that is trained, and so does one that leaves tokens out unnoticed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.rows import from_first
from tokenrl.core.statistics import generator_of, mean_and_error
from tokenrl.errors import Stopped
from tokenrl.files import canonical
from tokenrl.language.evaluation.estimates import metric_values
from tokenrl.language.rollout.rewarded import Rewarded, Row, completion_kl, failures_of, prompt_text
from tokenrl.language.rollout.rollout import ABSENT, OF_PROMPTS, lengths, to_host
from tokenrl.runs.processes import agreed, all_reduce_sum, gather_objects, gather_rows

if TYPE_CHECKING:
    from tokenrl.language.rollout.sampling import Sampling
    from tokenrl.language.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Experience(Rewarded):
    """What the policy learns from: the numbers of rewarded rows, and what the estimator compares them with.

    The rows of the whole step, which every process holds, have no columns with three dimensions and no
    `teacher_prompts`; these stay with the process that sampled the rows.

    Attributes:
        ref_states: what the head of the reference is given before each action [N, T, H], for a KL in closed form.
            Its logits [N, T, V], if no head can be taken apart. None where they are computed again in each pass.
        values: the critic's value of the state before each action [N, T]; None without a critic.
        keys: a number for each row that its prompt and the other columns of its data determine [N]; None
            without a memory of prompts.
        old_logprobs: log-probabilities under the policy that sampled, as the scoring pass computes them [N, T].
            None without a ratio, and where a step has a single update, in which the ratio is 1 by definition.
        present_logprobs: log-probabilities under the policy as it is in a later update [N, T], for the scale 'target'.
        teacher_prompts: ids of the prompt that the teacher reads in place of each row's, N lists of any lengths;
            None where it reads the same.
    """

    ref_states: Tensor | None = None
    values: Tensor | None = None
    keys: Tensor = ABSENT
    old_logprobs: Tensor | None = None
    present_logprobs: Tensor | None = None
    teacher_prompts: Sequence[list[int]] | None = None

    @property
    def rewarded(self) -> Tensor:
        """True on completions of this step that have a reward [N]."""
        return self.valid & ~self.replayed

    @property
    def compared(self) -> Tensor:
        """True where a row has a reward and, if it is needed, that of its greedy completion to be compared with [N]."""
        greedy = self.greedy_rewards
        return self.valid if greedy is None else self.valid & ~greedy.isnan()


@agreed
def experience(learner: Learner, rows: Rewarded, sampling: Sampling) -> Experience:
    """Return what is learnt from rewarded rows: their tensors, and what the estimator compares them with.

    Args:
        learner: holds the reference, the teacher and the critic.
        rows: this process's n rows.
        sampling: how they were sampled.
    """
    estimator = learner.estimator
    columns: dict[str, Any] = rows.tensors()
    prompts = None
    if learner.teacher_prompts is not None:
        prompts = learner.teacher_prompts.of(learner.policy, rows, sampling)
    if estimator.needs_reference:
        keeps = "token_kl" in estimator.needs and learner.forward.keeps_ref_states(rows.mask)
        scores = learner.ref_scores(rows, prompts, states=keeps)
        columns["ref_logprobs"] = scores.logprobs.to(rows.logprobs)
        columns["ref_states"] = scores.states
    if learner.critic is not None:
        columns["values"] = learner.critic.values(rows.hidden).detach().to(rows.logprobs)
    if estimator.needs_memory or learner.replay is not None:
        columns["keys"] = data_keys(rows.data)
    # The generator's numbers may differ by rounding, and the ratio of the first update must be exactly 1.
    if "old_logprobs" in estimator.needs and learner.args.updates > 1:
        forward = learner.forward
        scores = learner.scores(rows, forward.model, forward.regime, learner.sampling)
        columns["old_logprobs"] = scores.logprobs
    return Experience(**columns, teacher_prompts=prompts)


def data_keys(data: Sequence[Row]) -> Tensor:
    """Return a number of 63 bits for each row of the data, from a hash of all its columns [n]."""
    digests = [hashlib.sha256(canonical(row).encode()).digest() for row in data]
    return torch.tensor([int.from_bytes(digest[:8], "big") >> 1 for digest in digests])


def gather(learner: Learner, rows: Experience, failures: Sequence[str], step: int) -> Experience:
    """Gather the rows of all processes, in the order of the prompts, with the log-probabilities in one precision.

    An engine may have another one, and so may a process that sampled no token at all.

    In the control `random` the rewards of the new rows that have one change places. All orders are equally likely, so
    a row may keep its own. If it never did, a baseline that is made of other rows would lean against the true reward:
    given the rewards of a step, the mean of what a row gets would fall with its own.

    Args:
        learner: the settings, and accelerate's handle of device and processes.
        rows: this process's n rows.
        failures: what failed in their episodes; empty without an environment.
        step: number of the step.

    Raises:
        Stopped: no row that the step sampled has a reward; in a step of logged rows alone, none of these.
    """
    rows = replace(rows, sampling_logprobs=rows.sampling_logprobs.to(rows.logprobs))
    accelerator = learner.accelerator
    if accelerator.num_processes > 1:
        own = {name: x for name, x in rows.tensors().items() if x.ndim < 3}
        rows = Experience(**gathered(accelerator, own))
    # Where rows were sampled, one of them needs a reward: those of a log may have brought theirs along.
    asked = rows.sampled if rows.sampled.any() else ~rows.replayed
    if not (asked & rows.compared).any():
        failed = failures_of(failures)
        raise Stopped(
            f"Reward functions abstained from every completion of this step. {failed}".strip()
        )
    if learner.args.control_arm == "random":
        places = rows.rewarded.nonzero().flatten()
        generator = generator_of(learner.args.seed, "control", step)
        order = torch.arange(len(rows))
        order[places] = places[torch.randperm(len(places), generator=generator)]
        rows = replace(rows, rewards=rows.rewards[order], by_function=rows.by_function[order])
    return rows


def gathered(accelerator: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """Return columns of the rows of all processes, in the order of the prompts; a single process has them already."""
    if accelerator.num_processes == 1:
        return columns
    together = gather_rows(accelerator, columns, OF_PROMPTS)
    host = zip(together, to_host(together.values()), strict=True)
    return {name: x.to(columns[name].dtype) for name, x in host}


def step_metrics(rows: Experience, names: Sequence[str], group_size: int) -> dict[str, float]:
    """Compute the metrics of the step's rows, under TRL's names.

    `frac_reward_zero_std` is the share of groups in which all rewards are equal, those of replayed rows included;
    with a group baseline they have no gradient. `reward_stderr` is the standard error of `reward` over prompts;
    it is missing with a single prompt. `entropy` is the mean over sampled tokens, in nats. `kl` and `kl_k3` are
    the means over completions of both estimates of `completion_kl`, with standard errors over prompts. The run
    adds `num_samples`, the number of completions generated so far, greedy and replaced ones included, and adds
    up `num_tokens`, the tokens of prompts and of the completions learnt from.

    Args:
        rows: all N rows of the step; replayed ones count in no other metric.
        names: names of the F reward functions; without any, the metrics of rewards are left out.
        group_size: new completions per prompt.
    """
    prompts = int((~rows.replayed).sum()) // group_size
    # With one completion per prompt there are no groups to compare, so the whole step is taken as one group.
    shape = prompts if len(rows) > prompts else 1, -1
    differences, _ = from_first(rows.rewards.view(shape), rows.compared.view(shape))
    if rows.replayed.any():
        rows = rows.take((~rows.replayed).nonzero().flatten())
    mask = rows.mask
    counts = mask.sum(dim=1).double()
    values = metric_values(rows, names)
    metrics = {name: x.mean() for name, x in values.items()}
    errors = dict[str, Tensor]()
    if names:
        rewarded = rows.rewards[rows.valid]
        means = rows.rewards.masked_fill(~rows.valid, math.nan).view(-1, group_size).nanmean(dim=1)
        errors["reward"] = mean_and_error(means[~means.isnan()])[1]
        metrics |= {"reward": rewarded.mean(), "reward_std": _spread(rewarded)}
        metrics["frac_reward_zero_std"] = (differences == 0).all(dim=1).double().mean()
    for name in names:
        if f"rewards/{name}/mean" in values:
            metrics[f"rewards/{name}/std"] = _spread(values[f"rewards/{name}/mean"])
    if rows.ref_logprobs is not None:
        for name, estimates in completion_kl(rows.logprobs, rows.ref_logprobs, mask).items():
            metrics[name], errors[name] = mean_and_error(estimates, group_size)
    # Equal prompts with equal completions are one of both; the mask tells completions of padding apart.
    texts = torch.cat([rows.prompt_ids, rows.completion_ids.masked_fill(~mask, -1)], dim=1)
    metrics |= {
        "completions/unique": torch.tensor(len(texts.unique(dim=0)) / len(texts)),
        "entropy": (rows.entropy * mask).double().sum() / mask.sum().clamp(min=1),
        "completions/min_length": counts.min(),
        "completions/max_length": counts.max(),
        "num_tokens": lengths(mask).sum() + rows.prompt_mask.sum(),
    }
    metrics |= {f"{name}_stderr": error for name, error in errors.items() if not error.isnan()}
    if not rows.valid.all():
        metrics["frac_rows_abstained"] = 1 - rows.valid.double().mean()
    return {name: float(value) for name, value in metrics.items()}


def _spread(values: Tensor) -> Tensor:
    """Return the standard deviation of values, which is 0 of a single one."""
    return values.std(correction=min(1, len(values) - 1))


def mismatch_metrics(rows: Experience, parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return how far the sampler is from the policy, over the rows of all processes, each of which has to call this.

    A completion has the weight w, the exponential of the sum over its tokens of `log pi - log mu`, where pi is
    the trainer's probability and mu the sampler's. With w the gradient would be
    that of the policy on the sampler's rows. Its mean is 1 in expectation, if the sampler can draw whatever
    the policy can, and else the policy's probability of what the sampler keeps.

    Args:
        rows: the rows of this process; replayed ones, and logged ones of an unknown sampler, count nowhere.
        parts: the numbers of the rows of each micro-batch [n], with their log-probabilities under the policy that
            is trained [n, T], on its device.

    Returns:
        `sampling/logp_difference/mean` and `sampling/logp_difference/max` over tokens, in nats and without
        sign; `sampling/effective_sample_size`, `(sum w)^2 / (N sum w^2)`, the share of the N rows that as
        many rows of the policy's own would be worth; and `sampling/kept_mass`, the mean of w, at most 1. They are
        those of the new rows that the first update learns from; none if there are no such rows.
    """
    host = to_host(logprobs for _, logprobs in parts)
    local: list[list[float]] = []
    is_counted = ~(rows.replayed | rows.sampling_logprobs.isnan().any(dim=1))
    for (index, _), logprobs in zip(parts, host, strict=True):
        is_new = is_counted[index]
        index, logprobs = index[is_new], logprobs[is_new]
        width = logprobs.shape[1]
        mask = rows.mask[index, :width]
        gaps = logprobs - rows.sampling_logprobs[index, :width]  # log pi / mu
        gaps = torch.where(mask, gaps, 0).double()
        sizes = gaps.abs()
        numbers = (gaps.sum(1), sizes.sum(1), sizes.amax(1), mask.sum(1))
        local += torch.stack(numbers, dim=1).tolist()
    everywhere = gather_objects(local)
    if not everywhere:
        return {}
    ratios, sums, largest, tokens = torch.tensor(everywhere, dtype=torch.float64).T
    log_total = ratios.logsumexp(0)
    effective = float((2 * log_total - (2 * ratios).logsumexp(0)).exp())
    return {
        "sampling/logp_difference/mean": float(sums.sum() / tokens.sum().clamp(min=1)),
        "sampling/logp_difference/max": float(largest.max()),
        "sampling/effective_sample_size": effective / len(everywhere),
        "sampling/kept_mass": min(1.0, float((log_total - math.log(len(everywhere))).exp())),
    }


def loss_statistics(learner: Learner, loss: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the loss of a micro-batch and counts of its tokens [5].

    These are the columns that its completions were computed to, those that belong to a token, its tokens beyond
    the bounds, and all that it learns from. The inputs are those of `Estimator.loss`.
    """
    mask = inputs["mask"]
    columns = torch.stack([torch.ones_like(mask).sum(), lengths(mask).sum()])
    counts = torch.zeros(2, dtype=torch.int64, device=loss.device)
    if learner.estimator.chosen("ratio").token_bounds:
        learnt = inputs["weights"] != 0
        terms = (inputs[name] for name in ("logprobs", "old_logprobs", "advantages"))
        beyond = learner.estimator.beyond_bounds(*terms) & learnt
        counts = torch.stack([beyond.sum(), learnt.sum()])
    return torch.cat([loss.detach()[None], columns, counts])


def update_metrics(learner: Learner, parts: Sequence[Tensor], norm: float) -> dict[str, float]:
    """Return the metrics of an update.

    Args:
        learner: the settings.
        parts: what `loss_statistics` returned for the micro-batches of this process.
        norm: norm of the gradient before clipping.

    Returns:
        `loss`; `grad_norm`; `grad_clipped`, 1 if the gradient was clipped, else 0; `padding`, the share of the
        completions' columns that were computed and belong to no token; and `clip_ratio`, the share of tokens whose
        ratio is outside the clip range, or that 'trust' drops, for ratios with a bound per token.
    """
    sums = sum(parts, torch.zeros(5, dtype=torch.float64)).float()
    sums = all_reduce_sum(learner.accelerator, sums).cpu()
    loss, columns, tokens, beyond, learnt = sums
    metrics = {
        "loss": float(loss),
        "grad_norm": norm,
        "grad_clipped": float(norm > learner.largest_norm),
        "padding": float((columns - tokens) / columns.clamp(min=1)),
    }
    if learner.estimator.chosen("ratio").token_bounds:
        metrics["clip_ratio"] = float(beyond / learnt.clamp(min=1))
    return metrics


def examples(rows: list[dict[str, Any]], group: int) -> list[dict[str, Any]]:
    """Choose the best and the worst new completion of each of the first two groups, as an example for people."""
    chosen = []
    rows = [row for row in rows if not row.get("replayed")]
    for start in (0, group):
        members = rows[start : start + group]
        ranked = [row for row in members if row["reward"] is not None] or members[:1]
        ranked.sort(key=lambda row: row["reward"])
        chosen += [*ranked[-1:], *ranked[:-1][:1]]
    return [row | {"prompt": prompt_text(row["prompt"])} for row in chosen]
