"""Finds the fastest way of sampling and scoring that is right for a model, by trying each on a few tokens.

Architectures differ in what they cache and in what they make of padding, and a model that does something else
than is expected of it still trains, on wrong numbers. The probe therefore compares every way with the forward
pass of each row alone, which needs neither a cache nor padding. It draws no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.distribution import log_softmax
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.head import head_of, tokens_at_once
from tokenrl.language.rollout.prompts import SharedPrompts
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import score
from tokenrl.runs.threads import using_threads

TOLERANCES = {torch.float64: (1e-6, 1e-5), torch.float32: (0.01, 0.03), torch.float16: (0.05, 0.2)}
"""By precision: the largest error of a value, in standard deviations of the logits (or of the hidden states),
and of a gradient, relative to its norm. Rounding stays far below them, in TensorFloat-32 too."""
COARSE = (0.12, 0.5)
"""The same for bfloat16 and for quantised weights."""
PIECE = 3
"""Tokens that are tried at a time, of a few more."""


def choose_way(
    policy: Policy,
    *,
    hidden: bool = False,
    gradient: bool = True,
    passes: bool = False,
    accelerator: Any = None,
) -> None:
    """Set how `policy` is scored, and say in `policy.remarks` if it is not the usual way that is taken.

    A model whose logits are not finite is left as it is: the run itself reports that.

    Args:
        policy: the policy, on the device where it will run; its weights and gradients are left as they are.
        hidden: whether the hidden states are needed too, as by a critic.
        gradient: whether gradients are needed too.
        passes: whether to try if several passes may share their prompts, as one process does in updates.
        accelerator: accelerate's handle of the processes, which then take the same way; None for one process.

    Raises:
        Refused: sampling is wrong for this model, or both ways of scoring are.
    """
    head, found, apart = None, _Findings(None, None, None), False
    with torch.random.fork_rng(devices=[]), using_threads(1):
        probe = _Probe(policy, hidden, gradient)
        wrong = _failure(probe.sample)
        if wrong is not None:
            found = _Findings(wrong, None, None)
        elif probe.finite:
            head = head_of(policy.model)
            found = _tried(probe, policy.share_prompt, head is not None)
            if passes and probe.gradient and policy.share_prompt and not found.shared:
                apart = _failure(lambda: probe.score_apart(None if found.whole else PIECE)) is None
    policy.share_passes = apart
    _take(policy, _agreed(accelerator, found), head)


def _tried(probe: _Probe, share: bool, linear: bool) -> _Findings:
    """Try the ways of scoring; `share` says whether prompts may be shared, `linear` whether the head is."""
    wrong = whole = None
    shared = _failure(lambda: probe.score(share_prompt=True)) if share else None
    if shared or not share:
        wrong = _failure(lambda: probe.score(share_prompt=False))
    if not linear:
        whole = "the head is no linear layer"
    elif wrong is None:
        right = share and not shared
        whole = _failure(lambda: probe.score(share_prompt=right, tokens_at_once=PIECE))
    return _Findings(wrong, shared, whole)


class _Findings(NamedTuple):
    """What failed, in words; None where nothing did."""

    wrong: str | None
    """All ways of sampling or of scoring."""
    shared: str | None
    """Scoring with a shared prompt."""
    whole: str | None
    """Computing logits apart from the forward pass."""


def _agreed(accelerator: Any, found: _Findings) -> _Findings:
    """Return what failed on any of the processes, which all have to take the same way."""
    if accelerator is None or accelerator.num_processes == 1:
        return found
    failed = torch.tensor([[int(bool(one)) for one in found]], device=accelerator.device)
    anywhere = accelerator.gather(failed).amax(dim=0).tolist()
    elsewhere = "it is wrong on another process"
    return _Findings(
        *(one or (elsewhere if any_ else None) for one, any_ in zip(found, anywhere, strict=True))
    )


def _take(policy: Policy, found: _Findings, head: nn.Linear | None) -> None:
    """Take the fastest ways that are right."""
    if found.wrong:
        raise Refused(
            f"The model {policy.source!r} ({type(policy.model).__name__}) cannot be sampled and scored in "
            f"batches as it should: {found.wrong}. This was tried on four short rows, against the "
            "forward pass of each row alone. A model must heed the attention_mask and position_ids of rows "
            "that are padded on the left, and return a cache of the tokens before. Choose another "
            "architecture, or try another release of transformers."
        )
    if found.shared:
        policy.share_prompt = False
        policy.remarks["prompts"] = f"computed anew for each completion when it is scored ({found.shared})"
    policy.tokens_at_once = tokens_at_once(head.out_features) if head and not found.whole else None
    if found.whole:
        policy.remarks["logits"] = f"of all tokens at once when they are scored ({found.whole})"


class _Wrong(Exception):
    """A way gives other numbers than each row alone."""


def _failure(way: Callable[[], None]) -> str | None:
    """Try a way; say how it fails, or None if it does not."""
    try:
        way()
    except (_Wrong, Refused) as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any architecture, which may fail in any way
        return shorten(describe(error), 140, placeholder=" ...")
    return None


class _Probe:
    """Two completions of a longer and of a shorter prompt, and what they should give."""

    def __init__(self, policy: Policy, hidden: bool, gradient: bool) -> None:
        self.policy, self.hidden = policy, hidden
        self.gradient = gradient and bool(policy.trainable_parameters())
        self.finite = True
        dtypes = {p.dtype for p in policy.model.parameters()}
        self.value_tolerance, self.gradient_tolerance = max(TOLERANCES.get(d, COARSE) for d in dtypes)
        # In half precision a mixture of experts may send a few tokens elsewhere: their mean is compared then.
        self.typical = self.value_tolerance > TOLERANCES[torch.float32][0]

    @torch.no_grad()
    def sample(self) -> None:
        """Sample, and compare with each row alone."""
        policy = self.policy
        vocabulary = policy.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        context = policy.context or 64
        length = max(1, min(4, context // 3))
        ids = [(7 * i + 3) * vocabulary // 53 % vocabulary for i in range(7)]
        longer = ids[: max(1, min(5, context - length))]
        first = policy.model(torch.tensor([longer], device=policy.device), use_cache=False)
        self.finite = bool(torch.isfinite(first.logits).all())
        if not self.finite:
            return
        draws = (torch.arange(4 * length) * 0.6180339887 % 1).view(4, length)
        sampling = Sampling(length, 2, keep_hidden=self.hidden)
        endless = TransformersGenerator(
            replace(policy, eos_ids=(), stops=None)
        )  # completions have all tokens
        self.rollout = endless.generate([longer, ids[-max(1, len(longer) // 2) :]], sampling, draws)
        with torch.set_grad_enabled(self.gradient):
            self._compute_alone()
        self._compare("sampling", self.rollout.logprobs, self.rollout.hidden)

    def score(self, *, share_prompt: bool, tokens_at_once: int | None = None) -> None:
        """Score what was sampled, and compare with each row alone, in values and in the gradient."""
        name = "scoring with a shared prompt" if share_prompt else "scoring"
        if tokens_at_once is not None:
            name = "scoring some tokens at a time"
        ways: dict[str, Any] = {"share_prompt": share_prompt, "tokens_at_once": tokens_at_once}
        with torch.set_grad_enabled(self.gradient):
            found = score(self.policy.model, self.rollout, hidden=self.hidden, **ways)
        self._compare(name, found.logprobs, found.hidden)
        if self.gradient:
            self._compare_gradient(name, self._gradient(found.logprobs))

    def score_apart(self, tokens_at_once: int | None) -> None:
        """Score in two passes that share their prompts, and compare the gradient with that of each row alone.

        The gradients of the weights themselves are put back.
        """
        parameters, rows = self.policy.trainable_parameters(), torch.arange(4, device=self.policy.device)
        before = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            prompts = SharedPrompts(rows)
            for part in (rows[::3], rows[1:3]):
                rollout = self.rollout.rows(part, prompts.rows)
                found = score(self.policy.model, rollout, prompts=prompts, tokens_at_once=tokens_at_once)
                self._weighted(found.logprobs, part).backward()
            prompts.backward()
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            self._compare_gradient("scoring in passes that share their prompts", gradient)
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad

    def _compute_alone(self) -> None:
        """Compute each row without padding, mask and cache."""
        model, rollout = self.policy.model, self.rollout
        width = rollout.completion_ids.shape[1]
        logprobs, hidden, spread = [], [], []
        for i in range(len(rollout.mask)):
            row = rollout.rows(torch.tensor([i], device=rollout.mask.device))
            ids = torch.cat([row.prompt_ids, row.completion_ids], dim=1)
            out = model(ids, use_cache=False, output_hidden_states=self.hidden)
            logp = log_softmax(out.logits[:, -width - 1 : -1], 1.0)
            logprobs.append(logp.gather(2, row.completion_ids[:, :, None]).squeeze(2))
            spread.append(logp.detach().std())
            if self.hidden:
                hidden.append(out.hidden_states[-1][:, -width - 1 : -1].detach())
        expected = torch.cat(logprobs)
        self.expected_gradient = self._gradient(expected) if self.gradient else []
        self.expected, self.spread = expected.detach(), torch.stack(spread).mean()
        self.expected_hidden = torch.cat(hidden) if hidden else None

    def _weighted(self, logprobs: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return a sum of log-probabilities of some rows, each with a weight of its own."""
        numbers = torch.arange(self.rollout.mask.numel(), device=logprobs.device)
        weights = torch.cos(numbers).view_as(self.rollout.mask)
        return (logprobs * (weights if rows is None else weights[rows])).sum()

    def _gradient(self, logprobs: Tensor) -> list[Tensor]:
        """Return the gradient of that sum over all rows."""
        parameters = self.policy.trainable_parameters()
        found = torch.autograd.grad(self._weighted(logprobs), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def _compare_gradient(self, name: str, found: list[Tensor]) -> None:
        """Raise `_Wrong` if a gradient is too far from that of each row alone."""
        off = _norm(a - b for a, b in zip(found, self.expected_gradient, strict=True))
        norm = _norm(self.expected_gradient)
        # Where float16 overflows in the gradient of each row alone, there is nothing to compare with.
        if math.isfinite(norm) and not off <= self.gradient_tolerance * norm:
            raise _Wrong(f"{name} gives a gradient that is off by {off / max(norm, 1e-30):.2g} of its norm")

    def _compare(self, name: str, logprobs: Tensor, hidden: Tensor | None) -> None:
        """Raise `_Wrong` if log-probabilities or hidden states are too far from those of each row alone."""
        errors = {"log-probabilities": (logprobs.detach() - self.expected).abs() / self.spread}
        if self.expected_hidden is not None:
            assert hidden is not None
            off = (hidden.detach() - self.expected_hidden).float().square().mean(dim=2).sqrt()
            errors["hidden states"] = off / self.expected_hidden.float().std()
        for what, error in errors.items():
            by_prompt = error.view(2, -1)
            worst = float((by_prompt.mean(dim=1) if self.typical else by_prompt.amax(dim=1)).max())
            if not worst <= self.value_tolerance:
                raise _Wrong(f"{name} gives {what} that are off by {worst:.2g} standard deviations")


def _norm(parts: Iterable[Tensor]) -> float:
    """Norm of a vector that is given in parts."""
    return math.hypot(*(float(torch.linalg.vector_norm(x.float())) for x in parts))
