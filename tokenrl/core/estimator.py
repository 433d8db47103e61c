"""The estimator: one point on independent axes. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from tokenrl.core import bias, rules
from tokenrl.core.axes import (
    AXES,
    OVER_GROUP,
    Aggregation,
    Baseline,
    EntropyForm,
    KlEstimator,
    KlPlacement,
    Ratio,
    Returns,
    Scale,
    Truncations,
    ZeroSpread,
)
from tokenrl.core.presets import PRESETS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class Advantages(NamedTuple):
    """What multiplies the scores, and what a critic should learn."""

    policy: Tensor
    """[N], or [N, T] with reward_to_go; 0 in rows that teach nothing."""
    returns: Tensor
    """[N, T] rewards-to-go, with a KL that is placed in the reward."""


@dataclass(frozen=True)
class Estimator:
    """How returns become a gradient. The defaults are RLOO, unbiased, with the KL in the reward."""

    baseline: Baseline = "rloo"
    """What is subtracted from the return; rloo is the mean of the other completions of the prompt."""
    baseline_constant: float = 0.0
    """The value subtracted by the baseline 'constant'."""
    running_mean_decay: float | None = 0.9
    """Memory of the baseline 'running_mean', a step; None for the plain mean of all returns so far."""
    running_mean_init: float = 0.0
    """The value of the running mean before the first step."""
    scale: Scale = "none"
    """What the advantage is divided by. Standard deviations that contain the row itself bias the gradient."""
    scale_ddof: int = 1
    """1 divides the sum of squares by n - 1, 0 by n."""
    scale_eps: float = 1e-4
    """Added to the standard deviation, outside the root."""
    aggregation: Aggregation = "sequence_sum"
    """How tokens count; sequence_sum is the mean over sequences of their token sums, the unbiased choice."""
    ratio: Ratio = "none"
    """Importance ratio against the policy that sampled; token is PPO's clipped ratio."""
    epsilon: float = 0.2
    """How far below 1 the ratio may fall before it is clipped, and above too unless epsilon_high is set."""
    epsilon_high: float | None = None
    """How far above 1 the ratio may rise; None for epsilon."""
    beta: float = 0.0
    """Weight of the KL to the reference policy; with 0 no reference is needed."""
    kl_estimator: KlEstimator = "k1"
    """k1 is the log ratio, k2 half its square, k3 never negative and unbiased in value."""
    kl_placement: KlPlacement = "reward"
    """Subtract the KL from the reward (exact with k1), or add it to the loss (not exact with any)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss."""
    entropy_form: EntropyForm = "per_step"
    """per_step is the usual bonus, blind to what an action does to later entropy."""
    returns: Returns = "total"
    """Pay each action the whole return, or only the reward to go."""
    gamma: float = 1.0
    """Discount a step; below 1 the gradient is no longer that of the undiscounted return."""
    zero_spread: ZeroSpread = "keep"
    """What becomes of groups of equal returns; kept, they have no advantage but count in the weights."""
    truncations: Truncations = "keep"
    """What becomes of completions cut off at the maximum length."""

    def __post_init__(self) -> None:
        """Refuse names that are unknown or not built yet, and numbers out of range."""
        for axis, known in AXES.items():
            rules.check_choice(axis, getattr(self, axis), bias.BUILT[axis], later=known)
        rules.check_number("baseline_constant", self.baseline_constant)
        rules.check_number("running_mean_init", self.running_mean_init)
        if self.running_mean_decay is not None:
            rules.check_number("running_mean_decay", self.running_mean_decay, at_least=0.0, below=1.0)
        if self.scale_ddof not in (0, 1):
            raise rules.Refused(f"scale_ddof was given as {self.scale_ddof!r}; it must be 0 or 1.")
        rules.check_number("scale_eps", self.scale_eps, at_least=0.0)
        rules.check_number("epsilon", self.epsilon, above=0.0, at_most=1.0)
        if self.epsilon_high is not None:
            rules.check_number("epsilon_high", self.epsilon_high, above=0.0)
        rules.check_number("beta", self.beta, at_least=0.0)
        rules.check_number("entropy_coef", self.entropy_coef, at_least=0.0)
        rules.check_number("gamma", self.gamma, above=0.0, at_most=1.0)

    @classmethod
    def preset(cls, name: str, **overrides: object) -> Estimator:
        """Make the estimator of a named preset, with some fields changed.

        `tokenrl.core.presets.PRESETS[name].note` says which formula it is and where other toolkits differ.

        Args:
            name: One of reinforce, reinforce_running_mean, rloo, grpo, dr_grpo, ppo_clip.
            **overrides: Fields to set differently.

        Raises:
            Refused: For a preset, a field or a value that does not exist.
        """
        rules.check_choice("preset", name, PRESETS)
        known = [field.name for field in fields(cls)]
        for field in overrides:
            rules.check_choice("estimator field", field, known)
        return cls(**(PRESETS[name].fields | overrides))  # type: ignore[arg-type]

    @property
    def bias_status(self) -> str:
        """One of `bias.FROM_BEST_TO_WORST`, about the expected gradient of the first on-policy update."""
        return bias.declared(self).status

    @property
    def bias_reason(self) -> str:
        """Why the status is what it is; when biased, the objective that ascends instead, if there is one."""
        return bias.declared(self).reason

    @property
    def reference(self) -> str:
        """The paper of the preset that has exactly these fields, or an empty string."""
        return next((p.paper for name, p in PRESETS.items() if type(self).preset(name) == self), "")

    @property
    def needs_groups(self) -> bool:
        """Whether several completions of each prompt are compared."""
        return self.baseline in OVER_GROUP or self.scale in OVER_GROUP

    @property
    def needs_kl(self) -> bool:
        """Whether a KL to a reference policy is used anywhere."""
        return self.beta > 0

    needs_reference = needs_kl

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss needs the entropy of each step."""
        return self.entropy_coef > 0

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the loss needs the logprobs of the policy that sampled."""
        return self.ratio != "none"

    @property
    def loss_side_terms(self) -> bool:
        """Whether rows of zero advantage still have a gradient, from a KL or an entropy in the loss."""
        return (self.needs_kl and self.kl_placement == "loss") or self.needs_entropy

    def advantages(
        self,
        rewards: Float[Tensor, " N *T"],
        mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
        *,
        group_size: int | None,
        valid: Bool[Tensor, " N"] | None = None,
        logprobs: Float[Tensor, "N T"] | None = None,
        ref_logprobs: Float[Tensor, "N T"] | None = None,
        values: Float[Tensor, "N T"] | None = None,
        bootstrap: Float[Tensor, " N"] | None = None,
        greedy_rewards: Float[Tensor, " N"] | None = None,
        score_norms: Float[Tensor, "N T"] | None = None,
        baseline_value: float | Float[Tensor, ""] | None = None,
    ) -> Advantages:
        """Turn the rewards of a whole step into advantages.

        A KL placed in the reward enters first, then returns, baseline, scale. Baseline and scale are made
        of the rows' total returns, also with reward_to_go. Inputs that the chosen axes do not need are not
        looked at.

        Args:
            rewards: Raw, one a row or one a position; at positions where the mask is 0 they count too.
            mask: 1 where the token is an action of the policy.
            group_size: Consecutive rows a prompt; None if rows have no prompts in common.
            valid: False where a row abstains: it counts in no mean, std or divisor, its advantage is 0, and
                its reward may be nan. A row left without any other valid row to compare with gets 0 too.
            logprobs: Of the policy that sampled, for a KL in the reward.
            ref_logprobs: Of the reference, for a KL in the reward.
            values: For the learned baseline, which is not built yet.
            bootstrap: The value of what follows a truncation, not built yet.
            greedy_rewards: For the baseline 'remax', not built yet.
            score_norms: For the baseline 'optimal', not built yet.
            baseline_value: The running mean, as it was before this step.

        Raises:
            Refused: When the estimator needs an input that is missing, or rows do not fall into groups.
        """
        from tokenrl.core import advantages

        if bootstrap is not None:
            raise rules.Refused("bootstrap is not built yet: a return ends where its episode was cut off.")
        policy, returns = advantages.compute(
            self, rewards, mask, group_size, valid, logprobs, ref_logprobs, baseline_value
        )
        return Advantages(policy, returns)

    def token_weights(
        self,
        mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
        *,
        max_length: int | None,
        valid: Bool[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "N T"]:
        """Weigh every token of the whole step; `objectives.token_weights` has the formulas.

        Raises:
            Refused: When the aggregation is fixed_length and no length is given.
        """
        from tokenrl.core import objectives

        if self.aggregation == "fixed_length" and (max_length is None or max_length < 1):
            raise rules.Refused(
                f"'fixed_length' divides by the maximum length, but max_length is {max_length}. Give the "
                "largest number of actions a row may have, or choose 'sequence_sum'."
            )
        valid = mask.new_ones(mask.shape[0]).bool() if valid is None else valid.bool()
        return objectives.token_weights(mask, valid, aggregation=self.aggregation, max_length=max_length or 1)

    def loss(
        self,
        logprobs: Float[Tensor, "N T"],
        advantages: Float[Tensor, " N *T"],
        weights: Float[Tensor, "N T"],
        mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
        *,
        old_logprobs: Float[Tensor, "N T"] | None = None,
        sampling_logprobs: Float[Tensor, "N T"] | None = None,
        ref_logprobs: Float[Tensor, "N T"] | None = None,
        entropy: Float[Tensor, "N T"] | None = None,
    ) -> Float[Tensor, ""]:
        """Sum `-w (gain - beta KL + entropy_coef H)` over the tokens given: a step or any slice of its rows.

        The sum is plain, so slices of a step add up to the step. Where mask or weight is 0, every input may
        hold anything, nan included. Only `logprobs` and `entropy` carry a gradient. Inputs that the chosen
        axes do not need are not looked at; `sampling_logprobs` is one of them for now.

        Raises:
            Refused: When the estimator needs an input that is missing.
        """
        from tokenrl.core import kl, objectives
        from tokenrl.core.masking import zero_outside

        if not logprobs.shape == weights.shape == mask.shape:
            raise ValueError(f"shapes differ: {logprobs.shape=}, {weights.shape=}, {mask.shape=}")
        live = mask.bool() & (weights != 0)
        logprobs = zero_outside(logprobs, live)
        advantages = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None]
        advantages = zero_outside(advantages.expand(live.shape), live)
        if self.ratio == "token":
            old_logprobs = rules.given("old_logprobs", old_logprobs, "the ratio 'token'").detach()
            low, high = self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high
            old_logprobs = zero_outside(old_logprobs, live)
            gain = objectives.clipped(logprobs, old_logprobs, advantages, epsilon=low, epsilon_high=high)
        else:
            gain = objectives.reinforce(logprobs, advantages)
        if self.needs_kl and self.kl_placement == "loss":
            ref_logprobs = rules.given("ref_logprobs", ref_logprobs, "a KL in the loss").detach()
            divergence = kl.PER_TOKEN[self.kl_estimator](logprobs, zero_outside(ref_logprobs, live))
            gain = gain - self.beta * divergence
        if self.needs_entropy:
            entropy = rules.given("entropy", entropy, "an entropy bonus")
            gain = gain + self.entropy_coef * zero_outside(entropy, live)
        return -(zero_outside(weights, live) * gain).sum()

    def critic_loss(
        self, values: Float[Tensor, "N T"], returns: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]
    ) -> Float[Tensor, ""]:
        """Sum `w (V - G)^2 / 2`, a plain weighted sum like `loss`."""
        from tokenrl.core import objectives

        return objectives.squared_error(values, returns, weights)
