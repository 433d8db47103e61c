"""Defines `Estimator`: how rewards become a gradient, one choice on each axis. Imports no torch.

Its four methods that compute with tensors are functions of the modules `advantages` and `losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import MethodType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from tokenrl import settings
from tokenrl.core import choices
from tokenrl.core.bias import declared
from tokenrl.core.choices import KL_EFFECTS, choice_of
from tokenrl.core.off_policy import check_importance, declared_off_policy
from tokenrl.core.presets import PRESETS, Fields, read_changes
from tokenrl.core.targets import OBJECTIVES, Objective, ObjectiveForm, check_objective
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction
from tokenrl.settings import Bounds, Count, Natural, NonNegative, Number, Positive, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from tokenrl.core.advantages import advantages
    from tokenrl.core.losses import critic_loss, loss, token_weights


IN_UNITS_OF_THE_EPISODE = ("none", "constant", "value", "timestep_mean", "episode_mean")
"""Baselines that do not use the total returns of rows, or that learn the returns of actions."""


class Advantages(NamedTuple):
    """What multiplies the scores, and the targets of a critic."""

    policy: Tensor
    """Advantages: [N] if all actions of a row share one, else [N, T]; 0 in rows without a gradient."""
    returns: Tensor
    """The return from each position on [N, T], with what is added to the rewards: a critic's targets."""


