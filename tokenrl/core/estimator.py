"""Defines `Estimator`: how rewards become a gradient, one choice on each axis. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from tokenrl import settings
from tokenrl.core import choices
from tokenrl.core.bias import declared
from tokenrl.core.choices import KL_EFFECTS, choice_of
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction
from tokenrl.settings import Bounds, Count, Natural, NonNegative, Number, Positive, Settings

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


IN_UNITS_OF_THE_EPISODE = ("none", "constant", "value", "timestep_mean", "episode_mean")
"""Baselines that do not use the total returns of rows, or that learn the same numbers as are credited."""


class Advantages(NamedTuple):
    """What multiplies the scores, and the targets of a critic."""

    policy: Tensor
    """Advantages: [N] if all actions of a row share one, else [N, T]; 0 in rows without a gradient."""
    returns: Tensor
    """The return from each position on [N, T], with what is added to the rewards: a critic's targets."""


@dataclass(frozen=True)
class Estimator(Settings):
    """How rewards become a gradient. The defaults are RLOO, which is unbiased, with any KL in the reward."""

    baseline: choices.BaselineOrFunction = "rloo"
    """What is subtracted from the return; rloo is the mean of the other completions of the prompt.

    Also a function f(totals, group_size=..., mask=..., valid=...) that returns [N] or [N, T], by its name
    module:function or path/to/file.py:function; from Python the function itself too."""
    baseline_constant: Number = 0.0
    """The value subtracted by the baseline 'constant'."""
    running_mean_decay: Annotated[float, Bounds(at_least=0, below=1)] | None = 0.9
    """Decay per step of the baseline 'running_mean'; None for the plain mean of all returns so far."""
    running_mean_init: Number = 0.0
    """The value of the running mean before the first step."""
    leave_one_out: bool = True
    """Leave the row itself out of 'opo', 'optimal' and 'timestep_mean'. The papers include it: a bias."""
    optimal_form: choices.OptimalForm = "sequence"
    """What 'optimal' weights by: the row's |S|^2, the token's |s_t|^2, or the sum of |s_t|^2 so far."""
    shrinkage_weight: Annotated[float, Bounds(at_least=0, at_most=1)] | None = None
    """Weight of the prompt's own mean in 'shrinkage'; None to estimate it from the other prompts."""
    scale: choices.Scale = "none"
    """What the advantage is divided by. Standard deviations that contain the row itself bias the gradient."""
    scale_ddof: Literal[0, 1] = 1
    """1 divides the sum of squares by n - 1, 0 by n."""
    scale_eps: NonNegative = 1e-4
    """Added to the standard deviation, outside the root."""
    aggregation: choices.Aggregation = "sequence_sum"
    """How tokens are averaged; sequence_sum, the mean over sequences of their token sums, is unbiased."""
    ratio: choices.Ratio = "none"
    """Importance ratio of the policy to the one that sampled; token is PPO's clipped ratio."""
    epsilon: Annotated[float, Bounds(above=0, at_most=1)] = 0.2
    """The ratio is clipped below 1 - epsilon, and above 1 + epsilon unless epsilon_high is set."""
    epsilon_high: Positive | None = None
    """The ratio is clipped above 1 + epsilon_high; None for epsilon."""
    dual_clip: Annotated[float, Bounds(above=1, at_most=settings.LARGEST)] | None = None
    """Bound of the ratio where the advantage is negative, for 'token' and 'sequence_mean'; None for none."""
    importance_cap: Annotated[float, Bounds(at_least=1, at_most=settings.LARGEST)] | None = None
    """Weight tokens by trainer / sampler probability, at most this; None assumes that the two are equal.

    Where they differ, it takes away about a third of the bias; mend the difference."""
    beta: NonNegative = 0.0
    """Weight of the KL divergence from the reference policy; 0 needs no reference."""
    kl_estimator: choices.KlEstimator = "k1"
    """k1 is the log ratio, k2 half its square, k3 is never negative; full_path is exact in the loss."""
    kl_placement: choices.KlPlacement = "reward"
    """Subtract the KL from the reward (exact with k1), or add it to the loss (exact with full_path)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus in the loss."""
    entropy_form: choices.EntropyForm = "per_step"
    """per_step, the usual bonus, ignores the effect of an action on later entropy; sequence includes it."""
    returns: choices.Returns = "total"
    """Credit each action with the whole return, the reward to go (also normalised over its episode), its next
    rewards, or GAE's return."""
    window: Count = 16
    """Steps of reward that 'blame_window' credits to an action, its own step included."""
    lam: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.95
    """GAE's lambda: 1 uses observed rewards only, 0 one reward and the value of the next state."""
    gamma: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """Discount per step; below 1 the gradient is no longer that of the undiscounted return."""
    zero_spread: choices.ZeroSpread = "keep"
    """Keep groups of equal rewards (they count in the divisor), drop them, or refill with new prompts."""
    truncations: choices.Truncations = "keep"
    """Keep completions cut off at the maximum length, mask their gradient, or drop them entirely."""
    overlong_buffer: Natural = 0
    """Number of tokens before the maximum length over which the reward falls linearly by up to 1."""
    value_clip: Positive | None = None
    """How far a value may move from the old one before the critic's loss is clipped; None for no clip."""

    def __post_init__(self) -> None:
        """Refuse unknown names, numbers out of range, and choices that exclude each other."""
        if type(self.baseline) is str and ":" in self.baseline:
            object.__setattr__(self, "baseline", NamedFunction(self.baseline))
        super().__post_init__()
        self._check_combinations()

    @classmethod
    def preset(cls, name: str, **overrides: object) -> Estimator:
        """Return the estimator of a named preset, with some fields changed.

        `recipes/pages/estimators.md` has the formula of each, and how other toolkits differ.

        Args:
            name: One of `PRESETS`: reinforce, rloo, grpo, ppo and so on.
            **overrides: Fields to set to other values.

        Raises:
            Refused: For a preset, a field or a value that does not exist.
        """
        settings.check_choice("preset", name, PRESETS)
        return settings.arguments(cls, PRESETS[name].fields | overrides)

    def _check_combinations(self) -> None:
        """Refuse choices that exclude each other."""
        place, kind = self.kl_placement, self.kl_estimator
        if self.needs_kl and (place, kind) not in KL_EFFECTS:
            raise Refused(
                f"kl_estimator {kind!r} is exact in the loss, but kl_placement is {place!r}. Set "
                "kl_placement 'loss', or take kl_estimator 'k1', which is exact in the reward."
            )
        for axis in self.within_rows:
            if axis != "returns" and self.returns == "total":
                raise Refused(
                    f"{getattr(self, axis)!r} compares the steps of one row, which with returns 'total' all "
                    f"have the same return. Set returns 'reward_to_go', or choose another {axis}."
                )
        of_totals = not callable(self.baseline) and self.baseline not in IN_UNITS_OF_THE_EPISODE
        if self.returns == "episode_normalized" and of_totals:
            raise Refused(
                f"returns 'episode_normalized' and the baseline {self.baseline!r}, made of whole returns, "
                "are in other units. Choose the baseline 'none' or 'value', or returns 'reward_to_go'."
            )
        if self.scale in ("loo_std", "other_groups_std") and self.scale_eps == 0:
            raise Refused(
                f"scale {self.scale!r} with scale_eps 0 divides by 0 where other rows have equal rewards. "
                "Give a scale_eps above 0; its preset has 0.1."
            )

    @property
    def bias_status(self) -> str:
        """The bias of the expected gradient of the first on-policy update, a word of `FROM_BEST_TO_WORST`."""
        return declared(self).status

    @property
    def bias_reason(self) -> str:
        """Why `bias_status` holds; if biased, the objective that is ascended instead, if there is one."""
        return declared(self).reason

    @property
    def reference(self) -> str:
        """The paper of the preset that has exactly these fields, or an empty string."""
        return next((p.paper for name, p in PRESETS.items() if type(self).preset(name) == self), "")

    def _facts(self, name: str) -> dict[str, object]:
        """Look up one column of the table of choices for the three axes that make the advantages."""
        three = ("returns", "baseline", "scale")
        return {axis: getattr(choice_of(axis, getattr(self, axis)), name) for axis in three}

    @property
    def within_rows(self) -> list[str]:
        """The axes, of returns, baseline and scale, on which the steps of one row are compared."""
        return [axis for axis, compares in self._facts("compares").items() if compares == "row"]

    @property
    def subtracts_baseline(self) -> bool:
        """Whether a baseline of any kind is subtracted.

        A constant of 0 is not a baseline. Nor are the returns 'gae' by themselves: they mix values into the
        return and subtract none. The scale 'token_whiten' is one, because it subtracts the mean over the
        step, and so are the returns 'episode_normalized', which subtract the mean over the episode.
        """
        if self.scale == "token_whiten" or self.returns == "episode_normalized":
            return True
        return self.baseline_constant != 0 if self.baseline == "constant" else self.baseline != "none"

    @property
    def needs_groups(self) -> bool:
        """Whether several completions of each prompt are compared."""
        return "group" in self._facts("compares").values() or self.zero_spread != "keep"

    @property
    def needs_kl(self) -> bool:
        """Whether a KL divergence from a reference policy is used anywhere."""
        return self.beta > 0

    needs_reference = needs_kl

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss needs the entropy of each step."""
        return self.entropy_coef > 0

    @property
    def needs_values(self) -> bool:
        """Whether a critic's values are needed."""
        return "values" in self._facts("needs").values()

    @property
    def needs_greedy(self) -> bool:
        """Whether the reward of each prompt's greedy completion is needed."""
        return "greedy_rewards" in self._facts("needs").values()

    @property
    def needs_score_norms(self) -> bool:
        """Whether the squared norm of each token's score is needed."""
        return "score_norms" in self._facts("needs").values()

    @property
    def needs_sampling_logprobs(self) -> bool:
        """Whether the loss needs the logprobs that the sampler itself reported."""
        return self.importance_cap is not None

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the loss needs the logprobs of the policy that sampled."""
        return self.ratio != "none"

    @property
    def loss_side_terms(self) -> bool:
        """Whether rows of advantage 0 still have a gradient, from a KL or an entropy term in the loss."""
        return (self.needs_kl and self.kl_placement == "loss") or self.needs_entropy

    @property
    def clip_range(self) -> tuple[float, float]:
        """The bounds beyond which the ratio is clipped: `1 - epsilon` and `1 + epsilon_high`."""
        return 1.0 - self.epsilon, 1.0 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)

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
        max_length: int | None = None,
    ) -> Advantages:
        """Compute the advantages of a whole step, `A = (G - b) / (std + eps)`.

        What is added to the rewards comes first (the overlong penalty, `bootstrap`, a KL in the reward), then
        returns, baseline and scale. Means and standard deviations over rows use the rows' total returns, also
        with the returns 'reward_to_go'. Inputs that the chosen axes do not need are ignored.

        Args:
            rewards: One per row [N], or one per position [N, T], which counts also where the mask is 0.
            mask: 1 where the token is an action of the policy [N, T].
            group_size: Number of consecutive rows per prompt; None if rows do not share prompts.
            valid: False where a row abstains [N]: it counts in no mean, std or divisor, its advantage is 0,
                and its reward may be nan. A valid row without another valid row to compare with gets 0 too.
            logprobs: Log-probabilities under the policy that sampled [N, T], for a KL in the reward.
            ref_logprobs: Log-probabilities under the reference [N, T], for a KL in the reward.
            values: Value of the state before each action [N, T], for the baseline 'value' and for 'gae'.
            bootstrap: Value of the state after the last action [N], 0 where the row terminated. It replaces
                the rewards that were cut off, so an error in it biases the gradient.
            greedy_rewards: Reward of the greedy completion of each row's prompt [N], for 'remax'.
            score_norms: |grad log pi|^2 of each token [N, T], for the baseline 'optimal'.
            baseline_value: The running mean as it was before this step, for 'running_mean'.
            max_length: The largest number of actions that a row may have, for overlong_buffer.

        Raises:
            Refused: When the estimator needs an input that is missing, or rows do not fall into groups.
            ValueError: When rewards and mask do not fit together.
        """
        from tokenrl.core.advantages import compute

        inputs = {
            "logprobs": logprobs,
            "ref_logprobs": ref_logprobs,
            "values": values,
            "bootstrap": bootstrap,
            "greedy_rewards": greedy_rewards,
            "score_norms": score_norms,
            "baseline_value": baseline_value,
            "max_length": max_length,
        }
        return Advantages(*compute(self, rewards, mask, group_size, valid, inputs))

    def token_weights(
        self,
        mask: Float[Tensor, "N T"] | Bool[Tensor, "N T"],
        *,
        max_length: int | None,
        valid: Bool[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "N T"]:
        """Return the weight of every token of the step [N, T]; see `losses.token_weights`.

        Raises:
            Refused: When the aggregation is 'fixed_length' and no length is given.
        """
        from tokenrl.core import losses

        valid = mask.new_ones(mask.shape[0]).bool() if valid is None else valid.bool()
        return losses.token_weights(mask, valid, aggregation=self.aggregation, max_length=max_length)

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
        """Return the loss, `-sum w (gain - beta KL + entropy_coef H)`, over a step or any slice of its rows.

        The weights already divide by the whole step, so the losses of slices add up to that of the step. A
        row must not be split, because some terms sum over it. Where the mask or the weight is 0, the other
        inputs may hold anything, also nan, and so may inputs that the chosen axes do not need. Only
        `logprobs` and `entropy` carry a gradient.

        Args:
            logprobs: Log-probabilities of the tokens under the policy being trained [N, T].
            advantages: `Advantages.policy` of these rows [N] or [N, T].
            weights: `token_weights` of these rows [N, T].
            mask: 1 where the token is an action that is learnt from [N, T].
            old_logprobs: Log-probabilities under the policy that sampled, computed by the trainer [N, T]; for
                a ratio.
            sampling_logprobs: The same, as the sampler reported them [N, T]; for importance_cap.
            ref_logprobs: Log-probabilities under the reference policy [N, T]; for a KL in the loss.
            entropy: Entropy of the policy at each token, in nats [N, T]; for the entropy bonus.

        Raises:
            ValueError: When the shapes of logprobs, weights and mask differ.
            Refused: When the estimator needs an input that is missing.
        """
        from tokenrl.core import losses

        inputs = {
            "old_logprobs": old_logprobs,
            "sampling_logprobs": sampling_logprobs,
            "ref_logprobs": ref_logprobs,
            "entropy": entropy,
        }
        return losses.loss(self, logprobs, advantages, weights, mask, inputs)

    def critic_loss(
        self,
        values: Float[Tensor, "N T"],
        returns: Float[Tensor, "N T"],
        weights: Float[Tensor, "N T"],
        *,
        old_values: Float[Tensor, "N T"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the critic's loss, `sum w (V - G)^2 / 2`, over some rows; see `losses.squared_error`."""
        from tokenrl.core import losses

        return losses.squared_error(values, returns, weights, old_values=old_values, clip=self.value_clip)
