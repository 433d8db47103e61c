"""Chooses whether a run computes by compiled code: where a measurement says that it is paid back in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tokenrl.language.rollout.ahead import COARSE, TOLERANCES
from tokenrl.language.rollout.compiled import CompiledStep, compiled_part, weighted
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.layers import CompiledLayers
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import encode
from tokenrl.language.rollout.streams import uniforms
from tokenrl.language.training.forward import SMALL, gradients, seconds_of
from tokenrl.language.training.update import Learner
from tokenrl.language.training.warm_start import cache_directory

SAVED = 0.25
"""Share of the time of sampling, or of updates, that compiled code saves, before it is measured."""
LOADING = 4.0
"""Seconds that it takes to load code that was compiled before; most are imports of torch's compiler."""
COMPILING, MODULE = 8.0, 0.35
"""Seconds more that it takes to compile sampling, and those for each module with weights, of which adapters
have many more; measured on two processors."""
TRAINING = 20.0
"""The same for a layer in updates: once for prompts, once for completions."""
WORTH = 2.0
"""The saving must be this many times what it costs, because completions may become shorter."""
LEAST = 20
"""Steps below which nothing is timed, for that takes as long as a step."""
MARGIN = 1.1
"""Once it is made, the code must be faster by this factor to be kept."""
ROUNDS = 3
"""How often both ways are timed, in turn."""


def settle_compilation(learner: Learner, prompts: Sequence[Mapping[str, Any]]) -> None:
    """Choose `compile_sampling` and `compile_training` where they are left open, and compile.

    The choice is written into the learner's settings, generator and forward passes, and into
    `policy.remarks`.

    Args:
        learner: the learner, whose weights and gradients stay as they are.
        prompts: all training prompts, of which as many as a step has are sampled from.

    Raises:
        Refused: a prompt does not fit into the model's context.
        Stopped: the model's logits are not finite.
    """
    work = _Work(learner, prompts)
    fast = _compiled_sampling(learner, work)
    if fast is not None:
        learner.generator = fast
    layers = _compiled_training(learner, work)
    learner.forward.layers = layers
    learner.args = replace(
        learner.args, compile_sampling=fast is not None, compile_training=layers is not None
    )


class _Work:
    """Sampling and training as in a step of the run."""

    def __init__(self, learner: Learner, prompts: Sequence[Mapping[str, Any]]) -> None:
        self._learner, self.sampling = learner, learner.sampling
        self._texts = [row["prompt"] for row in prompts[: learner.args.prompts_per_step]]
        self._sampled: Rollout | None = None

    @cached_property
    def ids(self) -> list[list[int]]:
        """The prompts of this process."""
        count = self._learner.args.prompts_per_step // self._learner.accelerator.num_processes
        return encode(self._learner.forward.policy, self._texts[:count], self.sampling)

    def sample(self, generator: Any) -> Rollout:
        """Sample a step's completions."""
        draws = uniforms("probe", self.sampling, range(len(self.ids)))
        found: Rollout = generator.generate(self.ids, self.sampling, draws)
        self._sampled = found
        return found

    @cached_property
    def rows(self) -> Rollout:
        """Completions that are differentiated at once."""
        rollout = self._sampled or self.sample(self._learner.generator)
        size = self._learner.args.micro_batch_size
        return rollout.rows(torch.arange(len(rollout.mask), device=rollout.mask.device)[:size])

    @property
    def shares(self) -> float:
        """How many times as much is differentiated in a step."""
        return len(self.ids) * self.sampling.group_size / len(self.rows.mask)

    def gradients(self, layers: CompiledLayers | None) -> tuple[Tensor, list[Tensor]]:
        """Return log-probabilities [M] and the gradient of their sum."""
        forward = self._learner.forward
        with nullcontext() if layers is None else layers.inside():
            logprobs, found = gradients(forward.policy, forward.model, self.rows)
        return logprobs[self.rows.mask], found


