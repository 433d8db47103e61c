"""Chooses by rules how a run computes: precision, attention, and how much at once.

Each rule is one sentence, which stands in the text of its setting. Nothing is measured before a run, so that
a run's numbers never depend on how busy the machine is.

In bfloat16 a copy of the weights is sampled, scored and differentiated. The weights that the optimiser
changes stay in float32, since most updates are smaller than bfloat16 can add to a weight. The copy is
refreshed once after each update, so that sampling and training see the same policy, and no weight is
converted in a forward pass. Micikevicius et al. 2018, "Mixed Precision Training", sec. 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.copies import sharing_copy
from tokenrl.language.policy.loading import LARGE
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.agreement import check_model
from tokenrl.language.rollout.head import head_of
from tokenrl.language.rollout.passes import Copies, Passes
from tokenrl.language.rollout.scoring import USUAL, Regime

SHORT = 128
"""On a CPU, the updates of a large model compute attention by the plain formula with completions of at most
so many tokens."""
ON_CPU = 250_000
"""Overhead of a pass on a CPU in tokens, times the square root of the number of parameters.

Forward and backward passes of Llamas of .14, .6, 1.1 and 6.3 M parameters, on one thread, took as long to start
as 436, 178, 173 and 79 tokens took to compute. 160,000 over the root is near all four, and the rest is a margin."""
ON_DEVICES = 1000 * ON_CPU
"""The same on other devices, which compute far more tokens while a pass starts; an estimate, not a measurement."""
UNREAD = "sdpa_with_unread_masks"
"""The name under which transformers holds `sdpa` with masks that are applied without a look at them."""
ACTIVATIONS = 4 * 2**30
"""Bytes that the activations of a pass may take, where its size is left open."""
FLOAT32 = 4
"""Bytes of a number; states in bfloat16 count as if they had as many."""
PRECISIONS = {"no": "precision of the weights", "bf16": "bfloat16 (weights float32)"}
"""What a pass is computed in, in words, by the value of mixed_precision."""
NUMBERS = 34
"""Numbers that a layer keeps for each token and hidden unit until the backward pass, as a Llama does."""


@dataclass(frozen=True, kw_only=True)
class Forward(Passes):
    """How a policy is computed, with a gradient and without.

    Attributes:
        policy: the policy that is sampled and scored, in bfloat16 a copy of the one that is trained; `model`
            shares its weights.
        regime: how completions are sampled and scored.
        reference_regime: how completions are scored under the reference; a teacher may have its own.
    """

    policy: Policy
    regime: Regime = USUAL
    reference_regime: Regime = USUAL

    @property
    def ref_head(self) -> nn.Module:
        """What makes the logits of the reference from its states: its head, or nothing where these are logits."""
        if self.reference_regime.tokens_at_once is None:
            return nn.Identity()
        return head_of(self.policy.reference or self.policy.model) or nn.Identity()

    def keeps_ref_states(self, mask: Tensor) -> bool:
        """Return whether the pass that scores the reference keeps its states for the update, for a closed form.

        They stay on the device and take N x T x H numbers, like the hidden states of a critic, or N x T x V
        where no head can be taken apart. If these are more than activations may take, each micro-batch computes
        its own states once more.

        Args:
            mask: the mask of the completions [N, T].
        """
        shape = shape_of(self.policy)
        width = getattr(self.ref_head, "in_features", shape.vocab_size)
        return mask.numel() * width * FLOAT32 <= ACTIVATIONS


def choose_passes(args: Any, model: nn.Module) -> tuple[Passes, dict[str, Any]]:
    """Choose how the updates of a model are computed that is no policy, such as a reward model.

    Args:
        args: the settings of the run, in which those about computing may be open.
        model: the model, on the device where it will run.

    Returns:
        What computes, and the settings about computing by name.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    precision, reason = choose_precision(args, weights, size, device)
    sizes, line = _sizes(args, model)
    copies: Copies = ()
    if precision == "bf16":
        model, copies = half_model(model)
    words = f"{PRECISIONS[precision]} ({reason}), {line}"
    passes = Passes(model=model, copies=copies, words=words, **sizes)
    return passes, {"mixed_precision": precision} | sizes


