"""What an estimator does to the gradient, measured and not believed: by enumeration, or on real models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.names import lazily

if TYPE_CHECKING:
    from tokenrl.lab.exact.catalogue import named_estimators as named_estimators
    from tokenrl.lab.exact.control_problem import (
        TabularMdp as TabularMdp,
        problem_of_mdp as problem_of_mdp,
        random_mdp as random_mdp,
    )
    from tokenrl.lab.exact.curves import (
        best_constant_baseline as best_constant_baseline,
        variance_with_constant_baselines as variance_with_constant_baselines,
        weight_of_difficulty as weight_of_difficulty,
    )
    from tokenrl.lab.exact.discounting import (
        WhichObjective as WhichObjective,
        which_objective as which_objective,
    )
    from tokenrl.lab.exact.enumeration import Moments as Moments, exact_moments as exact_moments
    from tokenrl.lab.exact.language_model import problem_of_policy as problem_of_policy
    from tokenrl.lab.exact.problems import (
        Problem as Problem,
        all_completions as all_completions,
        tabular_problem as tabular_problem,
    )
    from tokenrl.lab.exact.verdict import Verdict as Verdict, measure_bias as measure_bias
    from tokenrl.lab.measure.measurement import Measured as Measured, measure as measure

PUBLIC = {
    "tokenrl.lab.exact.catalogue": ("named_estimators",),
    "tokenrl.lab.exact.control_problem": ("TabularMdp", "problem_of_mdp", "random_mdp"),
    "tokenrl.lab.exact.curves": (
        "best_constant_baseline",
        "variance_with_constant_baselines",
        "weight_of_difficulty",
    ),
    "tokenrl.lab.exact.discounting": ("WhichObjective", "which_objective"),
    "tokenrl.lab.exact.enumeration": ("Moments", "exact_moments"),
    "tokenrl.lab.exact.language_model": ("problem_of_policy",),
    "tokenrl.lab.exact.problems": ("Problem", "all_completions", "tabular_problem"),
    "tokenrl.lab.exact.verdict": ("Verdict", "measure_bias"),
    "tokenrl.lab.measure.measurement": ("Measured", "measure"),
}
__getattr__, __dir__ = lazily(__name__, PUBLIC)
