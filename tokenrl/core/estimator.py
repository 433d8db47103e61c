"""The estimator: one point on independent axes. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from tokenrl.core import axes, bias, validation
from tokenrl.core.choices import choice_of
from tokenrl.core.presets import PRESETS
from tokenrl.settings import Bounds, Count, Natural, NonNegative, Positive, Settings, arguments, check_choice

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class Advantages(NamedTuple):
    """What multiplies the scores, and what a critic should learn."""

    policy: Tensor
    """[N] if all actions of a row share one, else [N, T]; 0 in rows that teach nothing."""
    returns: Tensor
    """[N, T] what is paid from each position on, with what is added to the reward: a critic's targets."""


@dataclass(frozen=True)
class Estimator(Settings):
    """How returns become a gradient. The defaults are RLOO, unbiased, with the KL in the reward."""

    baseline: axes.BaselineOrFunction = "rloo"
    """What is subtracted from the return; rloo is the mean of the other completions of the prompt.

    From Python also a function f(totals, group_size=..., mask=..., valid=...) that returns [N] or [N, T]."""
    baseline_constant: float = 0.0
    """The value subtracted by the baseline 'constant'."""
    running_mean_decay: Annotated[float, Bounds(at_least=0, below=1)] | None = 0.9
    """Memory of the baseline 'running_mean', a step; None for the plain mean of all returns so far."""
    running_mean_init: float = 0.0
    """The value of the running mean before the first step."""
    leave_one_out: bool = True
    """Leave the row out of 'opo', 'optimal', 'timestep_mean'; the papers do not, at the price of a bias."""
    optimal_form: axes.OptimalForm = "sequence"
    """What 'optimal' weighs by: |S|^2 of the row, |s_t|^2 of the token, or its sum so far."""
    shrinkage_weight: Annotated[float, Bounds(at_least=0, at_most=1)] | None = None
    """Weight of the own prompt in 'shrinkage'; None to estimate it from the other prompts."""
    scale: axes.Scale = "none"
    """What the advantage is divided by. Standard deviations that contain the row itself bias the gradient."""
    scale_ddof: Literal[0, 1] = 1
    """1 divides the sum of squares by n - 1, 0 by n."""
    scale_eps: NonNegative = 1e-4
    """Added to the standard deviation, outside the root."""
    aggregation: axes.Aggregation = "sequence_sum"
    """How tokens count; sequence_sum is the mean over sequences of their token sums, the unbiased choice."""
    ratio: axes.Ratio = "none"
    """Importance ratio against the policy that sampled; token is PPO's clipped ratio."""
    epsilon: Annotated[float, Bounds(above=0, at_most=1)] = 0.2
    """How far below 1 the ratio may fall before it is clipped, and above too unless epsilon_high is set."""
    epsilon_high: Positive | None = None
    """How far above 1 the ratio may rise; None for epsilon."""
    dual_clip: Annotated[float, Bounds(above=1)] | None = None
    """Bound of the ratio where the advantage is negative, for 'token' and 'sequence_mean'; None for none."""
    importance_cap: Annotated[float, Bounds(at_least=1)] | None = None
    """Weigh tokens by trainer over sampler probability, at most this; None to take the two for equal."""
    beta: NonNegative = 0.0
    """Weight of the KL to the reference policy; with 0 no reference is needed."""
    kl_estimator: axes.KlEstimator = "k1"
    """k1 is the log ratio, k2 half its square, k3 never negative; full_path is the exact one in the loss."""
    kl_placement: axes.KlPlacement = "reward"
    """Subtract the KL from the reward (exact with k1), or add it to the loss (exact with full_path)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus in the loss."""
    entropy_form: axes.EntropyForm = "per_step"
    """per_step is the usual bonus, blind to what an action does to later entropy; sequence is not."""
    returns: axes.Returns = "total"
    """Pay each action the whole return, the reward to go, its next rewards only, or GAE's mixed return."""
    window: Count = 16
    """How many steps of reward an action is paid with 'blame_window', its own included."""
    lam: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.95
    """Weight of what was really earned against the value, a step, with 'gae'."""
    gamma: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """Discount a step; below 1 the gradient is no longer that of the undiscounted return."""
    zero_spread: axes.ZeroSpread = "keep"
    """What becomes of groups of equal rewards; kept, they count in the divisor. See `core.rows`."""
    truncations: axes.Truncations = "keep"
    """What becomes of completions cut off at the maximum length: mask their gradient, or drop them whole."""
    overlong_buffer: Natural = 0
    """Tokens before the maximum length over which the reward falls by up to 1."""
    value_clip: Positive | None = None
    """How far a value may move from the old one before the critic's loss stops pulling; None for any."""

    def __post_init__(self) -> None:
        """Refuse names that are unknown, numbers out of range, and choices that exclude each other."""
        super().__post_init__()
        validation.check(self)

    @classmethod
    def preset(cls, name: str, **overrides: object) -> Estimator:
        """Make the estimator of a named preset, with some fields changed.

        `tokenrl.core.presets.PRESETS[name].note` says which formula it is and where other toolkits differ.

        Args:
            name: One of `PRESETS`: reinforce, rloo, grpo, ppo and so on.
            **overrides: Fields to set differently.

        Raises:
            Refused: For a preset, a field or a value that does not exist.
        """
        check_choice("preset", name, PRESETS)
        return arguments(cls, PRESETS[name].fields | overrides)

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

    def _facts(self, name: str) -> list[object]:
        """Look up what the table of choices says of the three axes that make the advantages."""
        return [
            getattr(choice_of(axis, getattr(self, axis)), name) for axis in ("baseline", "scale", "returns")
        ]

    @property
    def needs_groups(self) -> bool:
        """Whether several completions of each prompt are compared."""
        return "group" in self._facts("compares") or self.zero_spread != "keep"

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
    def needs_values(self) -> bool:
        """Whether a critic's values are needed."""
        return "values" in self._facts("needs")

    @property
    def needs_greedy(self) -> bool:
        """Whether the reward of each prompt's greedy completion is needed."""
        return "greedy_rewards" in self._facts("needs")

    @property
    def needs_score_norms(self) -> bool:
        """Whether the squared norm of each token's score is needed."""
        return "score_norms" in self._facts("needs")

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
        """Whether rows of zero advantage still have a gradient, from a KL or an entropy in the loss."""
        return (self.needs_kl and self.kl_placement == "loss") or self.needs_entropy

    @property
    def clip_range(self) -> tuple[float, float]:
        """Between which values the ratio is left alone: `1 - epsilon` and `1 + epsilon_high`."""
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
        """Turn the rewards of a whole step into advantages.

        What is added to the reward enters first (a penalty on long rows, `bootstrap`, a KL placed there),
        then returns, baseline, scale. Means and standard deviations over rows are made of the rows' total
        returns, also with reward_to_go. Inputs that the chosen axes do not need are not looked at.

        Args:
            rewards: Raw, one a row or one a position; at positions where the mask is 0 they count too.
            mask: 1 where the token is an action of the policy.
            group_size: Consecutive rows a prompt; None if rows have no prompts in common.
            valid: False where a row abstains: it counts in no mean, std or divisor, its advantage is 0, and
                its reward may be nan. A row left without any other valid row to compare with gets 0 too.
            logprobs: Of the policy that sampled, for a KL in the reward.
            ref_logprobs: Of the reference, for a KL in the reward.
            values: Of the state before each action, for the baseline 'value' and the returns 'gae'.
            bootstrap: The value of the state after the last action, 0 where the row terminated. It stands in
                for rewards that were cut off, so the gradient is as good as this value.
            greedy_rewards: Of the greedy completion of each row's prompt, for the baseline 'remax'.
            score_norms: |grad log pi|^2 of each token, for the baseline 'optimal'.
            baseline_value: The running mean, as it was before this step.
            max_length: The largest number of actions a row may have, for overlong_buffer.

        Raises:
            Refused: When the estimator needs an input that is missing, or rows do not fall into groups.
        """
        from tokenrl.core.advantages import compute
        from tokenrl.core.inputs import Inputs

        inputs = Inputs(
            *(rewards, mask, group_size, valid, logprobs, ref_logprobs, values, bootstrap),
            *(greedy_rewards, score_norms, baseline_value, max_length),
        )
        return Advantages(*compute(self, inputs))

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

        valid = mask.new_ones(mask.shape[0]).bool() if valid is None else valid.bool()
        return objectives.token_weights(mask, valid, aggregation=self.aggregation, max_length=max_length)

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

        The sum is plain, so slices of a step add up to the step; a row must be whole, for some terms look
        along it. Where mask or weight is 0, every input may hold anything, nan included. Only `logprobs` and
        `entropy` carry a gradient. Inputs that the chosen axes do not need are not looked at:
        `old_logprobs`, of the policy that sampled as the trainer computes them, are for a ratio;
        `sampling_logprobs`, the same as the sampler reported them, for importance_cap.

        Raises:
            Refused: When the estimator needs an input that is missing.
        """
        from tokenrl.core import objectives

        return objectives.loss(
            self, logprobs, advantages, weights, mask, old_logprobs, sampling_logprobs, ref_logprobs, entropy
        )

    def critic_loss(
        self,
        values: Float[Tensor, "N T"],
        returns: Float[Tensor, "N T"],
        weights: Float[Tensor, "N T"],
        *,
        old_values: Float[Tensor, "N T"] | None = None,
    ) -> Float[Tensor, ""]:
        """Sum `w (V - G)^2 / 2`, a plain weighted sum like `loss`; `old_values` are for value_clip.

        Raises:
            Refused: When value_clip is set and the old values are missing.
        """
        from tokenrl.core import objectives

        return objectives.squared_error(values, returns, weights, old_values=old_values, clip=self.value_clip)
