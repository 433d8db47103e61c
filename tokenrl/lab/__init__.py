"""What an estimator does to the gradient, measured, not believed: exactly by enumeration, or on real models.

Importing this package imports no torch; a name is loaded when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.names import lazily

if TYPE_CHECKING:
    from tokenrl.lab.exact.catalogue import named_estimators
    from tokenrl.lab.exact.control_problem import TabularMdp, problem_of_mdp, random_mdp
    from tokenrl.lab.exact.curves import (
        best_constant_baseline,
        variance_with_constant_baselines,
        weight_of_difficulty,
    )
    from tokenrl.lab.exact.discounting import WhichObjective, which_objective
    from tokenrl.lab.exact.enumeration import Moments, exact_moments
    from tokenrl.lab.exact.language_model import problem_of_policy
    from tokenrl.lab.exact.problems import Problem, tabular_problem
    from tokenrl.lab.exact.verdict import Verdict, measure_bias
    from tokenrl.lab.measure.measurement import Measured, measure

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
    "Measured": "tokenrl.lab.measure.measurement",
    "Moments": "tokenrl.lab.exact.enumeration",
    "Problem": "tokenrl.lab.exact.problems",
    "TabularMdp": "tokenrl.lab.exact.control_problem",
    "Verdict": "tokenrl.lab.exact.verdict",
    "WhichObjective": "tokenrl.lab.exact.discounting",
    "best_constant_baseline": "tokenrl.lab.exact.curves",
    "exact_moments": "tokenrl.lab.exact.enumeration",
    "measure": "tokenrl.lab.measure.measurement",
    "measure_bias": "tokenrl.lab.exact.verdict",
    "named_estimators": "tokenrl.lab.exact.catalogue",
    "problem_of_mdp": "tokenrl.lab.exact.control_problem",
    "problem_of_policy": "tokenrl.lab.exact.language_model",
    "random_mdp": "tokenrl.lab.exact.control_problem",
    "tabular_problem": "tokenrl.lab.exact.problems",
    "variance_with_constant_baselines": "tokenrl.lab.exact.curves",
    "weight_of_difficulty": "tokenrl.lab.exact.curves",
    "which_objective": "tokenrl.lab.exact.discounting",
}
__getattr__ = lazily(__name__, _HOMES)
