"""Chooses whether a run samples by compiled code: where a measurement says that it is paid back in time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenrl.language.rollout.compiled import CompiledStep
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import encode
from tokenrl.language.rollout.streams import uniforms
from tokenrl.language.training.cache import cache_directory
from tokenrl.language.training.update import Learner
from tokenrl.runs.threads import SMALL, using_threads

SAVED = 0.25
"""Share of the time of sampling that compiled code is expected to save, before it is measured."""
COMPILING, LAYER = 12.0, 3.0
"""Seconds that it takes to compile, and those for each layer; measured on two processors."""
LOADING = 4.0
"""Seconds that it takes to load code that was compiled before; most are imports of torch's compiler."""
WORTH = 2.0
"""The saving must be this many times what it costs, because completions may become shorter."""
MARGIN = 1.1
"""Once it is made, the code must be faster by this factor to be kept."""
ROUNDS = 3
"""How often both ways are timed, in turn."""


def settle_compilation(learner: Learner, prompts: Sequence[Mapping[str, Any]]) -> None:
    """Choose `compile_sampling` where it is left open, and compile.

    The choice is written into the learner's settings and generator, and into `policy.remarks`.

    Args:
        learner: the learner, whose weights stay as they are.
        prompts: all training prompts, of which as many as a step has are sampled from.

    Raises:
        Refused: a prompt does not fit into the model's context.
        Stopped: the model's logits are not finite.
    """
    fast = _compiled(learner, prompts)
    if fast is not None:
        learner.generator = fast
    learner.args = replace(learner.args, compile_sampling=fast is not None)


def _compiled(learner: Learner, prompts: Sequence[Mapping[str, Any]]) -> TransformersGenerator | None:
    """Return a generator that samples by compiled code; None where it is not wanted or does not pay."""
    args, plain = learner.args, learner.generator
    if not isinstance(plain, TransformersGenerator) or args.estimator.needs_values:
        return None
    asked = args.compile_sampling
    if asked is False or not (asked or _may_pay(learner)):
        return None
    work = _Work(learner, prompts)
    step = CompiledStep(cache_directory() / "compiled")
    if not (asked or _is_long_enough(learner, work, step)):
        return None
    fast = replace(plain, step=step)
    work.sample(fast)
    remark, taken = _judged(work, plain, fast, step, asked=bool(asked))
    if remark:
        learner.policy.remarks["compiled sampling"] = remark
    return fast if taken else None


class _Work:
    """Sampling as in a step of the run."""

    def __init__(self, learner: Learner, prompts: Sequence[Mapping[str, Any]]) -> None:
        count = learner.args.prompts_per_step // learner.accelerator.num_processes
        self.sampling = learner.sampling
        texts = [row["prompt"] for row in prompts[:count]]
        self.ids = encode(learner.forward.policy, texts, self.sampling)
        self.draws = uniforms("probe", self.sampling, range(len(texts)))

    def sample(self, generator: TransformersGenerator) -> Rollout:
        return generator.generate(self.ids, self.sampling, self.draws)

    def seconds(self, generator: TransformersGenerator) -> float:
        began = time.perf_counter()
        self.sample(generator)
        return time.perf_counter() - began


def _may_pay(learner: Learner) -> bool:
    """Whether a measurement makes sense at all: clocks of several processes would disagree."""
    alone = learner.accelerator.num_processes == 1 and learner.policy.device.type == "cpu"
    return alone and learner.policy.size >= SMALL and not learner.args.check


def _is_long_enough(learner: Learner, work: _Work, step: CompiledStep) -> bool:
    """Whether the run samples for so long that compiling will be paid back."""
    plain: Any = learner.generator
    padded = len({len(ids) for ids in work.ids}) > 1
    layers = learner.policy.model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    with using_threads(plain.threads):  # the code is made for a number of threads
        kept = step.is_kept(learner.forward.policy.model, padded)
    cost = LOADING if kept else COMPILING + LAYER * layers
    return SAVED * work.seconds(plain) * learner.args.max_steps >= WORTH * cost


def _judged(
    work: _Work, plain: TransformersGenerator, fast: TransformersGenerator, step: CompiledStep, *, asked: bool
) -> tuple[str, bool]:
    """Return what there is to say of the compiled code, and whether it is taken."""
    if step.failure:
        return (f"none ({step.failure})" if asked else ""), False
    if asked:
        return "as set", True
    pairs = [(work.seconds(plain), work.seconds(fast)) for _ in range(ROUNDS)]
    slow, quick = (min(times) for times in zip(*pairs, strict=True))
    found = f"measured: a step's completions in {quick:.2g} s, {slow:.2g} s as they are; ready after"
    found += f" {step.seconds:.2g} s"
    return found, slow >= MARGIN * quick
