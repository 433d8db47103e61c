"""Chooses by rules how a run computes: precision, attention, compiled code, and how much at once.

Each rule is one sentence, which stands in the text of its setting. Nothing is measured before a run, so that
a run's numbers never depend on how busy the machine is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.agreement import agree
from tokenrl.language.rollout.compiled import CompiledStep
from tokenrl.language.rollout.scoring import Scoring
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.precision import HalfCopy, with_eager_attention

LAYERS, PARAMETERS, STEPS = 8, 1_000_000, 100
"""Sampling is compiled by itself for at most so many layers, and at least so many parameters and steps."""
LARGE, SHORT = 10_000_000, 256
"""On a CPU, updates of a model of at least so many parameters, with completions of at most so many tokens,
compute attention by its plain formula."""
ACTIVATIONS = 4 * 2**30
"""Bytes that the activations of a pass may take, where its size is left open."""
NUMBERS = 34
"""Numbers that a layer keeps for each token and hidden unit until the backward pass, as a Llama does."""


@dataclass(frozen=True)
class Forward:
    """How forward passes are computed.

    Attributes:
        policy: what is sampled and scored.
        model: what gradients flow through; it has the weights of `policy.model`.
        scoring: how completions are scored.
        half: the bfloat16 copy that both belong to; None in float32.
        compiled: compiled code for sampling; None for the model as it is.
        words: the choices and their reasons in a line, for the run's header.
    """

    policy: Policy
    model: nn.Module
    scoring: Scoring
    half: HalfCopy | None = None
    compiled: CompiledStep | None = None
    words: str = ""

    def refresh(self) -> None:
        """Compute with the weights that an update has left."""
        if self.half is not None:
            self.half.refresh()

    def hand_over(self) -> None:
        """Give the policy's weights the gradients of a backward pass; in float32 they have them already."""
        if self.half is not None:
            self.half.hand_over()

    def average_gradients(self, accelerator: Any) -> None:
        """Average the gradients over processes; in float32 accelerate has done so."""
        if self.half is not None:
            self.half.average_gradients(accelerator)


def choose_forward(args: TrainSettings, policy: Policy, accelerator: Any) -> tuple[Forward, TrainSettings]:
    """Choose how a run computes, and check that it samples and scores this model rightly.

    Args:
        args: the settings, in which some of those may be left open.
        policy: the policy, on the device where it will run.
        accelerator: accelerate's handle of device and processes.

    Returns:
        What computes, and the settings with what was left open filled in.

    Raises:
        Refused: the model cannot be sampled and scored, or has no attention of the kind that is asked for.
    """
    precision, why = _precision(args, policy, accelerator)
    compiles, because = _compiles(args, policy, accelerator)
    attention, tokens = _attention(args, policy, accelerator), args.tokens_per_pass or _tokens(policy)
    half = HalfCopy(policy) if precision == "bf16" else None
    acting = policy if half is None else half.policy
    model = acting.model
    if attention == "eager":
        try:
            model = with_eager_attention(model)
        except Refused:
            if args.training_attention:
                raise
            attention = "as_loaded"
    if half is not None:
        half.adopt_frozen()
    code = CompiledStep() if compiles else None
    scoring = agree(acting, model, hidden=args.estimator.needs_values, compiled=code, accelerator=accelerator)
    if code is not None and code.failure:
        because, code = code.failure, None
    words = (
        f"{'bfloat16 (weights float32)' if half else 'precision of the weights'} ({why}), "
        f"attention {attention.replace('_', ' ')}, sampling {'' if code else 'not '}compiled ({because}), "
        f"up to {tokens:,} tokens in a pass"
    )
    settled: dict[str, Any] = {"mixed_precision": precision, "training_attention": attention}
    settled["tokens_per_pass"] = tokens
    return Forward(acting, model, scoring, half, code, words), replace(args, **settled)


def _precision(args: TrainSettings, policy: Policy, accelerator: Any) -> tuple[str, str]:
    """Return `bf16` for a bfloat16 copy of the weights or else `no`, and why."""
    if all(p.dtype != torch.float32 for p in policy.trainable_parameters()):
        return "no", "weights are not float32"
    if args.mixed_precision is not None:
        return args.mixed_precision, "as set"
    on_gpu = accelerator.device.type != "cpu"
    if on_gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "bf16", "a GPU with bfloat16"
    return "no", "no GPU with bfloat16"


def _attention(args: TrainSettings, policy: Policy, accelerator: Any) -> Literal["as_loaded", "eager"]:
    """Return the attention of updates: fused kernels for CPUs are slow where rows share a prompt."""
    if args.training_attention is not None:
        return args.training_attention
    short = args.max_completion_length <= SHORT
    large = policy.size >= LARGE
    return "eager" if accelerator.device.type == "cpu" and large and short else "as_loaded"


def _compiles(args: TrainSettings, policy: Policy, accelerator: Any) -> tuple[bool, str]:
    """Return whether sampling is compiled, and why."""
    if args.compile != "auto":
        return args.compile == "on", "as set"
    layers = getattr(_shape(policy), "num_hidden_layers", None) or LAYERS + 1
    for fits, why in (
        (not args.estimator.needs_values, "a critic reads hidden states"),
        (accelerator.device.type == "cpu" and accelerator.num_processes == 1, "not one process on a CPU"),
        (layers <= LAYERS, f"more than {LAYERS} layers"),
        (policy.size >= PARAMETERS, f"fewer than {PARAMETERS // 10**6} M parameters"),
        (args.max_steps >= STEPS and not args.check, f"fewer than {STEPS} steps"),
    ):
        if not fits:
            return False, why
    return True, f"at most {LAYERS} layers"


def _tokens(policy: Policy) -> int:
    """Return how many tokens have activations of about `ACTIVATIONS` bytes in all."""
    shape = _shape(policy)
    layers, hidden = getattr(shape, "num_hidden_layers", None), getattr(shape, "hidden_size", None)
    if not layers or not hidden:
        raise Refused(
            "The model's configuration does not name num_hidden_layers and hidden_size, from which the "
            "number of tokens in a pass follows. Give tokens_per_pass."
        )
    size = next(policy.model.parameters()).element_size()
    return max(1, ACTIVATIONS // (NUMBERS * size * layers * hidden))


def _shape(policy: Policy) -> Any:
    config: Any = policy.model.config
    return config.get_text_config()
