"""Defines the axes of an estimator: a choice on each, and what these choices need.

The names on each axis stand in the types of the fields; `choices` says what each does. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tokenrl import settings
from tokenrl.core.choices import CHOICES, MEMORY, OBJECTIVES
from tokenrl.core.effects import ENTROPY, FROM_BEST_TO_WORST, KL_EFFECTS, UNKNOWN, Choice, Need
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction
from tokenrl.settings import (
    OR_FUNCTION,
    Bounds,
    Count,
    Natural,
    NonNegative,
    Number,
    Positive,
    Settings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tokenrl.core.memories import Memory

Baseline = Literal[
    "none",
    "constant",
    "running_mean",
    "tracker",
    "rloo",
    "quantile",
    "group_mean",
    "batch_mean",
    "remax",
    "opo",
    "optimal",
    "shrinkage",
    "value",
    "episode_mean",
    "timestep_mean",
]
if TYPE_CHECKING:
    BaselineOrFunction = Baseline | str | Callable[..., Tensor]
else:
    BaselineOrFunction = Annotated[Baseline, OR_FUNCTION]


OF_YOUR_OWN = "a baseline of your own is exact if it contains nothing of the row's own actions"
YOUR_OWN = Choice(UNKNOWN, OF_YOUR_OWN, "advantages.from_function", any_units=True)


def own_choice(baseline: Any) -> Choice:
    """Return the entry of a user's function, or of a class of memories; it is imported if it was named.

    It declares its bias by its attribute `bias`, a status with the reason.

    Raises:
        Refused: The attribute is anything else, or nothing can be imported by the name.
    """
    own = baseline.load() if isinstance(baseline, NamedFunction) else baseline
    is_memory = isinstance(own, type) and hasattr(own, "read") and hasattr(own, "update")
    choice = MEMORY if is_memory else YOUR_OWN
    with suppress(ValueError):  # some builtins have no signature
        if "ref_logprobs" in signature(own).parameters:
            choice = replace(choice, needs="ref_logprobs")
    declaration = getattr(own, "bias", None)
    match declaration:
        case None:
            return choice
        case (str(status), str(reason)) if status in FROM_BEST_TO_WORST:
            return replace(choice, status=status, reason=reason)
    raise Refused(
        f"The bias of the baseline {baseline.__name__} is {declaration!r}; it must be a status and the "
        f"reason, two texts. A status is one of: {', '.join(FROM_BEST_TO_WORST)}."
    )


cached_signature = cache(signature)
"""The signature of a formula, which is read once and not in every step."""


@dataclass(frozen=True)
class Axes(Settings):
    """The choice on each axis. The defaults are RLOO, which is unbiased, with any KL in the reward.

    Attributes:
        entries: the entry of each choice that is in force, by its axis; a user's baseline has `YOUR_OWN`. Another
            objective stands in place of the baseline. A KL and an entropy bonus are there if they have a weight.
    """

    __slots__ = ("entries",)  # made once, and no field: `vars` and `replace` leave it out
    entries: ClassVar[Mapping[str, Choice]]

    baseline: BaselineOrFunction = "rloo"
    """What is subtracted from the return; rloo is the mean of the other completions of the prompt.

    Also a function f(totals, group_size=..., mask=..., valid=...) that returns [N] or [N, T], by its name
    module:function or path/to/file.py:function; from Python the function itself too. It gets what it names among
    its parameters: these, or rewards, components, logprobs, sampling_logprobs, ref_logprobs, entropy, lengths, turns,
    or a column of the data. A class with the methods `read` and `update` is a baseline with a memory. See
    `recipes/pages/explain/estimators.md`."""
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
    optimal_form: Literal["sequence", "cumulative"] = "sequence"
    """What 'optimal' weights by: the sum of |s_t|^2 over the row, or at each token the sum so far."""
    shrinkage_weight: Annotated[float, Bounds(at_least=0, at_most=1)] | None = None
    """Weight of the prompt's own mean in 'shrinkage'; None to estimate it from the other prompts."""
    scale: Literal[
        "none", "group_std", "batch_std", "loo_std", "token_whiten", "episode_std", "target"
    ] = "none"
    """What the advantage is divided by. Standard deviations that contain the row itself bias the gradient. Or,
    with the baseline none, 'target' (TPO): the probabilities of a group's completions are moved towards themselves
    times exp(u / eta), u the rewards less their mean and divided by their standard deviation."""
    eta: Positive = 1.0
    """Temperature of the scale 'target' and of the ratio 'delight': the smaller, the more a reward decides."""
    scale_ddof: Literal[0, 1] = 1
    """1 divides the sum of squares by n - 1, 0 by n."""
    scale_eps: NonNegative = 1e-4
    """Added to the standard deviation, outside the root. loo_std needs at least 0.01: where the other rows have equal
    rewards it is the whole divisor."""
    aggregation: Literal["sequence_sum", "fixed_length", "token_mean", "sequence_mean"] = (
        "sequence_sum"
    )
    """How tokens are averaged; sequence_sum, the mean over sequences of their token sums, is unbiased."""
    ratio: Literal[
        "none",
        "token",
        "sequence_mean",
        "sequence_product",
        "geometric_clip",
        "cispo",
        "trust",
        "delight",
    ] = "none"
    """Importance ratio of the policy to the one that sampled; token is PPO's clipped ratio. Or a gate in its place:
    delight multiplies the advantage A of a token by sigmoid(-A log pi / eta)."""
    epsilon: Annotated[float, Bounds(above=0, at_most=1)] = 0.2
    """The ratio is clipped below 1 - epsilon, and above 1 + epsilon unless epsilon_high is set."""
    epsilon_high: Positive | None = None
    """The ratio is clipped above 1 + epsilon_high; None for epsilon."""
    dual_clip: Annotated[float, Bounds(above=1, at_most=settings.LARGEST)] | None = None
    """Bound of the ratio where the advantage is negative, for 'token' and 'sequence_mean'; None for none."""
    trust_bound: Annotated[float, Bounds(above=0, at_most=1)] = 0.15
    """The ratio 'trust' drops tokens whose probability has moved by more than this since it was sampled, in the
    direction of their advantage."""
    trust_cap: Annotated[float, Bounds(at_least=1, at_most=settings.LARGEST)] = 20.0
    """Bound of the ratio by which 'trust' weights the tokens that it keeps."""
    importance: Literal["none", "token", "prefix", "sequence", "geometric"] = "none"
    """Weight completions by the policy's probability over the sampler's: of each token, of all tokens up to it,
    of the whole sequence (exact without bounds, and noisy), or its geometric mean; none assumes equality."""
    importance_clip: Positive | None = None
    """Clip the log weight of a prefix of t tokens at plus and minus this times sqrt(t); None for no clip."""
    importance_bound: Literal["truncate", "mask"] = "truncate"
    """Move weights beyond importance_cap and importance_floor to that bound, or mask them: set them to 0."""
    importance_cap: Annotated[float, Bounds(at_least=1, at_most=settings.LARGEST)] | None = None
    """The largest importance weight; None for no bound."""
    importance_floor: Annotated[float, Bounds(above=0, at_most=1)] | None = None
    """The smallest importance weight; None for no bound."""
    importance_centre: bool = False
    """Subtract from each token's score its mean over the sampler's vocabulary at that prefix (arXiv 2609.20807).
    Without weights the gradient is then that of the sampler's own expected reward, up to a factor. In training it
    needs the generator transformers, and a vocabulary of at most 4,096 tokens."""
    beta: NonNegative = 0.0
    """Weight of the KL divergence from the reference policy; 0 needs no reference."""
    kl_estimator: Literal[
        "k1", "k2", "k3", "k2_sequence", "full_path", "closed_form", "closed_form_path"
    ] = "k1"
    """k1 is the log ratio, k2 half its square, k3 is never negative; full_path is exact in the loss.

    The closed forms sum over the vocabulary, usually with less noise, but where tokens share parameters sometimes
    with more: closed_form takes each token's prefix as fixed, closed_form_path is exact."""
    kl_baseline: Literal["none", "closed_form"] = "none"
    """Subtract the closed form of a token's KL from its log ratio, for k2 and full_path in the loss (vOPD): the
    gradient is the same on average."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Subtract the KL from the reward (exact with k1), or add it to the loss (exact with full_path)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus in the loss, a bias: an action's effect on later entropy is ignored."""
    returns: Literal["total", "reward_to_go", "blame_window", "episode_normalized", "gae"] = "total"
    """Credit each action with the whole return, the reward to go (also normalised over its episode), its next
    rewards, or GAE's return."""
    window: Count = 16
    """Steps of reward that 'blame_window' credits to an action, its own step included."""
    lam: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.95
    """GAE's lambda: 1 uses observed rewards only, 0 one reward and the value of the next state."""
    value_lam: Annotated[float, Bounds(at_least=0, at_most=1)] | None = None
    """Lambda of the returns that the critic learns; None for that of the advantages."""
    length_lam: NonNegative = 0.0
    """Above 0, lambda of the advantages is 1 - 1 / (length_lam x tokens of the completion), at least 0."""
    gamma: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """Discount per step; below 1 the gradient is no longer that of the undiscounted return."""
    components: Literal["summed", "separate"] = "summed"
    """Add the rewards of all functions first, or give each its own baseline and scale, and add advantages."""
    zero_spread: Literal["keep", "drop", "refill"] = "keep"
    """Keep groups of equal rewards (they count in the divisor), drop them, or refill with new prompts."""
    prompts: Literal["uniform", "weighted", "inverse"] = "uniform"
    """How prompts are drawn: all equally often; or by --prompt-weights, which ascends another objective (weighted)
    unless the gradient of each is divided by its chance (inverse)."""
    truncations: Literal["keep", "mask"] = "keep"
    """Keep completions cut off at the maximum length, or mask their gradient."""
    overlong_buffer: Natural = 0
    """Number of tokens before the maximum length over which the reward falls linearly by up to 1."""
    value_clip: Positive | None = None
    """How far a value may move from the old one before the critic's loss is clipped; None for no clip."""
    objective: Literal["reward", "max_at_k", "log_success", "quantile"] = "reward"
    """What is ascended: the mean reward, the best of k completions (pass@k), the log of success, or in the limit of
    many completions per prompt the mean of their best share."""
    objective_order: Count | None = None
    """k of 'max_at_k', below the number of completions per prompt."""
    objective_share: Annotated[float, Bounds(above=0, below=1)] | None = None
    """The share of 'quantile': only that part of a prompt's completions counts, at least one, above the others."""
    objective_form: Literal[
        "default",
        "leave_one_out",
        "sloo_minus_one",
        "sloo",
        "no_baseline",
        "maxrl",
        "keep_failures",
    ] = "default"
    """The estimate of that gradient; default is leave_one_out for 'max_at_k' and maxrl for 'log_success'."""

    def __post_init__(self) -> None:
        """Find the entries of what is chosen; what excludes each other may have none."""
        super().__post_init__()
        entries = {
            axis: names.get(str(getattr(self, axis)), YOUR_OWN) for axis, names in CHOICES.items()
        }
        if self.other_objective:
            entries["baseline"] = OBJECTIVES.get((self.objective, self.form), YOUR_OWN)
        if self.entropy_coef:
            entries["entropy"] = ENTROPY
        if self.beta:
            entries["kl"] = KL_EFFECTS.get((self.kl_placement, self.kl_estimator), YOUR_OWN)
        object.__setattr__(self, "entries", entries)

    def __reduce__(self) -> Any:
        """Let pickle and copies make the object anew from its fields."""
        return partial(type(self), **vars(self)), ()

    def chosen(self, axis: str) -> Choice:
        """Return the entry of the choice on an axis."""
        return self.entries[axis]

    @property
    def baseline_entry(self) -> Choice:
        """The entry of the baseline, with what a user's own declares, which is imported if it was named."""
        return own_choice(self.baseline) if callable(self.baseline) else self.chosen("baseline")

    @property
    def needs(self) -> set[Need]:
        """The arguments of `Estimator.advantages` and `Estimator.loss` that the choices need."""
        return {choice.needs for choice in self.entries.values()}

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities under the reference are read: by a KL, or by a function of the user's."""
        return self.beta > 0 or self.baseline_entry.needs == "ref_logprobs"

    @property
    def needs_memory(self) -> bool:
        """Whether the baseline is a memory of earlier steps, which each step updates."""
        return self.baseline_entry.needs == "baseline_value"

    @property
    def needs_groups(self) -> bool:
        """Whether several completions of each prompt are compared."""
        return any(choice.compares == "group" for choice in self.entries.values())

    @property
    def within_rows(self) -> list[str]:
        """The axes, of returns, baseline and scale, on which the steps of one row are compared."""
        return [axis for axis, choice in self.entries.items() if choice.compares == "row"]

    @property
    def other_objective(self) -> bool:
        """Whether another objective than the mean reward is ascended."""
        return self.objective != "reward"

    @property
    def form(self) -> str:
        """The form of the objective, with the default filled in."""
        forms = [form for objective, form in OBJECTIVES if objective == self.objective]
        return forms[0] if self.objective_form == "default" else self.objective_form

    @property
    def fewest_rows(self) -> int:
        """The number of rows without which the baseline, or the objective, gives a set no advantage."""
        choice = self.chosen("baseline")
        return max(choice.rows, (self.objective_order or 0) + choice.of_others)

    @property
    def shares_return(self) -> bool:
        """Whether all actions of a row are credited with the return of the row."""
        return self.returns == "total"

    @property
    def subtracts_baseline(self) -> bool:
        """Whether a baseline of any kind is subtracted.

        A constant of 0 is not a baseline. Nor are the returns 'gae' by themselves: they mix values into the
        return and subtract none. A scale or returns that subtract a mean are one.
        """
        if any(choice.subtracts_mean for choice in self.entries.values()):
            return True
        if self.baseline == "constant":
            return self.baseline_constant != 0
        if self.other_objective:
            return self.form != "no_baseline"
        return self.baseline != "none"

    @property
    def kl_in_reward(self) -> bool:
        """Whether a KL is subtracted from the reward."""
        return self.beta > 0 and self.kl_placement == "reward"

    @property
    def kl_in_loss(self) -> bool:
        """Whether a KL is a term of the loss."""
        return self.beta > 0 and self.kl_placement == "loss"

    @property
    def loss_side_terms(self) -> bool:
        """Whether rows of advantage 0 still have a gradient, from a KL or an entropy term in the loss."""
        return self.kl_in_loss or self.entropy_coef > 0

    @property
    def clip_range(self) -> tuple[float, float]:
        """The bounds beyond which the ratio is clipped: `1 - epsilon` and `1 + epsilon_high`."""
        return 1.0 - self.epsilon, 1.0 + (self.epsilon_high or self.epsilon)

    @property
    def importance_range(self) -> tuple[float, float]:
        """The bounds of an importance weight, 0 and infinity where there is none."""
        return self.importance_floor or 0.0, self.importance_cap or math.inf

    def computed(self, formula: str, columns: Mapping[str, Any]) -> Any:
        """Return what a formula computes; its parameters are named as columns, or else as fields of the axes.

        Args:
            formula: Its name in a module beside this one, such as `baselines.rloo`.
            columns: What the step has, by name.
        """
        module, _, name = formula.partition(".")
        function = getattr(import_module(f"tokenrl.core.{module}"), name)
        names = cached_signature(function).parameters
        return function(**{x: columns[x] if x in columns else getattr(self, x) for x in names})

    def memory(self) -> Memory:
        """Make the memory of a run; an estimator that needs none gets a running mean, which stays as it is.

        Raises:
            Refused: The class that is the baseline lacks a method.
            Stopped: It cannot be made without arguments.
        """
        from tokenrl.core.memories import RunningMean, Tracker, own_memory

        if callable(self.baseline) and self.needs_memory:
            return own_memory(self.baseline)
        mean = RunningMean(self.running_mean_decay, self.running_mean_init)
        return Tracker(mean, self.tracker_decay) if self.baseline == "tracker" else mean
