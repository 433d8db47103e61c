"""Chooses how forward passes are computed in training: their precision, and the attention of updates.

Which is fastest depends on the processor, the model and the length of completions: on processors torch's
fused attention has a slow backward pass in bfloat16, and without instructions for bfloat16 everything is slow
in it. So the ways are timed once, before the first step. A run's settings record what was chosen, so that a
continuation computes in the same way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.layers import CompiledLayers
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.precision import HalfCopy, with_eager_attention

SMALL = 1_000_000
"""Models with fewer parameters compute in the usual way without a measurement."""
MARGIN = 1.2
"""Another way than float32 must be faster by this factor."""
ROUNDS = 2
"""How often each way is timed, after once to warm up."""
ENOUGH = 3.0
"""Seconds after which one round is enough, since a long piece of work is disturbed by little."""
CLOSE = 0.1
"""The largest difference of log-probabilities between two ways, on average, in standard deviations."""
WORK = 2e10
"""Operations of what is timed: a tenth of a second with one thread, and less memory than an update takes."""
TOKENS = 256
"""But at least so many tokens of completions, since with fewer the time goes into reading the weights."""
PROMPT = 16
"""Tokens of the prompts of what is timed."""

Attention = Literal["as_loaded", "eager"]


@dataclass
class Forward:
    """How forward passes are computed.

    Attributes:
        policy: what is sampled and scored.
        model: what gradients flow through; it has the weights of `policy.model`.
        half: the bfloat16 copy that both belong to; None in float32.
        attention: the attention of updates.
        why: in words, where this comes from; empty if all is as usual.
        layers: compiled code for the layers of `model` in updates; None for the model as it is.
    """

    policy: Policy
    model: nn.Module
    half: HalfCopy | None = None
    attention: Attention = "as_loaded"
    why: str = ""
    layers: CompiledLayers | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a run that computes in this way."""
        return {"mixed_precision": "bf16" if self.half else "no", "training_attention": self.attention}

    @property
    def in_words(self) -> str:
        """A line for the run's header; empty if all is as usual."""
        if not self.why:
            return ""
        numbers = "bfloat16 (weights float32)" if self.half else "float32"
        return f"{numbers}, {self.attention.replace('_', ' ')} attention in updates ({self.why})"

    def in_updates(self) -> AbstractContextManager[None]:
        """Compute the layers by compiled code inside the block, if there is some."""
        return contextlib.nullcontext() if self.layers is None else self.layers.inside()

    def refresh(self) -> None:
        """Compute with the weights that an update has left."""
        if self.half is not None:
            self.half.refresh()

    def average_gradients(self, accelerator: Any) -> None:
        """Average the gradients over processes; in float32 accelerate has done so."""
        if self.half is not None:
            self.half.average_gradients(accelerator)


def choose_forward(args: TrainSettings, policy: Policy, accelerator: Any) -> Forward:
    """Choose how forward passes are computed, as the settings say or by a measurement.

    Args:
        args: the settings, in which `mixed_precision` and `training_attention` may be left open.
        policy: the policy, on the device where it will run.
        accelerator: accelerate's handle of device and processes.
    """
    precision: str | None = args.mixed_precision
    attention = args.training_attention
    if all(p.dtype != torch.float32 for p in policy.trainable_parameters()):
        precision = "no"  # the weights have another precision, and everything has that of the weights
    on_gpu = accelerator.device.type != "cpu"
    # Clocks of several processes would disagree, and a GPU with bfloat16 is always faster in it.
    if on_gpu or policy.size < SMALL or accelerator.num_processes > 1:
        usual = "bf16" if on_gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
        precision, attention = precision or usual, attention or "as_loaded"
    if precision and attention:
        given = args.mixed_precision or args.training_attention
        plain = (precision, attention) == ("no", "as_loaded")
        why = "" if plain else "as set" if given else "a GPU with bfloat16"
        found = _made(policy, precision == "bf16", attention, why)
    else:
        found = _fastest(args, policy, precision, attention)
    if found.half is not None:
        found.half.adopt_frozen()
    return found


def _made(policy: Policy, half: bool, attention: Attention, why: str = "") -> Forward:
    copied = HalfCopy(policy) if half else None
    acting = policy if copied is None else copied.policy
    return _with_attention(Forward(acting, acting.model, copied, why=why), attention)