def _compiled_sampling(learner: Learner, work: _Work) -> TransformersGenerator | None:
    """Return a generator that samples by compiled code; None where it is not wanted or does not pay."""
    args, plain = learner.args, learner.generator
    if not isinstance(plain, TransformersGenerator) or args.estimator.needs_values:
        return None
    if not _wanted(args.compile_sampling, learner):
        return None
    step = CompiledStep(cache_directory() / "compiled")
    fast = replace(plain, step=step)
    model: Any = learner.forward.policy.model
    making = COMPILING + MODULE * weighted(compiled_part(model))
    sample = partial(work.sample, fast)
    if not (args.compile_sampling or _pays(sample, 1, step, making, learner)):
        return None
    step.making = True
    sample()
    ways = (lambda: work.sample(plain), sample)
    taken = _is_taken("compiled sampling", "a step's completions", step, ways, learner, args.compile_sampling)
    return fast if taken else None


def _compiled_training(learner: Learner, work: _Work) -> CompiledLayers | None:
    """Return compiled code for the layers in updates; None where it is not wanted or does not pay."""
    args = learner.args
    if not _wanted(args.compile_training, learner):
        return None
    layers = CompiledLayers(learner.forward.model, cache_directory() / "compiled")
    times = work.shares * args.num_iterations
    quick = partial(work.gradients, layers)
    if not (args.compile_training or _pays(quick, times, layers, TRAINING, learner)):
        return None
    layers.making = True
    found = quick()
    layers.making = False
    if not layers.failure and not layers.made:
        layers.failure = "no layer keeps keys and values of all tokens, and nothing else"
    if not layers.failure:
        layers.failure = _wrong(found, work.gradients(None))
    ways = (lambda: work.gradients(None), quick)
    taken = _is_taken("compiled training", "a gradient", layers, ways, learner, args.compile_training)
    return layers if taken else None


def _wanted(asked: bool | None, learner: Learner) -> bool:
    """Whether code is asked for, or a measurement makes sense: clocks of several processes would disagree."""
    if asked is not None:
        return asked
    alone = learner.accelerator.num_processes == 1 and learner.policy.device.type == "cpu"
    args = learner.args
    return alone and learner.policy.size >= SMALL and args.max_steps >= LEAST and not args.check


def _pays(
    way: Callable[[], object],
    times: float,
    code: CompiledStep | CompiledLayers,
    each: float,
    learner: Learner,
) -> bool:
    """Whether the run computes for so long that compiling will be paid back.

    Args:
        way: the work, for which code is not yet made.
        times: how often a step does it.
        code: the code.
        each: seconds that it takes to make a piece of code.
        learner: the learner.
    """
    spent = times * seconds_of(way)
    missing = sum(path is None or not path.is_file() for path in code.wanted.values())
    cost = LOADING + each * missing
    return bool(code.wanted) and SAVED * spent * learner.args.max_steps >= WORTH * cost


def _wrong(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> str:
    """Say what is wrong with log-probabilities and gradients; nothing if they are near enough."""
    (mine, back), (logprobs, gradient) = found, expected
    limit = TOLERANCES.get(gradient[0].dtype, COARSE)
    off = (_squares([mine - logprobs]) / max(_squares([logprobs - logprobs.mean()]), 1e-30)) ** 0.5
    if not off <= limit:
        return f"its log-probabilities are off by {off:.2g} of their size"
    apart = _squares(x - y for x, y in zip(back, gradient, strict=True))
    off = (apart / max(_squares(gradient), 1e-30)) ** 0.5
    return "" if off <= limit else f"its gradients are off by {off:.2g} of their size"


def _squares(tensors: Iterable[Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in tensors)


def _is_taken(
    name: str,
    what: str,
    code: CompiledStep | CompiledLayers,
    ways: tuple[Callable[[], object], Callable[[], object]],
    learner: Learner,
    asked: bool | None,
) -> bool:
    """Return whether compiled code is taken, and say why in `policy.remarks`.

    Args:
        name: of the remark.
        what: is timed.
        code: the compiled code.
        ways: the work as it is, and by the code.
        learner: the learner.
        asked: whether it was asked for.
    """
    if code.failure:
        if asked:
            learner.policy.remarks[name] = f"none ({code.failure})"
        return False
    if asked:
        learner.policy.remarks[name] = "as set"
        return True
    pairs = [[seconds_of(way) for way in ways] for _ in range(ROUNDS)]
    slow, quick = (min(times) for times in zip(*pairs, strict=True))
    found = f"measured: {what} in {quick:.2g} s, {slow:.2g} s without it; ready after {code.seconds:.2g} s"
    learner.policy.remarks[name] = found
    return slow >= MARGIN * quick
