"""Every completion of a tiny autoregressive policy, so that expectations are sums and not samples.

Three tokens, at most three steps, token 0 ends: 15 completions, 7 prefixes, 21 logits a prompt. What is
summed is the gradient of `Estimator.loss` itself, over every group that can be drawn.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrl.core import Estimator, rows as rows_of_step

torch.set_num_threads(1)
PREFIXES = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
COMPLETIONS = sorted(
    y
    for n in (1, 2, 3)
    for y in itertools.product(range(3), repeat=n)
    if 0 not in y[:-1] and (y[-1] == 0 or n == 3)
)
LENGTHS = torch.tensor([len(y) for y in COMPLETIONS])
PADDED = [y + (0,) * (3 - len(y)) for y in COMPLETIONS]
IDS = torch.tensor(PADDED)  # [15, 3]
MASK = (torch.arange(3) < LENGTHS[:, None]).double()  # [15, 3]
STATES = torch.tensor(
    [[PREFIXES.index(y[:t]) if y[:t] in PREFIXES else 0 for t in range(3)] for y in PADDED]
)  # [15, 3]
MAX_LENGTH = 5  # not the width 3, so that a divisor wrongly taken from the width is noticed


def logprobs_of(logits: Tensor) -> Tensor:
    """[7, 3] -> [15, 3], 0 where masked."""
    return logits.log_softmax(-1)[STATES, IDS] * MASK


def entropies_of(logits: Tensor) -> Tensor:
    """[7, 3] -> [15, 3]: the entropy of each step that is taken."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)[STATES] * MASK


def score_norms_of(logits: Tensor) -> Tensor:
    """[7, 3] -> [15, 3]: |grad log pi|^2 of each token, 1 - 2 pi + sum pi^2 for a softmax over logits."""
    p = logits.softmax(-1)
    return (1 + p.square().sum(-1, keepdim=True) - 2 * p)[STATES, IDS] * MASK


def scores_of(logits: Tensor) -> Tensor:
    """[7, 3] -> [15, 3, 21]: grad log pi of each token."""
    return torch.func.jacrev(logprobs_of)(logits).reshape(15, 3, 21)


def greedy_of(logits: Tensor) -> int:
    """The completion that always takes the most probable token."""
    y: tuple[int, ...] = ()
    while y not in COMPLETIONS:
        y = (*y, int(logits[PREFIXES.index(y)].argmax()))
    return COMPLETIONS.index(y)


def probabilities_of(logits: Tensor) -> Tensor:
    return logprobs_of(logits).sum(-1).exp()  # [15]


@dataclass(frozen=True)
class Problem:
    logits: Tensor  # [P, 7, 3]
    reference: Tensor  # [P, 7, 3]
    rewards: Tensor  # [P, 15], or one reward per step [P, 15, 3]

    @classmethod
    def random(cls, seed: int, *, prompts: int = 1, kind: str = "graded") -> Problem:
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(prompts, 7, 3, generator=draw, dtype=torch.double)
        reference = torch.randn(prompts, 7, 3, generator=draw, dtype=torch.double)
        rewards = torch.randn(prompts, 15, generator=draw, dtype=torch.double)
        if kind == "binary":
            rewards = (rewards > 0.3).double()
        if kind == "dense":  # the reward of a step depends on its prefix and action
            table = torch.randn(prompts, 7, 3, generator=draw, dtype=torch.double)
            rewards = table[:, STATES, IDS] * MASK
        return cls(logits, reference, rewards)

    @property
    def values(self) -> Tensor:
        """A critic [P, 15, 3] whose values depend on the prefix and are wrong."""
        draw = torch.Generator().manual_seed(99)
        return torch.randn(len(self.logits), 7, generator=draw, dtype=torch.double)[:, STATES] * MASK

    def exact_values(self) -> Tensor:
        """[P, 15, 3]: the expected reward to go from the prefix of each token."""
        rewards = self.rewards
        if rewards.ndim == 2:
            rewards = rewards[..., None] * (torch.arange(3) == LENGTHS[:, None] - 1)
        to_go = rewards.flip(-1).cumsum(-1).flip(-1)
        tables = []
        for theta, g in zip(self.logits, to_go, strict=True):
            chance = probabilities_of(theta)[:, None] * MASK
            mass = torch.zeros(7, dtype=torch.double).index_add_(0, STATES.flatten(), chance.flatten())
            sums = torch.zeros(7, dtype=torch.double).index_add_(0, STATES.flatten(), (chance * g).flatten())
            tables.append((sums / mass)[STATES] * MASK)
        return torch.stack(tables)

    @property
    def totals(self) -> Tensor:
        return self.rewards.sum(-1) if self.rewards.ndim == 3 else self.rewards

    def gradient(self, objective) -> Tensor:
        """Gradient [P, 21] of the mean over prompts of `objective(logits, total rewards, reference)`."""
        parts = zip(self.logits, self.totals, self.reference, strict=True)
        grads = [torch.func.grad(objective)(theta, r, ref) for theta, r, ref in parts]
        return torch.stack(grads).reshape(len(grads), -1) / len(grads)

    def target(self, beta: float = 0.0, entropy_coef: float = 0.0) -> Tensor:
        """Gradient of J = E[R] - beta KL + entropy_coef H of the sequence."""

        def objective(theta: Tensor, rewards: Tensor, reference: Tensor) -> Tensor:
            logp, ref = logprobs_of(theta).sum(-1), logprobs_of(reference).sum(-1)
            return (logp.exp() * (rewards - beta * (logp - ref) - entropy_coef * logp)).sum()

        return self.gradient(objective)