def choose_forward(
    args: Any,
    policy: Policy,
    accelerator: Any = None,
    *,
    length: int,
    hidden: bool = False,
    turns: bool = False,
) -> tuple[Forward, dict[str, Any]]:
    """Choose how a run computes, and check that it samples and scores this model rightly.

    Args:
        args: the settings of the run, in which those about computing may be open.
        policy: the policy, on the device where it will run.
        accelerator: accelerate's handle of the processes; None in a run of a single process.
        length: the most tokens of a completion.
        hidden: whether hidden states are needed.
        turns: whether episodes of several turns are sampled.

    Returns:
        What computes, and the settings about computing by name.

    Raises:
        Refused: the model cannot be sampled and scored, or has no attention of the kind that is asked for.
    """
    device = policy.device
    precision, reason = choose_precision(args, policy.trainable_parameters(), policy.size, device)
    attention = _attention(args, policy.size, device, length)
    sizes, line = _sizes(args, policy.model)
    policy = with_unread_masks(policy)

    model = policy.model
    if attention == "eager":
        try:
            model = with_attention(model, "eager")
        except Refused:
            if args.training_attention:
                raise
            attention = "as_loaded"
    suffix = " without cuDNN's kernel" if device.type == "cuda" else ""
    if precision == "bf16" and device.type == "cpu":
        # The fused kernels take eight times as long for a single token as the plain formula.
        policy = replace(policy, model=model)
        suffix = " in sampling too"
    # Before any rounding, because bfloat16 can leave little of a gradient.
    regime = check_model(policy, model, hidden=hidden, turns=turns, accelerator=accelerator)
    copies: Copies = ()
    if precision == "bf16":
        policy, copies = half_copy(policy)
        model = policy.model
        if attention == "eager":
            model = with_attention(model, "eager")
    kind = attention.replace("_", " ")
    words = f"{PRECISIONS[precision]} ({reason}), attention {kind}{suffix}, {line}"
    settings = {"mixed_precision": precision, "training_attention": attention} | sizes
    forward = Forward(
        policy=policy,
        model=model,
        regime=regime,
        reference_regime=regime,
        copies=copies,
        words=words,
        **sizes,
    )
    return forward, settings


def choose_precision(
    args: Any, weights: Sequence[nn.Parameter], size: int, device: torch.device
) -> tuple[str, str]:
    """Return `bf16` for a bfloat16 copy of the weights or else `no`, and the reason.

    Args:
        args: the settings of the run.
        weights: the weights that are trained.
        size: the number of the model's parameters.
        device: where it runs.
    """
    if all(p.dtype != torch.float32 for p in weights):
        return "no", "weights are not float32"
    if args.mixed_precision is not None:
        return args.mixed_precision, "as set"
    if device.type != "cpu":
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
            return "bf16", "a GPU with bfloat16"
        return "no", "a GPU without bfloat16"
    if size < LARGE:
        return "no", f"on a CPU, fewer than {LARGE // 10**6} M parameters"
    # torch 2.10 does not name them.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return "bf16", "a CPU that multiplies in bfloat16"
    return "no", "a CPU without bfloat16"


def _attention(
    args: Any, size: int, device: torch.device, length: int
) -> Literal["as_loaded", "eager"]:
    """Return the attention of updates: on a CPU the kernels' gradients are slow for short completions."""
    if args.training_attention is not None:
        return args.training_attention
    suits = size >= LARGE and length <= SHORT
    return "eager" if device.type == "cpu" and suits else "as_loaded"


def _sizes(args: Any, model: Any) -> tuple[dict[str, int], str]:
    """Return the settings about the size of passes, by name, and their words for the header."""
    overhead = ON_CPU if model.device.type == "cpu" else ON_DEVICES
    overhead = args.pass_overhead or math.ceil(overhead / math.sqrt(model.num_parameters()))
    tokens = args.tokens_per_pass or _tokens(model)
    words = f"up to {tokens:,} tokens in a pass, divided by length where a pass saves {overhead:,}"
    return {"tokens_per_pass": tokens, "pass_overhead": overhead}, words


