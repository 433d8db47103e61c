"""What an estimator does to the gradient, measured, not believed: exactly by enumeration, or on real models.

Importing this package imports no torch; a name is loaded when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenrl.lab.catalogue import named_estimators
    from tokenrl.lab.control_problem import TabularMdp, problem_of_mdp, random_mdp
    from tokenrl.lab.curves import (
        best_constant_baseline,
        variance_with_constant_baselines,
        weight_of_difficulty,
    )
    from tokenrl.lab.discounting import WhichObjective, which_objective
    from tokenrl.lab.enumeration import Moments, exact_moments
    from tokenrl.lab.language_model import problem_of_policy
    from tokenrl.lab.measurement import Measured, measure
    from tokenrl.lab.problems import Problem, tabular_problem
    from tokenrl.lab.verdict import Verdict, measure_bias

__all__ = [
    "Measured",
    "Moments",
    "Problem",
    "TabularMdp",
    "Verdict",
    "WhichObjective",
    "best_constant_baseline",
    "exact_moments",
    "measure",
    "measure_bias",
    "named_estimators",
    "problem_of_mdp",
    "problem_of_policy",
    "random_mdp",
    "tabular_problem",
    "variance_with_constant_baselines",
    "weight_of_difficulty",
    "which_objective",
]

_HOMES = {
    "Measured": "measurement",
    "Moments": "enumeration",
    "Problem": "problems",
    "TabularMdp": "control_problem",
    "Verdict": "verdict",
    "WhichObjective": "discounting",
    "best_constant_baseline": "curves",
    "exact_moments": "enumeration",
    "measure": "measurement",
    "measure_bias": "verdict",
    "named_estimators": "catalogue",
    "problem_of_mdp": "control_problem",
    "problem_of_policy": "language_model",
    "random_mdp": "control_problem",
    "tabular_problem": "problems",
    "variance_with_constant_baselines": "curves",
    "weight_of_difficulty": "curves",
    "which_objective": "discounting",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenrl.lab' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"tokenrl.lab.{_HOMES[name]}"), name)