def expected_gradient(
    estimator: Estimator,
    problem: Problem,
    group_size: int,
    *,
    unordered: bool = False,
    value: float = 0.37,
    behaviour: Tensor | None = None,
    values: Tensor | None = None,
    truncated: Tensor | None = None,
) -> Tensor:
    """E[ascent gradient] [P, 21] over all groups.

    Args:
        estimator: Whose loss is differentiated.
        problem: The policy and its rewards.
        group_size: Rows a prompt.
        unordered: Take each multiset of a group once, for larger groups and for several prompts.
        value: The running mean.
        behaviour: Logits [P, 7, 3] of the policy that samples; the problem's own by default.
        values: A critic [P, 15, 3]; a wrong one by default.
        truncated: [15], the completions that count as cut off.
    """
    prompts = len(problem.logits)
    of_row = torch.arange(prompts).repeat_interleave(group_size)  # [N]
    rows = len(of_row)
    logp = torch.stack([logprobs_of(theta) for theta in problem.logits])  # [P, 15, 3]
    ref = torch.stack([logprobs_of(theta) for theta in problem.reference])
    entropy = torch.stack([entropies_of(theta) for theta in problem.logits])
    old = logp if behaviour is None else torch.stack([logprobs_of(theta) for theta in behaviour])
    norms = torch.stack([score_norms_of(theta) for theta in problem.logits])
    greedy = torch.stack(
        [r[greedy_of(theta)] for theta, r in zip(problem.logits, problem.totals, strict=True)]
    )
    values = problem.values if values is None else values
    truncated = torch.zeros(15, dtype=torch.bool) if truncated is None else truncated
    if unordered:
        group = torch.combinations(torch.arange(15), group_size, with_replacement=True)
        counts = torch.nn.functional.one_hot(group, 15).sum(1).double()
        orders = math.factorial(group_size) / torch.lgamma(counts + 1).sum(-1).exp()
        of_prompt = torch.cartesian_prod(*[torch.arange(len(group))] * prompts).reshape(-1, prompts)
        choices, ways = group[of_prompt].flatten(1), orders[of_prompt].prod(-1)
    else:
        choices = torch.cartesian_prod(*[torch.arange(15)] * rows).reshape(-1, rows)
        ways = torch.ones(len(choices), dtype=torch.double)
    chance = ways * old.sum(-1)[of_row, choices].sum(-1).exp()  # [M]
    torch.testing.assert_close(chance.sum(), torch.ones((), dtype=torch.double))

    def loss(logp: Tensor, entropy: Tensor, old: Tensor, y: Tensor) -> Tensor:
        mask, reference, rewards = MASK[y], ref[of_row, y], problem.rewards[of_row, y]
        size = group_size if group_size > 1 else None
        kept = rows_of_step.keep(estimator, rewards, mask, group_size=size, truncated=truncated[y])
        advantages = estimator.advantages(
            rewards,
            mask,
            group_size=size,
            valid=kept.compared,
            logprobs=old,
            ref_logprobs=reference,
            values=values[of_row, y],
            greedy_rewards=greedy[of_row],
            score_norms=norms[of_row, y],
            baseline_value=value,
            max_length=3,
        )
        live = kept.mask.double()
        weights = estimator.token_weights(live, max_length=MAX_LENGTH, valid=kept.counted)
        return estimator.loss(
            logp,
            advantages.policy,
            weights,
            live,
            old_logprobs=old,
            sampling_logprobs=old,
            ref_logprobs=reference,
            entropy=entropy,
        )

    slopes = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), chunk_size=20000)
    here = logp[of_row, choices]
    result = torch.zeros(prompts, 21, dtype=torch.double)
    for slope, quantity in zip(
        slopes(here, entropy[of_row, choices], old[of_row, choices], choices),
        (logprobs_of, entropies_of),
        strict=True,
    ):
        for n, x in enumerate(of_row.tolist()):
            share = torch.zeros(15, 3, dtype=torch.double)
            share.index_add_(0, choices[:, n], chance[:, None] * slope[:, n])
            jacobian = torch.func.jacrev(quantity)(problem.logits[x]).reshape(15, 3, 21)
            result[x] -= torch.einsum("yt,ytd->d", share, jacobian)
    return result


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))
