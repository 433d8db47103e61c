"""Says what `tokenrl lab exact` measures: its arguments, and every estimator that it knows by name.

The estimators are every preset, and RLOO with each axis changed by itself. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenrl.core.choices import CHOICES, OBJECTIVES
from tokenrl.core.effects import KL_EFFECTS
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.files import OutputFile
from tokenrl.settings import Settings


@dataclass(frozen=True)
class LabArguments(Settings):
    """Check the declared bias of every estimator by summing over everything that can be sampled."""

    json: OutputFile | None = None
    """Write one record per estimator to this JSON file."""
    estimators: tuple[str, ...] = ()
    """Measure only these estimators, named as in the table, or baselines of your own (mine.py:baseline). Default:
    all."""
    preset: str | None = None
    """Explain this estimator beside rloo: a preset, also with changes, such as trl_grpo,scale=none."""
    trl_config: str | None = None
    """Explain what a GRPOConfig or RLOOConfig of TRL computes, from a JSON or YAML file of its fields; a field trainer
    names one of grpo, rloo."""


NEEDS = {
    "optimal_form": "baseline=optimal",
    "importance_bound": "importance=token,importance_cap=2.0",
    "episode_mean": "returns=reward_to_go",
    "episode_std": "returns=reward_to_go",
    "blame_window": "window=1",
    "closed_form": "beta=0.2,kl_placement=loss,kl_estimator=k2",
    "gae": "baseline=value",
    "loo_std": "scale_eps=0.1",
    "target": "baseline=none",
    "episode_normalized": "baseline=none",
}
"""Other fields that an axis, or one choice on it, needs in order to have an effect."""

EXTRA = {
    "constant 0.5": "baseline=constant,baseline_constant=0.5",
    "opo, row inside": "baseline=opo,leave_one_out=False",
    "optimal, row inside": "baseline=optimal,leave_one_out=False",
    "timestep_mean, row inside": "baseline=timestep_mean,leave_one_out=False",
    "shrinkage, weight 0.5": "baseline=shrinkage,shrinkage_weight=0.5",
    "value, to go": "returns=reward_to_go,baseline=value",
    "gae, lam 1": "baseline=value,returns=gae,lam=1.0",
    "group_mean, group_std": "baseline=group_mean,scale=group_std",
    "none, group_std, ddof 0": "baseline=none,scale=group_std,scale_ddof=0",
    "loo_std, token_mean": "scale=loo_std,scale_eps=0.1,aggregation=token_mean",
    "constant, sequence_mean": "baseline=constant,baseline_constant=0.5,aggregation=sequence_mean",
    "dual clip": "ratio=token,dual_clip=3.0",
    "importance token, cap 2": "importance=token,importance_cap=2.0",
    "importance prefix, clip 0.2": "importance=prefix,importance_clip=0.2",
    "importance none, centred": "importance_centre=True",
    "batch_mean, full path KL": "beta=0.2,kl_placement=loss,kl_estimator=full_path,"
    "baseline=batch_mean",
    "discounted": "gamma=0.7",
    "discounted, to go": "returns=reward_to_go,gamma=0.7",
    "episode standardised": "returns=reward_to_go,baseline=episode_mean,scale=episode_std,"
    "gamma=0.99",
    "value, episode normalised": "baseline=value,returns=episode_normalized",
    "none, zero spread dropped": "baseline=none,zero_spread=drop",
    "overlong penalty": "overlong_buffer=4",
    "weighted prompts, batch_std": "prompts=weighted,scale=batch_std",
    "weighted prompts, token_whiten": "prompts=weighted,scale=token_whiten",
    "inverse prompts, batch_std": "prompts=inverse,scale=batch_std",
    "full path KL, closed form subtracted": "beta=0.2,kl_placement=loss,kl_estimator=full_path,"
    "kl_baseline=closed_form",
    "entropy bonus": "entropy_coef=0.3",
    "max_at_2, full path KL": "beta=0.2,kl_placement=loss,kl_estimator=full_path,"
    "baseline=none,objective=max_at_k,objective_order=2",
    "log_success, token_mean": "baseline=none,objective=log_success,aggregation=token_mean",
}
"""Further estimators, which are neither presets nor RLOO with one axis changed."""


def named_estimators() -> dict[str, Estimator]:
    """Return the estimators that `tokenrl lab exact` measures, by name.

    They are the presets, RLOO with one axis changed, and the combinations in `EXTRA`. The axes are read from
    the table of `core.choices`, so a choice that is added there is measured too. An estimator that already
    has a name is not listed again.
    """
    named: dict[str, Estimator] = {}
    for name, changes in _candidates():
        estimator = Estimator.preset(changes)
        if estimator not in named.values():
            named[name] = estimator
    return named


def _candidates() -> Iterator[tuple[str, str]]:
    """Yield names, each with its preset or with the changes from RLOO."""
    for name in PRESETS:
        yield name, name
    for axis, choices in CHOICES.items():
        for choice in choices:
            needs = [NEEDS[name] for name in (axis, choice) if name in NEEDS]
            yield f"{axis} {choice}", ",".join([*needs, f"{axis}={choice}"])
    for placement, kl in KL_EFFECTS:
        changes = f"beta=0.2,kl_placement={placement},kl_estimator={kl}"
        yield f"KL in the {placement}, {kl}", changes
    for objective, form in OBJECTIVES:
        for order in (1, 2, 3) if objective == "max_at_k" else (None,):
            if (form, order) != ("sloo_minus_one", 1):
                label = objective if order is None else f"max_at_{order}"
                changes = f"baseline=none,objective={objective},objective_form={form},objective_order={order}"
                changes += ",objective_share=0.5" if objective == "quantile" else ""
                yield f"{label}, {form}", changes
    yield from EXTRA.items()