def _with_attention(forward: Forward, attention: Attention) -> Forward:
    model = forward.policy.model
    if attention == "eager":
        model = with_eager_attention(model)
    return replace(forward, model=model, attention=attention)


def _fastest(
    args: TrainSettings, policy: Policy, precision: str | None, attention: Attention | None
) -> Forward:
    """Time the ways that the settings leave open, and return the fastest of those that are right."""
    ways = list(_open_ways(policy, precision, attention))
    rollout = made_up_rollout(args, policy)
    found = [differentiate(way.policy, way.model, rollout) for way in ways]
    ways = [way for way, one in zip(ways, found, strict=True) if _close(one, found[0])] or ways[:1]
    best = [float("inf")] * len(ways)
    for _ in range(ROUNDS):
        for i, way in enumerate(ways):
            best[i] = min(best[i], seconds_of(partial(differentiate, way.policy, way.model, rollout)))
        if sum(best) > ENOUGH:
            break
    chosen = min(range(len(ways)), key=best.__getitem__)
    if best[chosen] * MARGIN > best[0]:
        chosen = 0
    forward = ways[chosen]
    forward.why = f"measured: an update in {best[chosen]:.2g} s"
    if chosen:
        forward.why += f", {best[0]:.2g} s in the usual way"
    return forward


def _open_ways(policy: Policy, precision: str | None, attention: Attention | None) -> Iterator[Forward]:
    """Yield the ways that the settings leave open, the usual one first."""
    for half in ("no", "bf16") if precision is None else (precision,):
        base = _made(policy, half == "bf16", "as_loaded")
        if attention in (None, "as_loaded"):
            yield base
        if attention != "as_loaded":
            with contextlib.suppress(*([Refused] if attention is None else [])):
                yield _with_attention(base, "eager")


def _close(found: Tensor, usual: Tensor) -> bool:
    """Whether log-probabilities differ by no more than bfloat16 makes them differ."""
    return bool((found - usual).abs().mean() <= CLOSE * usual.std())


def made_up_rollout(args: TrainSettings, policy: Policy) -> Rollout:
    """Make up completions as long as those of a run may be, of as many rows as `WORK` allows."""
    context = policy.context or 10**9
    length = max(1, min(args.max_completion_length, 128, context - PROMPT))
    width = max(1, min(PROMPT, context - length))
    most = args.micro_batch_size or args.prompts_per_step * args.num_generations
    rows = max(2, min(most, max(-(-TOKENS // length), int(WORK / (6 * policy.size * length)))))
    return make_up(policy, rows, min(args.num_generations, rows), width, length)


def make_up(policy: Policy, rows: int, group: int, width: int, length: int) -> Rollout:
    """Make up completions of `length` random tokens, in groups, of prompts of `width` tokens."""
    vocabulary, device = policy.model.get_input_embeddings().num_embeddings, policy.device  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)  # never the generator of all
    prompts, index = -(-rows // group), torch.arange(rows) // group
    ids = torch.randint(vocabulary, (prompts, width), generator=generator)
    completions = torch.randint(vocabulary, (rows, length), generator=generator)
    every, whole = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(completions, dtype=torch.bool)
    columns = (ids, every, index, completions, whole, torch.zeros(rows, length), torch.zeros(rows) > 0)
    return Rollout(*(x.to(device) for x in columns))


def differentiate(policy: Policy, model: nn.Module, rollout: Rollout) -> Tensor:
    """Score and differentiate by a model with the policy's weights; `grad` of these stays as it is.

    Returns:
        The log-probabilities [N, T].
    """
    return gradients(policy, model, rollout)[0]


def gradients(policy: Policy, model: nn.Module, rollout: Rollout) -> tuple[Tensor, list[Tensor]]:
    """Do what `differentiate` does; return the gradients of the trainable parameters too."""
    logprobs = score(model, rollout, **policy.ways).logprobs
    parameters = policy.trainable_parameters()
    found = torch.autograd.grad(logprobs.sum(), parameters, materialize_grads=True)
    return logprobs.detach(), list(found)


def seconds_of(work: Callable[[], object]) -> float:
    """Do some work, and return the seconds that it took."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
