"""Checks on a few tokens that a model is sampled and scored rightly.

Architectures differ in what they cache and in how they treat padding, and a model that treats them otherwise
than expected still trains, on wrong numbers. So values and gradients are compared with the forward pass of
each row alone, which needs neither a cache nor padding. Where the fast way of scoring is wrong, the plain one
is used; a model for which both are wrong is refused. No random numbers are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.head import head_of, tokens_at_once
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import UNCHANGED, Regime, score
from tokenrl.runs.processes import all_reduce_max

TOLERANCES = {torch.float64: (1e-6, 1e-5), torch.float32: (0.01, 0.03), torch.float16: (0.05, 0.2)}
"""By precision: the largest error of a value, in standard deviations of the logits (or of the hidden states),
and of a gradient, relative to its norm. Rounding stays far below them, in TensorFloat-32 too."""
COARSE = (0.12, 0.5)
"""The same for bfloat16 and for quantised weights."""
PIECE = 3
"""Tokens whose logits are computed at once in a trial of chunks, of a few more."""


class WrongRollout(Exception):
    """Raised where the rows or the numbers of a batch are not what they must be; says in words how."""


def check_model(
    policy: Policy,
    model: nn.Module | None = None,
    *,
    hidden: bool = False,
    gradient: bool = True,
    turns: bool = False,
    accelerator: Any = None,
) -> Regime:
    """Return the fastest regime of sampling and scoring that is right for a policy, which stays as it is.

    A model whose logits are not finite is not tried: the run itself reports that.

    Args:
        policy: the policy, on the device where it will run.
        model: what gradients flow through, with the weights of `policy.model`; None for that model.
        hidden: whether the hidden states are needed too, as by a critic.
        gradient: whether gradients are needed too.
        turns: whether episodes of several turns are sampled.
        accelerator: accelerate's handle of the processes, which then score alike; None for one process.

    Raises:
        Refused: sampling is wrong for this model, or scoring is wrong in every regime.
    """
    with torch.random.fork_rng(devices=[]):
        faults = _faults(policy, model or policy.model, hidden, gradient)
    wrong, prompts, logits, cache = _on_any_process(accelerator, faults)
    if wrong:
        raise Refused(
            f"The model {policy.source!r} ({type(policy.model).__name__}) cannot be sampled and scored in "
            f"batches: {wrong}, against each row alone. It must heed attention_mask and position_ids, and "
            "return a cache: choose another architecture, or another release of transformers."
        )
    remarks = {}
    if cache:
        words = "as the model keeps it, with each prompt read for each completion, in sampling"
        remarks["cache"] = f"{words} ({cache})"
    if prompts:
        remarks["prompts"] = f"computed anew for each completion when scored ({prompts})"
    if logits:
        remarks["logits"] = f"of all tokens at once when scored ({logits})"
    handed_back = "its cache is only handed back to it"  # so that no row may leave it
    if turns and (fault := handed_back if cache else _failure(_continue_rows, policy)):
        remarks["turns"] = f"each reads its whole history again ({fault})"
    head = head_of(policy.model)
    return Regime(
        share_prompt=not prompts and not _recomputes(policy),
        tokens_at_once=None if logits or head is None else tokens_at_once(head.out_features),
        plain_cache=bool(cache),
        keeps_turns=turns and "turns" not in remarks,
        remarks=remarks,
    )


def checked_generator(policy: Policy, environments: Any = None) -> TransformersGenerator:
    """Return what samples a policy that is not trained here, in the regime that `check_model` returns.

    Args:
        policy: the policy, on the device where it will run.
        environments: what episodes are played in; None for completions of one turn.
    """
    turns = environments is not None
    return TransformersGenerator(policy, regime=check_model(policy, gradient=False, turns=turns))


def _recomputes(policy: Policy) -> bool:
    """Whether activations are recomputed in the backward pass, so that no cache is kept."""
    return any(
        getattr(m, "gradient_checkpointing", False) and m.training for m in policy.model.modules()
    )


def _faults(policy: Policy, model: nn.Module, hidden: bool, gradient: bool) -> list[str]:
    """Return in words the faults of a policy, empty texts where there is none.

    Returns:
        The fault of every way of sampling or of scoring; of sharing prompts; of logits in chunks; and of a
        cache whose rows are chosen and for which memory is set aside.
    """
    prompts, _ = _prompts(policy)
    with torch.no_grad():
        first = policy.model(torch.tensor([prompts[0]], device=policy.device), use_cache=False)
    if not torch.isfinite(first.logits).all():
        return ["", "", "", ""]
    trials: list[Trial] = []

    def sample(plain_cache: bool) -> None:
        rollout = _sampled(policy, Regime(plain_cache=plain_cache), hidden)
        slope = gradient and bool(policy.trainable_parameters())
        trials.append(Trial.of(policy, rollout, "sampling", gradient=slope))

    cache = _failure(sample, False)
    if cache and _failure(sample, True):
        return [cache, "", "", ""]
    if trials[0].gradient is not None and not _norm(trials[0].gradient):
        raise Refused(
            f"No weight of {policy.source!r} that is to be trained changes its log-probabilities. A function that was "
            "put on a model, such as a compiled forward, goes on with the first model's weights in copies of it."
        )
    compare = trials[0].score
    recomputes = _recomputes(policy)
    unshared = "" if recomputes else _failure(compare, model, Regime())
    can_share = not (recomputes or unshared)
    wrong = "" if can_share else _failure(compare, model, Regime(share_prompt=False))
    whole = "" if wrong else "the head is no linear layer"
    if whole and head_of(model) is not None:
        whole = _failure(compare, model, Regime(can_share, PIECE))
    return [wrong, unshared, whole, cache]


def _sampled(policy: Policy, regime: Regime, hidden: bool) -> Rollout:
    """Sample two completions of a longer and of a shorter prompt, which do not end early."""
    prompts, draws = _prompts(policy)
    endless = TransformersGenerator(replace(policy, eos_ids=(), stops=None), regime=regime)
    return endless.generate(prompts, Sampling(draws.shape[1], 2, keep_hidden=hidden), draws)


@torch.no_grad()
def _continue_rows(policy: Policy) -> None:
    """Sample two turns, of which the second continues the cache of the first, and compare them with each row.

    The first turn ends at several lengths, and before the second one row reads more tokens than another.
    """
    prompts, draws = _prompts(policy)
    length = draws.shape[1]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    numbers = range(len(prompts))
    endless = replace(policy, eos_ids=(), stops=None)
    turns = TransformersGenerator(endless, regime=Regime(keeps_turns=True)).over_turns()
    ids = turns.generate(prompts, Sampling(length), draws).completion_ids
    ends = ids[:, length // 2].tolist()
    ending = replace(turns, policy=replace(endless, eos_ids=tuple(ends)))
    first = ending.turn(numbers, prompts, Sampling(length), draws)
    if not (turns.histories and turns.histories.rows):
        raise WrongRollout("its cache drops tokens, as with a sliding window")
    histories = []
    for i, prompt in enumerate(prompts):
        answer = prompts[0][: 1 + i % 2]
        histories.append([*prompt, *first.completion_ids[i][first.mask[i]].tolist(), *answer])
    second = turns.turn(numbers, histories, Sampling(2), draws)
    Trial.of(policy, second, "a cache that is kept from turn to turn")


def _prompts(policy: Policy) -> tuple[list[list[int]], Tensor]:
    """Return a longer and a shorter prompt, and uniforms [4, T] of two completions of each, as the context allows."""
    vocabulary = len(policy.model.get_input_embeddings().weight)  # type: ignore[operator]
    context = policy.context or 64
    length = max(1, min(4, context // 3))
    ids = [(7 * i + 3) * vocabulary // 53 % vocabulary for i in range(7)]
    longer = ids[: max(1, min(5, context - length))]
    shorter = ids[-max(1, len(longer) // 2) :]
    return [longer, shorter], (torch.arange(4 * length) * 0.6180339887 % 1).view(4, length)


def _on_any_process(accelerator: Any, faults: list[str]) -> list[str]:
    """Return the faults of any of the processes, since all processes have to score alike."""
    anywhere = all_reduce_max(accelerator, [int(bool(fault)) for fault in faults])
    words = ("", "it is wrong on another process")
    return [fault or words[wrong] for fault, wrong in zip(faults, anywhere, strict=True)]


def _failure(compute: Callable[..., None], *arguments: Any) -> str:
    """Compute something; return in words how that fails, or an empty text."""
    try:
        compute(*arguments)
    except (WrongRollout, Refused) as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any architecture, which may fail in any way
        return shorten(describe(error), 140, placeholder=" ...")
    return ""


@dataclass(frozen=True)
class Trial:
    """Two completions of a longer and of a shorter prompt, all of T tokens, and what each row alone gives for them.

    Attributes:
        policy: the policy.
        rollout: the completions, sampled together.
        logprobs: log-probabilities of each row alone [4, T].
        hidden: hidden states of each row alone [4, T, H]; None if they are not needed.
        gradient: gradient of their weighted sum (see `_gradient`); None if it is not needed.
        spread: standard deviation of the logits.
    """

    policy: Policy
    rollout: Rollout
    logprobs: Tensor
    hidden: Tensor | None
    gradient: list[Tensor] | None
    spread: Tensor

    @classmethod
    def of(
        cls,
        policy: Policy,
        rollout: Rollout,
        name: str,
        *,
        gradient: bool = False,
    ) -> Trial:
        """Compute each row without padding, mask and cache, and compare what was sampled with it, in the way `name`."""
        hidden = rollout.hidden is not None
        rows = []
        with torch.set_grad_enabled(gradient):
            for i in range(len(rollout)):
                row = rollout.take(torch.tensor([i]))
                length = row.mask.shape[1]
                before = slice(-length - 1, -1)  # the positions that predict the completion
                ids = torch.cat([row.prompt_ids, row.completion_ids], dim=1).to(policy.device)
                out = policy.model(ids, use_cache=False, output_hidden_states=hidden)
                logp = UNCHANGED.log_probabilities(out.logits[:, before])
                chosen = logp.gather(2, ids[:, -length:, None]).squeeze(2)
                states = out.hidden_states[-1][:, before].detach() if hidden else chosen
                rows.append((chosen, states, logp.detach().std()[None]))
            alone, states, spread = map(torch.cat, zip(*rows, strict=True))
            slope = _gradient(policy, alone) if gradient else None
        of_rows = alone.detach(), states if hidden else None
        trial = cls(policy, rollout, *of_rows, slope, spread.mean())
        trial.compare(name, rollout.sampling_logprobs, rollout.hidden)
        return trial

    @property
    def tolerances(self) -> tuple[float, float]:
        """The largest errors of values and of gradients, of the coarsest precision of the weights."""
        types = {parameter.dtype for parameter in self.policy.model.parameters()}
        return max(TOLERANCES.get(dtype, COARSE) for dtype in types)

    def score(self, model: nn.Module, regime: Regime) -> None:
        """Score what was sampled, and compare values and gradient with those of each row alone."""
        name = "scoring with a shared prompt" if regime.share_prompt else "scoring"
        if regime.tokens_at_once is not None:
            name = "scoring some tokens at a time"
        with torch.set_grad_enabled(self.gradient is not None):
            scores = score(model, self.rollout, regime, hidden=self.hidden is not None)
        self.compare(name, scores.logprobs, scores.hidden)
        if self.gradient is None:
            return
        slope = _gradient(self.policy, scores.logprobs)
        error = _norm([a - b for a, b in zip(slope, self.gradient, strict=True)])
        norm = _norm(self.gradient)
        # Where float16 overflows in the gradient of each row alone, there is nothing to compare with.
        if math.isfinite(norm) and not error <= self.tolerances[1] * norm:
            share = error / max(norm, 1e-30)
            raise WrongRollout(f"{name} gives a gradient that is off by {share:.2g} of its norm")

    def compare(self, name: str, logprobs: Tensor, hidden: Tensor | None = None) -> None:
        """Raise `WrongRollout` if log-probabilities or hidden states are too far from those of each row alone."""
        limit = self.tolerances[0]
        gaps = logprobs.detach().to(self.logprobs) - self.logprobs
        errors = {"log-probabilities": gaps.abs() / self.spread}
        if self.hidden is not None and hidden is not None:
            off = (hidden.detach() - self.hidden).float().square().mean(dim=2).sqrt()
            errors["hidden states"] = off / self.hidden.float().std()
        for quantity, error in errors.items():
            largest = error.view(2, -1)
            # In half precision a mixture of experts may send a few tokens elsewhere: their mean is compared then.
            if limit > TOLERANCES[torch.float32][0]:
                largest = largest.mean(dim=1)
            worst = float(largest.max())
            if not worst <= limit:
                raise WrongRollout(
                    f"{name} gives {quantity} that are off by {worst:.2g} standard deviations"
                )


def _gradient(policy: Policy, logprobs: Tensor) -> list[Tensor]:
    """Return the gradient of a sum of log-probabilities, each with a weight of its own."""
    numbers = torch.arange(logprobs.numel(), device=logprobs.device)
    weighted = logprobs * torch.cos(numbers).view_as(logprobs)
    parameters = policy.trainable_parameters()
    return list(torch.autograd.grad(weighted.sum(), parameters, materialize_grads=True))


def _norm(parts: Sequence[Tensor]) -> float:
    """Return the norm of a vector that is given in parts."""
    norms = [float(torch.linalg.vector_norm(x.float())) for x in parts]
    return math.hypot(*norms)
