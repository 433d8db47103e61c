"""Defines `Estimator`: how rewards become a gradient, one choice on each axis.

Its methods compute with tensors and import torch when they are called, so that this module imports none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from tokenrl import settings
from tokenrl.core.axes import Axes
from tokenrl.core.bias import declared
from tokenrl.core.off_policy import declared_off_policy
from tokenrl.core.presets import PRESETS, Fields, read_changes
from tokenrl.core.refusals import check_axes, check_sizes
from tokenrl.errors import Refused

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from tokenrl.core.rows import Advantages, LossTerms, Mask


@dataclass(frozen=True)
class Estimator(Axes):
    """How rewards become a gradient. The defaults are RLOO, which is unbiased, with any KL in the reward."""

    def __post_init__(self) -> None:
        """Refuse unknown names, numbers out of range, and choices that exclude each other."""
        super().__post_init__()
        check_axes(self)

    @classmethod
    def preset(cls, name: str, **overrides: object) -> Estimator:
        """Return the estimator of a named preset, with some fields changed.

        `recipes/pages/explain/estimators.md` has the formula of each, and how other toolkits differ.

        Args:
            name: One of `PRESETS`: reinforce, rloo, grpo, ppo and so on; capitals, hyphens and underscores do
                not matter. Or a function that is the baseline, such as `mine.py:baseline`. Changes may follow
                (`grpo,scale=none`) or stand alone, as changes of the default estimator.
            **overrides: Fields to set to other values.

        Raises:
            Refused: For a preset, a field or a value that does not exist.
        """
        try:
            head, changes = read_changes(name) if isinstance(name, str) else (name, {})
        except Refused as error:
            raise Refused(f"The estimator {name!r} cannot be used: {error}") from error
        if head == "" or ":" in str(head):
            preset: Fields = {"baseline": head} if head else {}
        else:
            head = settings.same_name(head, PRESETS)
            settings.check_choice("preset", head, PRESETS)
            preset = PRESETS[head].fields
        return settings.arguments(cls, preset | changes | overrides)

    @property
    def preset_name(self) -> str:
        """The name of the first preset with exactly these fields, or 'custom estimator'."""
        names = (name for name, preset in _presets().items() if preset == self)
        return next(names, "custom estimator")

    @property
    def reference(self) -> str:
        """The paper or toolkit of that preset, or an empty string."""
        preset = PRESETS.get(self.preset_name)
        return preset.paper if preset else ""

    @property
    def bias_status(self) -> str:
        """The bias of the expected gradient of the first on-policy update, a word of `FROM_BEST_TO_WORST`."""
        return declared(self).status

    @property
    def bias_reason(self) -> str:
        """Why `bias_status` holds; if one choice decides it, the objective that is ascended instead, if any."""
        return declared(self).reason

    @property
    def off_policy_status(self) -> str:
        """What the expected gradient is if the sampler differs; `off_policy` explains the words."""
        return declared_off_policy(self).status

    @property
    def off_policy_reason(self) -> str:
        """Why `off_policy_status` holds."""
        return declared_off_policy(self).reason

    @property
    def binary_bias_status(self) -> str:
        """The status if every reward is 0 or 1, which may be better than `bias_status`."""
        return declared(self, binary=True).status

    @property
    def reward_bias_status(self) -> str:
        """What the expected gradient is for the mean reward E[R], if the objective is another one."""
        return declared(self, of_reward=True).status

    def advantages(
        self,
        rewards: Float[Tensor, " N *T"],
        mask: Mask,
        *,
        group_size: int | None,
        valid: Bool[Tensor, " N"] | None = None,
        logprobs: Float[Tensor, "N T"] | None = None,
        ref_logprobs: Float[Tensor, "N T"] | None = None,
        values: Float[Tensor, "N T"] | None = None,
        bootstrap: Float[Tensor, " N"] | None = None,
        greedy_rewards: Float[Tensor, " N"] | None = None,
        score_norms: Float[Tensor, "N T"] | None = None,
        sampling_logprobs: Float[Tensor, "N T"] | None = None,
        baseline_value: float | Float[Tensor, " *N"] | None = None,
        components: Float[Tensor, "N K"] | None = None,
        component_weights: Float[Tensor, " K"] | None = None,
        turns: Int[Tensor, "N T"] | None = None,
        max_length: int | None = None,
        present_logprobs: Float[Tensor, "N T"] | None = None,
        entropy: Float[Tensor, "N T"] | None = None,
        data: Mapping[str, Sequence[Any]] | None = None,
    ) -> Advantages:
        """Compute the advantages of a whole step, `A = (G - b) / (std + eps)`.

        What is added to the rewards comes first (the overlong penalty, `bootstrap`, a KL in the reward). Means and
        standard deviations over rows use the rows' total returns, also with the returns 'reward_to_go'. Inputs that
        the chosen axes do not need are ignored.

        With `turns`, one instant is a turn instead of a token, see `advantages.advantages_in_turns`: gamma, lam,
        `window`, the length of a row and 'token_whiten' then count turns. With returns 'total', gamma 1 and a
        named baseline the actions of a row share its return, and turns are ignored.

        Args:
            rewards: One per row [N], or one per position [N, T], which counts also where the mask is 0.
            mask: 1 where the token is an action of the policy [N, T].
            group_size: Number of consecutive rows per prompt; None if rows do not share prompts.
            valid: False where a row abstains [N]: it counts in no mean, std or divisor, its advantage is 0,
                and its reward may be nan. A valid row without another valid row to compare with gets 0 too.
            logprobs: Log-probabilities under the policy that sampled [N, T], for a KL in the reward and 'target'.
            ref_logprobs: Log-probabilities under the reference [N, T], for a KL in the reward.
            values: Value of the state before each action [N, T], for the baseline 'value' and for 'gae'.
            bootstrap: Value of the state after the last action [N], 0 where the row terminated. It replaces
                the rewards that were cut off, so an error in it biases the gradient.
            greedy_rewards: Reward of the greedy completion of each row's prompt [N], for 'remax'. May be nan in rows
                that abstain.
            score_norms: |grad log pi|^2 of each token [N, T], for the baseline 'optimal'.
            sampling_logprobs: Those under the sampler [N, T], for 'optimal' with importance weights.
            baseline_value: What a baseline's memory holds before this step: one number, or one for each row [N].
            components: The reward of each of K functions, without its weight, nan where it abstained [N, K]. With
                components 'separate' each column has its own baseline and scale, and `rewards` is ignored.
            component_weights: Weights by which the advantages of the functions are added [K]; None for 1.
            turns: Number of the turn of each action, from 0 and in order [N, T]. A reward off the mask belongs to
                the last turn that began before it. The value of a turn is the value at its first token.
            max_length: The largest number of actions that a row may have, for overlong_buffer.
            present_logprobs: Those of the policy as it is now [N, T], in a later update, for the scale 'target'.
            entropy: Entropy of the policy at each token [N, T], for a baseline of your own.
            data: Columns of the data, N entries each, for a baseline of your own.

        Raises:
            Refused: When the estimator needs an input that is missing, or rows do not fall into groups.
            ValueError: When rewards and mask do not fit together.
        """
        from tokenrl.core.advantages import advantages_of

        if rewards.shape not in (mask.shape[:1], mask.shape):
            raise ValueError(f"rewards {[*rewards.shape]} do not fit the mask {[*mask.shape]}")
        check_sizes(self, len(mask), group_size)
        columns = {
            "rewards": rewards,
            "mask": mask.bool(),
            "valid": mask.new_ones(len(mask)).bool() if valid is None else valid.bool(),
            "group_size": group_size,
            "logprobs": logprobs,
            "ref_logprobs": ref_logprobs,
            "values": values,
            "bootstrap": bootstrap,
            "greedy_rewards": greedy_rewards,
            "score_norms": score_norms,
            "sampling_logprobs": sampling_logprobs,
            "baseline_value": baseline_value,
            "components": components,
            "component_weights": component_weights,
            "turns": turns,
            "max_length": max_length,
            "present_logprobs": logprobs if present_logprobs is None else present_logprobs,
            "entropy": entropy,
            "data": data,
        }
        return advantages_of(self, columns)

    def token_weights(
        self,
        mask: Mask,
        *,
        max_length: int | None,
        valid: Bool[Tensor, " N"] | None = None,
        chosen: Bool[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "N T"]:
        """Return the weight of every token of the whole step, by the aggregation.

        The losses of slices add up to the loss of the step; `rows.token_weights` has the formulas.

        Args:
            mask: 1 where the token is an action of the policy [N, T].
            max_length: The largest number of actions that a row may have, for the aggregation 'fixed_length'.
            valid: False where a row counts nowhere [N]; None if all rows count.
            chosen: False where a row does not belong to the update [N]; None for an update of the whole step.

        Raises:
            Refused: When the aggregation is 'fixed_length' and no length is given.
        """
        from tokenrl.core.rows import token_weights

        return token_weights(
            mask, aggregation=self.aggregation, max_length=max_length, valid=valid, chosen=chosen
        )

    def loss(
        self,
        logprobs: Float[Tensor, "N T"],
        advantages: Float[Tensor, " N *T"],
        weights: Float[Tensor, "N T"],
        mask: Mask,
        *,
        old_logprobs: Float[Tensor, "N T"] | None = None,
        sampling_logprobs: Float[Tensor, "N T"] | None = None,
        ref_logprobs: Float[Tensor, "N T"] | None = None,
        entropy: Float[Tensor, "N T"] | None = None,
        centres: Float[Tensor, "N T"] | None = None,
        token_kl: Float[Tensor, "N T"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss, `-sum w (gain - beta KL + entropy_coef H)`, over a step or any slice of its rows.

        The weights already divide by the whole step, so the losses of slices add up to the loss of the step.
        A row must not be split, because some terms sum over it. Where the mask or the weight is 0, the other
        inputs may hold anything, also nan, and so may inputs that the chosen axes do not need. Only `logprobs`,
        `entropy`, `centres` and `token_kl` carry a gradient.

        Args:
            logprobs: Log-probabilities of the tokens under the policy being trained [N, T].
            advantages: `Advantages.policy` of these rows [N] or [N, T].
            weights: `token_weights` of these rows [N, T].
            mask: 1 where the token is an action that is learnt from [N, T].
            old_logprobs: Log-probabilities under the policy that sampled, by the trainer [N, T]; for a ratio.
            sampling_logprobs: The same, as the sampler reported them [N, T]; for importance weights.
            ref_logprobs: Log-probabilities under the reference policy [N, T]; for a KL in the loss.
            entropy: Entropy of the policy at each token, in nats [N, T]; for the entropy bonus.
            centres: `Estimator.score_centres` at the prefix of each token [N, T]; for importance_centre.
            token_kl: KL(pi || ref) at the prefix of each token, in nats [N, T]; for closed forms of the KL.

        Raises:
            ValueError: When the shapes of logprobs, weights and mask differ.
            Refused: When the estimator needs an input that is missing.
        """
        from tokenrl.core.rows import required, zero_outside

        if not logprobs.shape == weights.shape == mask.shape:
            raise ValueError(f"shapes differ: {logprobs.shape=}, {weights.shape=}, {mask.shape=}")
        live = mask.bool() & (weights != 0)

        def inside(name: str, x: Tensor | None, purpose: str) -> Tensor:
            return zero_outside(required(name, x, purpose), live)

        # Tokens that do not count may hold anything, also nan, so they are set to 0 before any arithmetic.
        logprobs = zero_outside(logprobs, live)
        advantages = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None]
        advantages = zero_outside(advantages.expand(live.shape), live)
        old = logprobs.detach()  # on-policy: the ratio is 1, and its gradient is the score
        is_weighted = self.importance != "none"
        if self.ratio != "none" or (is_weighted and old_logprobs is not None):
            old = inside("old_logprobs", old_logprobs, f"the ratio {self.ratio!r}").detach()
        columns = {
            "logprobs": logprobs,
            "old_logprobs": old,
            "advantages": advantages,
            "live": live,
        }
        gain: Tensor = self.computed("losses.policy_gain", columns)
        if is_weighted:
            purpose = f"importance {self.importance!r}"
            columns["log_weights"] = old - inside("sampling_logprobs", sampling_logprobs, purpose)
            gain = gain * self.computed("losses.importance_weights", columns)
        if self.importance_centre:
            gain = gain - advantages * inside("centres", centres, "importance_centre")
        if self.kl_in_loss:
            reference = inside("ref_logprobs", ref_logprobs, "a KL in the loss")
            columns["ref_logprobs"] = reference.detach()
            if "token_kl" in self.needs:
                columns["token_kl"] = inside("token_kl", token_kl, "a closed form")
            formula = self.chosen("kl").formula
            kl = self.computed(formula, columns) if formula else columns["token_kl"]
            if self.kl_baseline != "none":
                # In value 0; its gradient is a baseline of each token's log ratio (vOPD, arXiv 2605.07865).
                kl = kl - columns["token_kl"].detach() * (logprobs - logprobs.detach())
            # After the importance weight, which corrects the policy's gain and does not apply to the KL.
            gain = gain - self.beta * kl
        if self.entropy_coef:
            gain = gain + self.entropy_coef * inside("entropy", entropy, "an entropy bonus")
        return -(zero_outside(weights, live) * gain).sum()  # minus: optimisers descend

    def beyond_bounds(
        self,
        logprobs: Float[Tensor, "N T"],
        old_logprobs: Float[Tensor, "N T"],
        advantages: Float[Tensor, " N *T"],
    ) -> Bool[Tensor, "N T"]:
        """Return True for the tokens that the ratio 'trust' drops, or whose ratio is outside its clip range."""
        if self.ratio == "trust":
            columns = {
                "logprobs": logprobs,
                "old_logprobs": old_logprobs,
                "advantages": advantages if advantages.ndim == 2 else advantages[:, None],
            }
            dropped: Tensor = self.computed("losses.beyond_trust", columns)
            return dropped
        low, high = self.clip_range
        ratio = (logprobs.detach() - old_logprobs.detach()).exp()
        return (ratio > high) | (ratio < low)

    def score_centres(
        self, logprobs: Float[Tensor, "*N V"], sampling_logprobs: Float[Tensor, "*N V"]
    ) -> Float[Tensor, " *N"]:
        """Return the weighted mean score of a token under the sampler; see `losses.score_centres`."""
        from tokenrl.core.losses import score_centres

        bounds = None if self.importance == "none" else self.importance_range
        masks = self.importance_bound == "mask"
        return score_centres(logprobs, sampling_logprobs, bounds, masks=masks)

    def critic_loss(
        self,
        values: Float[Tensor, "N T"],
        returns: Float[Tensor, "N T"],
        weights: Float[Tensor, "N T"],
        *,
        old_values: Float[Tensor, "N T"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the critic's loss `sum w (V - G)^2 / 2` over some rows; see `losses.critic_loss`."""
        from tokenrl.core.losses import critic_loss

        return critic_loss(
            values, returns, weights, value_clip=self.value_clip, old_values=old_values
        )

    def loss_terms(
        self,
        rewards: Float[Tensor, " N *T"],
        mask: Mask,
        *,
        group_size: int | None,
        max_length: int,
        valid: Bool[Tensor, " N"] | None = None,
        truncated: Bool[Tensor, " N"] | None = None,
        turn_rewards: Float[Tensor, "N T"] | None = None,
        **inputs: Any,
    ) -> LossTerms:
        """Return the advantages, weights and mask of a step, without the rows and tokens that do not count.

        Args:
            rewards: As given to `advantages` [N] or [N, T].
            mask: 1 where the token is an action of the policy [N, T].
            group_size: Number of consecutive rows per prompt; None if rows do not share prompts.
            max_length: The largest number of actions that a row may have.
            valid: False where a row abstains [N].
            truncated: True where a row was cut off at the maximum length [N].
            turn_rewards: The rewards in time [N, T], whose sums are `rewards` [N]; None if not known.
            **inputs: Further arguments of `advantages`.
        """
        from tokenrl.core.rows import LossTerms, keep

        in_divisor, in_gradient = keep(
            rewards,
            mask,
            masks_truncated=self.truncations == "mask",
            skips_equal_groups=self.zero_spread != "keep",
            group_size=group_size,
            valid=valid,
            truncated=truncated,
        )
        sizes: dict[str, Any] = {"group_size": group_size, "max_length": max_length}
        in_time = rewards if turn_rewards is None else turn_rewards
        policy, returns = self.advantages(in_time, mask, valid=valid, **sizes, **inputs)
        weights = self.token_weights(
            in_gradient.to(policy.dtype), max_length=max_length, valid=in_divisor
        )
        return LossTerms(policy, weights, in_gradient, in_divisor, returns)


@cache
def _presets() -> dict[str, Estimator]:
    """Return all presets by name."""
    return {name: Estimator.preset(name) for name in PRESETS}
