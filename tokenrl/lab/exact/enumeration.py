"""Computes the exact mean and variance of an estimator's gradient, by summing over every possible step.

The loss of a step depends on the parameters only through logprobs and entropies. So the gradient of a step is
the derivative of `Estimator.loss` in those, times the listed derivatives of logprobs and entropies in the
parameters: one matrix product. Ratios, clips and KL terms in the loss need no code of their own here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenrl.core.effects import BIASED, EXACT, PER_PROMPT, UP_TO_SCALE
from tokenrl.core.estimator import Estimator
from tokenrl.core.objectives import check_rewards
from tokenrl.core.rows import LossTerms, zero_spread
from tokenrl.errors import Refused
from tokenrl.lab.exact.problems import Problem

MIN_LOGPROB = -1e3
"""Below this log-probability a token counts as never sampled."""
STEPS_AT_ONCE = 20_000
"""Number of steps computed at once; about 100 MB on the larger problems."""
TOLERANCE = 1e-9
"""Relative tolerance; rounding leaves about 1e-15, and the smallest bias on these problems is about 1e-3."""
FLOAT32_TOLERANCE = 1e-5
"""The relative tolerance for a baseline of the user's own, which may compute in float32."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of the ascent gradient g of one step, and the gradient of the objective J.

    P is the number of prompts and D the number of parameters; both gradients are sums over prompts.

    Attributes:
        mean: E[g], the contribution of each prompt's rows [P, D].
        target: grad J, the contribution of each prompt [P, D].
        second: E|g|^2, where g is the sum over prompts.
        problem: Name of the problem.
        tolerance: Relative size below which a difference is taken for rounding.
    """

    mean: Tensor  # [P, D]
    target: Tensor  # [P, D]
    second: float
    problem: str = ""
    tolerance: float = TOLERANCE

    @property
    def status(self) -> str:
        """The best status that the numbers allow: one of the exact ones, or 'biased'."""
        error = float((self.mean - self.target).norm())
        if error < self.tolerance * float(self.target.norm()):
            return EXACT
        if sine_between(self.mean.flatten(), self.target.flatten()) < self.tolerance:
            return UP_TO_SCALE
        sines = map(sine_between, self.mean, self.target)
        return PER_PROMPT if max(sines) < self.tolerance else BIASED

    @property
    def bias(self) -> Tensor:
        """E[g] - grad J [D]."""
        return (self.mean - self.target).sum(0)

    @property
    def relative_bias(self) -> float:
        """|E[g] - grad J| / |grad J|; a wrong scale counts as bias too."""
        return float(self.bias.norm() / self.target.sum(0).norm())

    @property
    def cosine(self) -> float:
        """Cosine of the angle between E[g] and grad J; 0 if E[g] is 0."""
        mean = self.mean.sum(0)
        target = self.target.sum(0)
        lengths = mean.norm() * target.norm()
        return float(mean @ target / lengths.clamp(min=1e-300))

    @property
    def scale(self) -> float:
        """The factor c for which `c grad J` is nearest to E[g]."""
        target = self.target.sum(0)
        return float(self.mean.sum(0) @ target / (target @ target))

    @property
    def variance(self) -> float:
        """Trace of the covariance of g."""
        return self.second - float(self.mean.sum(0).square().sum())

    @property
    def mse(self) -> float:
        """E|g - grad J|^2 = |bias|^2 + variance."""
        return float(self.bias.square().sum()) + self.variance

    @property
    def noise(self) -> float:
        """Variance / |E[g]|^2, which no constant factor of the loss changes; infinite if E[g] is 0."""
        signal = float(self.mean.sum(0).square().sum())
        rounding = 1e-24 * self.second  # what sums that should be 0 leave behind
        return self.variance / signal if signal > rounding else float("inf")


def sine_between(mean: Tensor, target: Tensor) -> float:
    """Return the sine of the angle between two gradients [D]; 2 if it is 90 degrees or more, or `mean` is 0."""
    product = float(mean @ target)
    if product <= 0:
        return 2.0
    along = product / (target @ target) * target
    return float((mean - along).norm() / mean.norm())


def exact_moments(
    estimator: Estimator,
    problem: Problem,
    *,
    group_size: int | None = None,
    chunk: int = STEPS_AT_ONCE,
) -> Moments:
    """Return the moments of the gradient over all M^(P G) possible steps, each with one group per prompt.

    If the estimator refills groups from new prompts, or draws prompts with unequal chances, a step has P groups of
    prompts drawn at random instead.

    Args:
        estimator: Its `advantages`, `token_weights` and `loss` are called as in the first update of training.
        problem: All completions, their probabilities and their scores. If it has a sampler, this draws the
            completions, and the gradient of J is still the policy's.
        group_size: G; by default the problem's.
        chunk: Number of steps computed at once; changes memory only.

    Raises:
        Refused: When the estimator cannot be used with such groups.
    """
    size = group_size or problem.group_size
    problem = replace(problem, group_size=size)
    check_rewards(estimator.objective, problem.returns, problem.chances.bool())
    chances = problem.of_sampler.chances
    prompts, completions = chances.shape
    listed = _listed_slopes(estimator, problem)
    slopes = listed.flatten(0, 3)  # [2 P M T, D], or 3 P M T with a sampler
    slopes_of_prompt = listed[0, 0, ..., 0].numel()
    shares = torch.zeros(len(slopes), dtype=torch.double)
    second, total = torch.zeros(2, dtype=torch.double)
    refill = estimator.zero_spread == "refill"
    drawings = [tuple(range(prompts))]
    prompt_chances = prompt_chances_of(estimator, problem)
    if refill or estimator.prompts != "uniform":
        drawings = [
            tuple(sorted(drawn)) for drawn in itertools.product(range(prompts), repeat=prompts)
        ]
    for drawn, orders in Counter(drawings).items():  # the order of groups changes nothing
        of_row = torch.tensor(drawn).repeat_interleave(size)  # [N]
        for chosen in _steps(completions, len(of_row), chunk):  # [C, N]
            chance = orders * chances[of_row, chosen].prod(-1)
            chance = chance * prompt_chances[list(drawn)].prod()
            if refill:  # steps with a group of equal rewards never happen: the group is replaced
                dead = torch.vmap(partial(_has_equal_rewards, group_size=size))
                chance = chance * ~dead(problem.rewards[of_row, chosen])
            coefficients = _coefficients(estimator, problem, of_row, chosen)  # [C, 2 P M T]
            if estimator.prompts == "inverse":
                by_prompt = coefficients.view(len(chosen), -1, prompts, slopes_of_prompt)
                factors = 1 / (prompts * prompt_chances[:, None])
                coefficients = (by_prompt * factors).flatten(1)
            total = total + chance.sum()
            shares += chance @ coefficients
            second = second + chance @ (coefficients @ slopes).square().sum(-1)
    return Moments(
        mean=_by_prompt(listed, shares / total),
        target=target_of(estimator, problem),
        second=float(second / total),
        problem=problem.name,
        tolerance=FLOAT32_TOLERANCE if callable(estimator.baseline) else TOLERANCE,
    )


def prompt_chances_of(estimator: Estimator, problem: Problem) -> Tensor:
    """Return the chance of each prompt to be drawn [P]: equal chances, or as 1, 2, 3 and so on."""
    prompts = len(problem.chances)
    ones = torch.ones(prompts, dtype=torch.double)
    weights = ones if estimator.prompts == "uniform" else ones.cumsum(0)
    return weights / weights.sum()


def _has_equal_rewards(rewards: Tensor, group_size: int) -> Tensor:
    """Return whether any group of a step has equal rewards."""
    valid = torch.ones(len(rewards), dtype=torch.bool)
    return zero_spread(rewards, group_size, valid).any()


def proportional_step(estimator: Estimator, problem: Problem, copies: int = 1) -> Moments:
    """Return the gradient of one step that contains every group in exact proportion, `copies` times.

    As `copies` grows, the gradient tends to the limit of E[g] for many groups of the same size. The
    probabilities of the problem must be multiples of the smallest. `second` is |g|^2 of this one step, so
    `variance` says nothing here.

    Raises:
        Refused: When the estimator cannot be used with such groups.
    """
    counts = (problem.chances / problem.chances.min()).round().long()  # [P, M]
    prompts = []
    rows = []
    for prompt, count in enumerate(counts):
        completions = torch.arange(len(count)).repeat_interleave(count)
        groups = torch.cartesian_prod(*itertools.repeat(completions, problem.group_size))
        rows.append(groups.repeat(copies, 1).flatten())
        prompts.append(torch.full_like(rows[-1], prompt))
    chosen = torch.cat(rows)[None]  # [1, N]
    coefficients = _coefficients(estimator, problem, torch.cat(prompts), chosen)[0]
    mean = _by_prompt(_listed_slopes(estimator, problem), coefficients)
    if estimator.prompts == "weighted":
        mean = mean * prompt_chances_of(estimator, problem)[:, None]
    second = float(mean.sum(0).square().sum())
    return Moments(mean, target_of(estimator, problem), second, problem.name)


def target_of(estimator: Estimator, problem: Problem) -> Tensor:
    """Return `Problem.gradient` [P, D] of the estimator's objective, with the terms that it adds to that."""
    return problem.gradient(
        estimator=estimator,
        beta=estimator.beta,
        entropy_coef=estimator.entropy_coef,
        overlong_buffer=estimator.overlong_buffer,
    )