class TorchMethod:
    """A method that is a function of another module, which imports torch and is imported at the first use."""

    def __init__(self, module: str) -> None:
        """Take the function from this module; it has the name of the method."""
        self.module = module

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn the name of the method."""
        self.name = name

    def __get__(self, estimator: object | None, owner: type) -> Callable[..., Any]:
        """Return the function, bound to the estimator."""
        function = getattr(import_module(self.module), self.name)
        return function if estimator is None else MethodType(function, estimator)


@dataclass(frozen=True)
class Estimator(Settings):
    """How rewards become a gradient. The defaults are RLOO, which is unbiased, with any KL in the reward."""

    baseline: choices.BaselineOrFunction = "rloo"
    """What is subtracted from the return; rloo is the mean of the other completions of the prompt.

    Also a function f(totals, group_size=..., mask=..., valid=...) that returns [N] or [N, T], by its name
    module:function or path/to/file.py:function; from Python the function itself too. If it takes an argument
    `rewards`, it gets these [N, T] too. A class with the methods `read` and `update` is a baseline with a
    memory, see `recipes/pages/estimators.md`."""
    baseline_constant: Number = 0.0
    """The value subtracted by the baseline 'constant'."""
    running_mean_decay: Annotated[float, Bounds(at_least=0, below=1)] | None = 0.9
    """Decay per step of the baseline 'running_mean'; None for the plain mean of all returns so far."""
    running_mean_init: Number = 0.0
    """The value of the running mean before the first step."""
    tracker_decay: Annotated[float, Bounds(at_least=0, below=1)] = 0.875
    """The baseline 'tracker' multiplies a prompt's two counts by this before it adds the prompt's rewards."""
    baseline_quantile: Annotated[float, Bounds(above=0, at_most=1)] = 0.5
    """The baseline 'quantile' is the least return that this share of the other rows do not exceed."""
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
    trust_bound: Annotated[float, Bounds(above=0, at_most=1)] = 0.15
    """The ratio 'trust' drops tokens whose probability has moved by more than this since it was sampled."""
    trust_sides: Literal[1, 2] = 1
    """1 drops a token only if it moved in the direction of its advantage (DPPO), 2 drops it either way."""
    trust_cap: Annotated[float, Bounds(at_least=1, at_most=settings.LARGEST)] = 20.0
    """Bound of the ratio by which 'trust' weights the tokens that it keeps."""
    importance: choices.Importance = "none"
    """Weight completions by the policy's probability over the sampler's: of each token, of the whole sequence
    (exact without bounds, and noisy), or its geometric mean; none assumes that the two are equal."""
    importance_bound: choices.ImportanceBound = "truncate"
    """Move weights beyond importance_cap and importance_floor to that bound, or mask them: set them to 0."""
    importance_cap: Annotated[float, Bounds(at_least=1, at_most=settings.LARGEST)] | None = None
    """The largest importance weight; None for no bound."""
    importance_floor: Annotated[float, Bounds(above=0, at_most=1)] | None = None
    """The smallest importance weight; None for no bound."""
    importance_centre: bool = False
    """Subtract from each token's score its mean over the sampler's vocabulary at that prefix. Without weights
    the gradient is then that of the sampler's own expected reward, up to a factor."""
    beta: NonNegative = 0.0
    """Weight of the KL divergence from the reference policy; 0 needs no reference."""
    kl_estimator: choices.KlEstimator = "k1"
    """k1 is the log ratio, k2 half its square, k3 is never negative; full_path is exact in the loss."""
    kl_placement: choices.KlPlacement = "reward"
    """Subtract the KL from the reward (exact with k1), or add it to the loss (exact with full_path)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus in the loss, a bias: an action's effect on later entropy is ignored."""
    returns: choices.Returns = "total"
    """Credit each action with the whole return, the reward to go (also normalised over its episode), its next
    rewards, or GAE's return."""
    window: Count = 16
    """Steps of reward that 'blame_window' credits to an action, its own step included."""
    lam: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.95
    """GAE's lambda: 1 uses observed rewards only, 0 one reward and the value of the next state."""
    gamma: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """Discount per step; below 1 the gradient is no longer that of the undiscounted return."""
    components: choices.Components = "summed"
    """Add the rewards of all functions first, or give each its own baseline and scale, and add advantages."""
    zero_spread: choices.ZeroSpread = "keep"
    """Keep groups of equal rewards (they count in the divisor), drop them, or refill with new prompts."""
    truncations: choices.Truncations = "keep"
    """Keep completions cut off at the maximum length, or mask their gradient."""
    overlong_buffer: Natural = 0
    """Number of tokens before the maximum length over which the reward falls linearly by up to 1."""
    value_clip: Positive | None = None
    """How far a value may move from the old one before the critic's loss is clipped; None for no clip."""
    objective: Objective = "reward"
    """What is ascended: the mean reward, the best of k completions (pass@k), or the log of success."""
    objective_order: Count | None = None
    """k of 'max_at_k', below the number of completions per prompt."""
    objective_form: ObjectiveForm = "default"
    """The estimate of that gradient; default is leave_one_out for 'max_at_k' and maxrl for 'log_success'."""

    def __post_init__(self) -> None:
        """Refuse unknown names, numbers out of range, and choices that exclude each other."""
        super().__post_init__()
        self._check_combinations()

    @classmethod
    def preset(cls, name: str, **overrides: object) -> Estimator:
        """Return the estimator of a named preset, with some fields changed.

        `recipes/pages/estimators.md` has the formula of each, and how other toolkits differ.

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

    def _check_combinations(self) -> None:
        """Refuse choices that exclude each other."""
        placement, kl = self.kl_placement, self.kl_estimator
        if self.needs_kl and (placement, kl) not in KL_EFFECTS:
            raise Refused(
                f"kl_estimator {kl!r} is exact in the loss, but kl_placement is {placement!r}. Set "
                "kl_placement 'loss', or take kl_estimator 'k1', which is exact in the reward."
            )
        for axis in self.within_rows:
            if self.components == "separate" or (axis != "returns" and self.returns == "total"):
                raise Refused(
                    f"{getattr(self, axis)!r} compares the steps of one row, which with returns 'total' or "
                    "components 'separate' all have the same return. Set returns 'reward_to_go' and "
                    f"components 'summed', or choose another {axis}."
                )
        of_totals = not callable(self.baseline) and self.baseline not in IN_UNITS_OF_THE_EPISODE
        if self.returns == "episode_normalized" and of_totals:
            raise Refused(
                f"returns 'episode_normalized' and the baseline {self.baseline!r}, made of whole returns, "
                "are in other units. Choose the baseline 'none' or 'value', or returns 'reward_to_go'."
            )
        check_importance(self)
        if self.scale in ("loo_std", "other_groups_std") and self.scale_eps == 0:
            raise Refused(
                f"scale {self.scale!r} with scale_eps 0 divides by 0 where other rows have equal rewards. "
                "Give a scale_eps above 0; its preset has 0.1."
            )
        check_objective(self)

        added = self.overlong_buffer or (self.needs_kl and placement == "reward")
        of_rewards = {*self._column("needs").values()} <= {"", "score_norms"}
        if self.components == "separate" and (added or not of_rewards):
            raise Refused(
                "With components 'separate' the advantages of a reward function are made of its own rewards "
                "in the step. Choose a baseline of these, such as 'rloo' or 'group_mean', returns other than "
                "'gae', overlong_buffer 0, and for a KL the kl_placement 'loss'."
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

    @property
    def form(self) -> str:
        """The form of the objective, with its default filled in."""
        forms = (form for name, form in OBJECTIVES if name == self.objective)
        return next(forms) if self.objective_form == "default" else self.objective_form

    @property
    def fewest_rows(self) -> int:
        """The number of rows of a group without which the objective gives it no advantage."""
        others = self.form in ("leave_one_out", "sloo")
        return max(2, self.objective_order + others) if self.objective_order else 2

    @property
    def reference(self) -> str:
        """The paper or toolkit of the first preset that has exactly these fields, or an empty string."""
        return next((p.paper for name, p in PRESETS.items() if type(self).preset(name) == self), "")

    def _column(self, name: str) -> dict[str, object]:
        """Look up one column of the table of choices for the three axes that make the advantages."""
        three = ("returns", "baseline", "scale")
        return {axis: getattr(choice_of(axis, getattr(self, axis)), name) for axis in three}

    @property
    def within_rows(self) -> list[str]:
        """The axes, of returns, baseline and scale, on which the steps of one row are compared."""
        return [axis for axis, compares in self._column("compares").items() if compares == "row"]

    @property
    def subtracts_baseline(self) -> bool:
        """Whether a baseline of any kind is subtracted.

        A constant of 0 is not a baseline. Nor are the returns 'gae' by themselves: they mix values into the
        return and subtract none. The scale 'token_whiten' is one, because it subtracts the mean over the
        step, and so are the returns 'episode_normalized', which subtract the mean over the episode.
        """
        if self.scale == "token_whiten" or self.returns == "episode_normalized":
            return True
        return (
            self.baseline_constant != 0 if self.baseline == "constant" else self.baseline != "none"
        )

    @property
    def needs_groups(self) -> bool:
        """Whether several completions of each prompt are compared."""
        return "group" in self._column("compares").values() or self.zero_spread != "keep"

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
        return "values" in self._column("needs").values()

    @property
    def needs_memory(self) -> bool:
        """Whether the baseline is a memory of earlier steps, which each step updates."""
        own = self.baseline.load() if isinstance(self.baseline, NamedFunction) else self.baseline
        is_class = isinstance(own, type) and hasattr(own, "read") and hasattr(own, "update")
        return is_class or "baseline_value" in self._column("needs").values()

    @property
    def needs_greedy(self) -> bool:
        """Whether the reward of each prompt's greedy completion is needed."""
        return "greedy_rewards" in self._column("needs").values()

    @property
    def needs_score_norms(self) -> bool:
        """Whether the squared norm of each token's score is needed."""
        return "score_norms" in self._column("needs").values()

    @property
    def needs_sampling_logprobs(self) -> bool:
        """Whether the loss needs the logprobs that the sampler itself reported."""
        return self.importance != "none"

    @property
    def needs_centres(self) -> bool:
        """Whether the loss needs the mean score of a token at each prefix, under the sampler."""
        return self.importance_centre

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
        return 1.0 - self.epsilon, 1.0 + (
            self.epsilon if self.epsilon_high is None else self.epsilon_high
        )

    if TYPE_CHECKING:
        advantages = advantages
        token_weights = token_weights
        loss = loss
        critic_loss = critic_loss
    else:
        advantages = TorchMethod("tokenrl.core.advantages")
        token_weights = TorchMethod("tokenrl.core.losses")
        loss = TorchMethod("tokenrl.core.losses")
        critic_loss = TorchMethod("tokenrl.core.losses")