def _tokens(model: Any) -> int:
    """Return how many tokens have activations of about `ACTIVATIONS` bytes in all."""
    shape = model.config.get_text_config()
    layers = getattr(shape, "num_hidden_layers", None)
    hidden = getattr(shape, "hidden_size", None)
    if not layers or not hidden:
        raise Refused(
            "The configuration names no num_hidden_layers and hidden_size: give tokens_per_pass."
        )
    size = next(model.parameters()).element_size()
    return max(1, ACTIVATIONS // (NUMBERS * size * layers * hidden))


def shape_of(policy: Policy) -> Any:
    """Return the sizes of the model's layers, as its configuration names them."""
    config: Any = policy.model.config
    return config.get_text_config()


def half_copy(policy: Policy) -> tuple[Policy, Copies]:
    """Return the policy with bfloat16 weights (see `half_model`), and the trained weights with their copies.

    A reference that is held apart becomes bfloat16 too.
    """
    model, copies = half_model(policy.model)
    if policy.reference is not None:
        for p in _halved(policy.reference):
            p.data = p.data.to(torch.bfloat16)
    return replace(policy, model=model), copies


def half_model(model: nn.Module) -> tuple[nn.Module, Copies]:
    """Return a copy of the model with bfloat16 weights, and the trained weights with their copies.

    Buffers, such as the frequencies of rotary positions, and weights that have to keep another precision are
    shared. Frozen weights, such as the base of an adapter, are kept once: the original becomes bfloat16 too.
    """
    pairs = [
        (p, nn.Parameter(p.detach().to(torch.bfloat16), p.requires_grad)) for p in _halved(model)
    ]
    half_model = sharing_copy(model, {id(p): half for p, half in pairs})
    for original, half in pairs:
        if not half.requires_grad:
            original.data = half.data
    return half_model, [pair for pair in pairs if pair[0].requires_grad]


def with_attention(model: nn.Module, implementation: str) -> nn.Module:
    """Return the same model, with the same weights, and another implementation of attention.

    Args:
        model: the model.
        implementation: a name that transformers has, such as `eager` for the plain formula.

    Raises:
        Refused: the model has no such attention.
    """
    twin = sharing_copy(model, {})
    try:
        twin.set_attn_implementation(implementation)
    except Exception as error:  # code of any architecture
        problem = (
            f"The attention {implementation!r} does not work with this model ({describe(error)})"
        )
        raise Refused(f"{problem}. Give training_attention='as_loaded'.") from error
    return twin  # type: ignore[no-any-return]


def with_unread_masks(policy: Policy) -> Policy:
    """Return the policy with an attention that does not read its masks; on a CPU the policy as it is.

    With `sdpa` transformers looks in each forward pass whether the mask hides anything, and so waits for the
    device. Where a model does not take this attention, it keeps its own.
    """
    loaded = getattr(policy.model.config, "_attn_implementation", None)
    if policy.device.type == "cpu" or loaded != "sdpa":
        return policy
    try:
        _register_unread_masks()
        changed = replace(policy, model=with_attention(policy.model, UNREAD))
        check_model(changed, gradient=False)
    except (Refused, ImportError):  # another release of transformers may have no such names
        return policy
    if policy.reference is not None:  # a teacher may be of another kind than the policy
        alone = replace(policy, model=policy.reference, reference=None)
        changed.reference = with_unread_masks(alone).model
    return changed


def _register_unread_masks() -> None:
    """Let transformers know an attention whose mask is left out only where none is given."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def applied_mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
        if attention_mask is not None:
            options["allow_is_causal_skip"] = False
        return sdpa_mask(attention_mask=attention_mask, **options)  # type: ignore[no-any-return]

    AttentionInterface.register(UNREAD, sdpa_attention_forward)
    AttentionMaskInterface.register(UNREAD, applied_mask)


def _halved(model: nn.Module) -> list[nn.Parameter]:
    """Return the float32 weights, but for those that transformers keeps in float32 in any precision."""
    exact: set[str] = set()
    for module in model.modules():
        exact.update(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    weights = []
    for name, weight in model.named_parameters():
        if weight.dtype == torch.float32 and exact.isdisjoint(name.split(".")):
            weights.append(weight)
    return weights