def _listed_slopes(estimator: Estimator, problem: Problem) -> Tensor:
    """Return the gradients [K, P, M, T, D] of what `_differentiated` names."""
    slopes = {
        "logprobs": problem.scores,
        "entropy": problem.entropy_slopes,
        "token_kl": problem.kl_slopes,
    }
    if problem.sampler is not None:
        leaf = problem.sampler.policy.clone().requires_grad_()
        centres = estimator.score_centres(leaf, problem.sampler.vocabulary).sum()
        (of_token,) = torch.autograd.grad(centres, leaf)
        slopes["centres"] = torch.einsum("pmtv,pmtvd->pmtd", of_token, problem.sampler.slopes)
    return torch.stack([slopes[name] for name in _differentiated(estimator, problem)])


def _differentiated(estimator: Estimator, problem: Problem) -> list[str]:
    """Return the names of those fields of `Slopes` through which the loss depends on the parameters."""
    names = ["logprobs", "entropy"]
    if "token_kl" in estimator.needs:
        names.append("token_kl")
    if problem.sampler is not None:
        names.append("centres")
    return names


def _by_prompt(slopes: Tensor, shares: Tensor) -> Tensor:
    """Multiply the slopes of `_listed_slopes` by coefficients [K P M T], for each prompt [P, D]."""
    coefficients = shares.reshape(slopes.shape[:-1])
    return torch.einsum("kpmt,kpmtd->pd", coefficients, slopes)


