import typing

from tokenrl.lab.compare.decisions import judge_scores as judge_scores
from tokenrl.lab.compare.recorded import JudgedRuns as JudgedRuns, judge_recorded as judge_recorded
from tokenrl.lab.exact.catalogue import named_estimators as named_estimators
from tokenrl.lab.exact.control_problem import (
    TabularMdp as TabularMdp,
    problem_of_mdp as problem_of_mdp,
    random_mdp as random_mdp,
)
from tokenrl.lab.exact.enumeration import Moments as Moments, exact_moments as exact_moments
from tokenrl.lab.exact.objectives import prompt_weight as prompt_weight
from tokenrl.lab.exact.problems import (
    Problem as Problem,
    all_completions as all_completions,
    tabular_problem as tabular_problem,
)
from tokenrl.lab.exact.samplers import (
    OffPolicyVerdict as OffPolicyVerdict,
    Perturbation as Perturbation,
    measure_off_policy as measure_off_policy,
    off_policy_moments as off_policy_moments,
    perturbed_problem as perturbed_problem,
)
from tokenrl.lab.exact.turns import turn_problems as turn_problems
from tokenrl.lab.exact.verdict import Verdict as Verdict, measure_bias as measure_bias
from tokenrl.lab.measure.measurement import (
    Measured as Measured,
)
from tokenrl.runs.side_by_side import compare_runs as compare_runs

if typing.TYPE_CHECKING:
    from tokenrl.signatures import (
        measure_gradients as measure_gradients,
    )
else:
    from tokenrl.lab.measure.measurement import measure_gradients as measure_gradients