def _steps(completions: int, rows: int, chunk: int) -> Iterator[Tensor]:
    """Yield all ordered choices of one completion per row, in chunks [C, N]: the digits of numbers in base M."""
    powers = completions ** torch.arange(rows - 1, -1, -1)
    for numbers in torch.arange(completions**rows).split(chunk):  # type: ignore[no-untyped-call]
        yield numbers[:, None] // powers % completions


def _coefficients(estimator: Estimator, problem: Problem, of_row: Tensor, chosen: Tensor) -> Tensor:
    """Return minus the derivative of each step's loss in what `_differentiated` names [C, K P M T]."""
    completion = of_row * problem.mask.shape[0] + chosen  # [C, N]
    columns = {name: _taken(x, completion) for name, x in _columns(problem).items()}
    entropy = columns["entropy"]
    token_kl = columns.pop("token_kl")
    sampling_logprobs = columns["sampling_logprobs"]
    # A memory is held fixed: at one number, or where it has one for each prompt, at different numbers.
    shift = 0.0 if estimator.baseline == "running_mean" else 0.5
    step_terms = partial(
        estimator.loss_terms,
        group_size=problem.group_size,
        max_length=problem.max_length,
        baseline_value=problem.baseline_value + shift * of_row.double(),
    )
    try:
        terms = torch.vmap(lambda step: step_terms(**step))(columns)
    except RuntimeError as error:
        if not callable(estimator.baseline):
            raise
        name = getattr(estimator.baseline, "__name__", "given")
        raise Refused(
            f"The baseline {name!r} cannot be computed for many steps at once: {str(error).splitlines()[0]} "
            "Write it with tensor operations only, without .item(), numpy or a branch on a value."
        ) from error
    # The loss is a plain sum over rows, so one call on the rows of all steps gives the derivatives of each.
    rows = LossTerms(*(x.flatten(0, 1) for x in terms))
    inputs = (columns["logprobs"], columns["ref_logprobs"], entropy, sampling_logprobs, token_kl)
    slopes = ascent_slopes(estimator, rows, *(x.flatten(0, 1) for x in inputs))
    listed = [getattr(slopes, name) for name in _differentiated(estimator, problem)]
    index = completion[:, :, None].expand(terms.in_gradient.shape)  # [C, N, T]
    zeros = torch.zeros(len(chosen), problem.chances.numel(), index.shape[-1], dtype=torch.double)
    sums = [zeros.scatter_add(1, index, x.reshape(index.shape)).flatten(1) for x in listed]
    return torch.cat(sums, dim=1)


def _taken(x: Tensor, completion: Tensor) -> Tensor:
    """Return the rows [C, N, ...] of x [P, M, ...] by their numbers [C, N] in P times M."""
    rows = x.flatten(0, 1).index_select(0, completion.flatten())
    return rows.reshape(*completion.shape, *x.shape[2:])


class Slopes(NamedTuple):
    """Derivatives of the ascent objective (minus the loss) in what has a gradient, for each token [N, T]."""

    logprobs: Tensor  # [N, T]
    entropy: Tensor  # [N, T]
    token_kl: Tensor  # [N, T]
    centres: Tensor  # [N, T]


def ascent_slopes(
    estimator: Estimator,
    terms: LossTerms,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    entropy: Tensor,
    sampling_logprobs: Tensor | None = None,
    token_kl: Tensor | None = None,
) -> Slopes:
    """Return the derivatives of the loss of a first update, in which the policy is also the old one.

    Without `sampling_logprobs` it is also the one that sampled, and the centres have no gradient. Without
    `token_kl` the estimator has no KL in closed form.
    """
    nothing = torch.zeros_like(logprobs)
    leaves = Slopes(logprobs, entropy, nothing if token_kl is None else token_kl, nothing)
    leaves = Slopes(*(x.detach().requires_grad_() for x in leaves))
    loss = estimator.loss(
        leaves.logprobs,
        terms.advantages,
        terms.weights,
        terms.in_gradient,
        old_logprobs=logprobs,
        sampling_logprobs=logprobs if sampling_logprobs is None else sampling_logprobs,
        ref_logprobs=ref_logprobs,
        entropy=leaves.entropy,
        centres=leaves.centres,
        token_kl=leaves.token_kl,
    )
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return Slopes(*(-gradient for gradient in gradients))


def _columns(problem: Problem) -> dict[str, Tensor]:
    """Return all inputs of an estimator by name, for each prompt and completion [P, M, ...]."""
    prompts = len(problem.greedy)
    greedy = problem.totals[torch.arange(prompts), problem.greedy]
    sampled = problem.of_sampler.logprobs
    columns = {
        "sampling_logprobs": torch.where(sampled < MIN_LOGPROB, problem.logprobs, sampled),
        "mask": problem.mask.expand(prompts, -1, -1),
        "truncated": problem.truncated.expand(prompts, -1),
        "rewards": problem.rewards,
        "greedy_rewards": greedy[:, None].expand_as(problem.totals),
        "logprobs": problem.logprobs,
        "ref_logprobs": problem.ref_logprobs,
        "entropy": problem.entropy,
        "token_kl": problem.token_kl,
        "values": problem.values,
        "score_norms": problem.scores.square().sum(-1),
    }
    if problem.bootstrap is not None:
        columns["bootstrap"] = problem.bootstrap
    if problem.turns is not None:
        columns["turns"] = problem.turns.expand(prompts, -1, -1)
    if problem.rewards.ndim == 2:  # as if each of two functions rewarded every other completion
        even = torch.arange(problem.rewards.shape[1]) % 2 == 0
        columns["components"] = problem.rewards[..., None] * torch.stack([even, ~even], -1)
    return columns
