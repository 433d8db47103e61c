"""One table of rules about what the numbers of a training mean.

A rule is a flag, a predicate and a sentence. The predicate reads one record (see `runs.findings`), with the means of
the metrics that stand here, and weighs what it means; rules keep no state. A rule is silent if a number that it
compares was not observed, because no comparison with nan holds. Several rules may have the same flag; the first that
applies speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import hypot, inf, log, nan
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokenrl.runs.metric_table import exceeds, reaches

if TYPE_CHECKING:
    from tokenrl.runs.findings import Observed

Weight = Literal["watch", "act", "void"]

LOST_SHARE = 0.5
"""Above this share of groups with equal rewards, or of completions that are cut, most work is lost; and below
it, as a share of effective samples: importance weights then about double the variance of the gradient."""
LEAST_ENTROPY = 0.1
"""In nats per action; below it a policy over discrete actions nearly always chooses the same one."""
MIN_ERRORS = 4.5
MIN_ERRORS_OF_BEST = 6.0
"""Standard errors by which the reward of a destroyed policy falls. Tested hundreds of times per run, a fall
of 2 standard errors is often chance; the best of several evaluations is biased upwards."""
GREEDY_ERRORS = 3.0  # of a difference that is judged once in a run
GAP_ERRORS = 3.0
"""Standard errors by which training prompts gained more than held-out ones, if they are learnt by heart."""
MAX_DIFFERENCE = 0.05
"""Nats per token between sampler and trainer. If chance decides their signs, the importance weights of
completions of 100 tokens spread by a factor of 1.9 around 1."""
FEW_PROMPTS = 13
"""With fewer prompts of equal weight a policy learns them by heart."""
LEAST_EXPLAINED = 0.05
"""Share of the variance of the returns that a critic which is of use explains."""

SOLVED_ADVICE = (
    "The policy already solves these prompts: take harder ones, or evaluate it (tokenrl evaluate)."
)
TOO_FAST = (
    "The learning rate, {run.learning_rate:g}, is the likely cause: try --learning-rate "
    "{run.lower_rate:g}."
)
IDLE = (
    "In {run.idle_steps} steps in a row no two rewards that are compared differed, so there is nothing to "
    "learn from: the mean reward is {run.step.reward:.3g}"
)
GAIN = (
    "The held-out reward was {run.gain.before:.3g} before training, and has changed by {run.gain.value:.2g} "
    "± {run.gain.error:.1g}. "
)
KEEP_BEST = "With --keep best model/ gets the weights of the best evaluation."
BY_HEART = (
    "The policy learns its training prompts by heart. Give more distinct prompts, or end earlier: --max-steps, a lower "
    "--learning-rate, or --estimator.beta to stay near the base. " + KEEP_BEST
)
"""Sentences, or their beginnings, that several rules share."""


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        flag: a short name for programs, such as `policy-destroyed`.
        weight: `watch` is a remark; `act` says that a setting should change; `void` says that the numbers
            mean nothing as they are: a check is then not passed. An arm of a comparison has its verdict all
            the same, with the finding beside it.
        text: one or more whole sentences, with the numbers.
    """

    flag: str
    weight: Weight
    text: str

    def __str__(self) -> str:
        """Return the finding as one line, its flag first."""
        return f"{self.flag}: {self.text}"


def of(metric: str) -> Any:
    """Return a field that holds the mean of a metric, nan without one."""
    return field(default=nan, metadata={"metric": metric})


@dataclass(frozen=True)
class Means:
    """Means of metrics over some steps; nan where no step has a finite number, so that no comparison holds.

    Attributes:
        reward: the mean reward of the samples.
        entropy: in nats per action; nan for a density, whose entropy may well be negative.
        cut: the share of completions that the limit cuts.
        logp_difference: nats per token between the log-probabilities of sampler and trainer.
        effective_samples: the effective sample size, as a share of the completions.
        evidence: nats of evidence that an engine samples from other probabilities than it reports.
        explained: the share of the variance of the returns that the critic explains.
        prompts: the number of prompts of equal weight that are as concentrated as the weights of the prompts.
        equal: the share of groups with equal rewards; where no groups are compared, of steps.
    """

    reward: float = of("reward")
    entropy: float = of("entropy")
    cut: float = of("completions/clipped_ratio")
    logp_difference: float = of("sampling/logp_difference/mean")
    effective_samples: float = of("sampling/effective_sample_size")
    evidence: float = of("sampling/evidence")
    explained: float = of("explained_variance")
    prompts: float = of("prompts/effective")
    equal: float = nan


class Rule(NamedTuple):
    """A row of the table.

    Attributes:
        flag: the flag of its finding.
        weigh: the predicate. It returns the weight of the finding, or something false where there is none.
        sentence: whole sentences, with attributes of the record `run` in braces, and {remedy}.
    """

    flag: str
    weigh: Callable[[Observed], Any]
    sentence: str


def judge(observed: Observed, *flags: str) -> list[Finding]:
    """Return the findings of all rules, or of some flags, at most one of each flag."""
    findings: dict[str, Finding] = {}
    for rule in RULES:
        if rule.flag in findings or (flags and rule.flag not in flags):
            continue
        if weight := rule.weigh(observed):
            text = rule.sentence.format(run=observed, remedy=remedy(observed)).rstrip()
            findings[rule.flag] = Finding(rule.flag, weight, text)
    return list(findings.values())


def above(number: float, **limits: float) -> Any:
    """Return the first of the weights, the gravest first, whose limit a number exceeds; None without any."""
    return next((weight for weight, limit in limits.items() if number > limit), None)


def is_destroyed(run: Observed) -> bool:
    """Whether the reward fell by more than noise explains, and a sign shows that the policy can hardly recover.

    Held-out prompts may be easier than training prompts: the first step, made by the policy that was
    evaluated, shows by how much. A policy that has kept half of what it had learnt is not lost.
    """
    if not (run.sampled and run.latest and run.latest.signs):
        return False
    best = run.best_sampled
    reward = run.latest.reward
    learnt = best.value - run.sampled[0].value
    lost = run.latest.first.value + learnt - reward.value
    is_fall = best.exceeds(reward, MIN_ERRORS_OF_BEST if learnt > 0 else MIN_ERRORS)
    return is_fall and 2 * lost > max(best.value - reward.value, learnt)


def is_by_heart(run: Observed) -> bool:
    """Whether training prompts gained at least twice as much as held-out prompts, which are below their best.

    Only the part beyond noise counts. An agent is evaluated on what it is trained on.
    """
    if run.num_envs or not (run.sampled and run.latest):
        return False
    means = run.latest.first, run.latest.reward, run.sampled[0], run.last_sampled
    before, reward, start, held_out = (mean.value for mean in means)
    gap = (reward - before) - (held_out - start)
    error = hypot(*(mean.error for mean in means))
    return held_out < run.best_sampled.value and gap > max(
        (reward - before) / 2, GAP_ERRORS * error
    )


def remedy(run: Observed) -> str:
    """Return in words what helps most where rewards do not differ, or do not rise."""
    # else one step says little
    reward = run.step.reward if run.groups or run.is_idle else run.gain.before
    if run.num_envs:
        return "Reward steps towards the goal, or try more or longer episodes (--num-envs, --num-steps)."
    if run.is_solved or reaches(reward, run.pass_mark):
        return SOLVED_ADVICE
    if is_by_heart(run):
        return BY_HEART
    if run.gain.equal < LOST_SHARE:
        return "More steps (--max-steps), larger ones (--prompts-per-step) or a higher --learning-rate may give one."
    if run.can_warm_start:
        return "This model cannot do the task yet: add --warm-start, to begin with the task's demonstrations."
    if run.step.cut >= LOST_SHARE:
        limit = run.max_completion_length
        return f"{run.step.cut:.0%} of completions are cut at {limit} tokens, before an end: {run.uncut}"
    advice = (
        "Use prompts that the policy sometimes solves, a graded reward, demonstrations (tokenrl sft), "
        "or more generations per prompt."
    )
    if reward == 0:
        advice += " If the reward compares texts with a column of numbers, which are never equal, write str(answer)."
    return advice


RULES = (
    Rule(
        "policy-destroyed",
        lambda run: is_destroyed(run) and "void",
        "The policy is destroyed: the mean reward fell from {run.best_sampled.value:.3g} to "
        "{run.latest.reward.value:.3g}, and {run.latest.signs}. " + TOO_FAST,
    ),
    # At the end of a run.
    Rule(
        "entropy-collapsed",
        lambda run: (
            run.recent.entropy < LEAST_ENTROPY
            and not run.entropy_coef
            and ("watch" if run.is_solved else "act")
        ),
        "The policy has an entropy of {run.recent.entropy:.3g} nats per action: it makes nearly always the same "
        "choice. Unless that is right, set a lower learning rate or --estimator.entropy-coef, to begin with .01 in the "
        "units of the advantages.",
    ),
    Rule(
        "sampling-differs",
        lambda run: (
            not (run.importance_centre or run.rows is not None)
            and (
                above(LOST_SHARE - run.recent.effective_samples, void=0)
                or above(run.recent.logp_difference, act=MAX_DIFFERENCE)
            )
        ),
        "Log-probabilities of sampling and training differ by {run.recent.logp_difference:.2g} nats per token; "
        "the effective sample size is {run.recent.effective_samples:.0%} of the completions. Sample and train in "
        "one precision, with one model, prompt and temperature: bfloat16 makes .01 to .1. Where the sampler has "
        "weights of earlier steps, lower --sync-every or the learning rate, or set --estimator.importance.",
    ),
    Rule(
        "sampled-elsewhere",
        lambda run: above(run.step.evidence, act=log(1e3)),
        "The engine hardly samples from the probabilities that it reports. Bets on a difference between minus the "
        "log-probabilities of its tokens and the entropy have won {run.step.evidence:.2g} nats, more than in one of a "
        "thousand honest runs. It may have other weights, another temperature or fewer tokens to draw from, or choose "
        "among completions by their probability.",
    ),
    Rule(
        "rewards-abstain",
        lambda run: run.abstention and run.on_abstain == "leave-out" and "watch",
        "{run.abstention} These completions are left out of their groups (--on-abstain leave-out): they teach nothing, "
        "and the mean reward is that of the others.",
    ),
    Rule(
        "rewards-abstain",
        lambda run: run.abstention and "watch",
        "{run.abstention} Where others give one, it counts as 0 in their sum, so right completions are pushed "
        "down too, unless --on-abstain leave-out leaves these completions out of their groups.",
    ),
    # Before training, in the step of a check.
    Rule(
        "no-signal",
        lambda run: (
            run.groups and run.step.equal > 0.999 and ("watch" if run.others_differ else "void")
        ),
        "In none of {run.groups} do the rewards differ; their mean is {run.step.reward:.3g}. {remedy}",
    ),
    Rule(
        "no-signal",
        lambda run: run.groups and run.step.equal > 0.9 and "watch",
        "In {run.step.equal:.0%} of {run.groups} the rewards are equal. Only the others can teach anything. "
        "{remedy}",
    ),
    # In several steps in a row; if the reward was higher before, the policy is lost.
    Rule(
        "no-signal",
        lambda run: (
            run.is_idle
            and run.sampled
            and exceeds(run.sampled[0].value, run.step.reward, 3 * run.sampled[0].error)
            and "void"
        ),
        IDLE + ", down from {run.sampled[0].value:.3g} before training. " + TOO_FAST,
    ),
    Rule("no-signal", lambda run: run.is_idle and "void", IDLE + ". {remedy}"),
    # In a run that is judged as a whole.
    Rule(
        "no-signal",
        lambda run: above(
            run.whole.equal, act=inf if run.is_solved else LOST_SHARE, watch=LOST_SHARE / 2
        ),
        "{run.whole.equal:.0%} of the groups or steps that are compared have equal rewards and so no gradient. "
        "{remedy}",
    ),
    Rule(
        "critic-useless",
        lambda run: not run.groups and run.recent.explained < LEAST_EXPLAINED and "act",
        "The critic explains {run.recent.explained:.0%} of the variance of the returns, hardly more than a constant "
        "would. Its values are noise in the baseline, and with lam below 1 a bias too: raise --value-learning-rate, "
        "or do without a critic, as with --estimator reinforce_running_mean.",
    ),
    Rule(
        "few-prompts",
        lambda run: run.recent.prompts < FEW_PROMPTS and "act",
        "Most of the weight lies on few prompts, as if there were {run.recent.prompts:.3g} of equal weight, which "
        "the policy learns by heart: raise --prompt-floor.",
    ),
    # On held-out prompts.
    Rule(
        "learnt-by-heart",
        lambda run: not run.is_solved and is_by_heart(run) and "act",
        "The mean reward of training prompts rose from {run.latest.first.value:.3g} to {run.latest.reward.value:.3g}, "
        "and that of held-out prompts went from {run.sampled[0].value:.3g} to {run.last_sampled.value:.3g}; its best "
        "was {run.best_sampled.value:.3g}, at step {run.best_sampled.step}. " + BY_HEART,
    ),
    Rule(
        "nothing-learnt",
        lambda run: run.gain.value < -2 * run.gain.error and "act",
        GAIN + "It has fallen. " + TOO_FAST,
    ),
    Rule(
        "nothing-learnt",
        lambda run: run.gain.value <= 2 * run.gain.error and "act",
        GAIN
        + "It is no gain beyond noise. {remedy} In {run.gain.equal:.0%} of the steps no two rewards that are "
        "compared differed.",
    ),
    Rule(
        "nothing-learnt",
        lambda run: run.is_unlearnt and "act",
        "The reward has no gain beyond noise. Where rewards differ, more steps (--max-steps) or a higher "
        "--learning-rate than {run.learning_rate:g} may give one; else easier prompts or a graded reward.",
    ),
    Rule(
        "constant-answer",
        lambda run: run.constant and ("watch" if run.is_solved else "act"),
        "All greedy completions of the evaluation are the same, {run.constant:.80}, though the prompts differ. Unless "
        "one answer is right for all, the reward is what a constant earns: give prompts whose right answers are "
        "spread more evenly, a reward that a constant does not earn, demonstrations (tokenrl sft), or a bonus for "
        "entropy (--estimator.entropy-coef).",
    ),
    # Whatever the reward of samples: the weights of the best evaluation are lost.
    Rule(
        "greedy-fell",
        lambda run: (
            run.greedy
            and not run.is_solved
            and run.keep != "best"
            and run.best_greedy.exceeds(run.last_greedy, GREEDY_ERRORS)
            and "act"
        ),
        "The greedy reward has fallen from its best, {run.best_greedy.value:.3g} at step "
        "{run.best_greedy.step}, to {run.last_greedy.value:.3g}. Updates follow samples or demonstrations, so look at "
        "what became of these too. " + KEEP_BEST,
    ),
    Rule(
        "greedy-gap",
        lambda run: (
            run.sampled
            and run.greedy
            and run.most
            and run.greedy[0].exceeds(run.most[0], GREEDY_ERRORS)
            and "watch"
        ),
        "Before training the greedy completions of held-out prompts earn {run.greedy[0].value:.3g}, the best "
        "of {run.eval_generations} samples {run.most[0].value:.3g}, all samples {run.sampled[0].value:.3g}. "
        "Updates follow the samples, so the greedy reward may fall. More demonstrations bring the two "
        "together, and so does a lower --temperature; it makes another policy, which is the one that is "
        "trained.",
    ),
    Rule(
        "truncation",
        lambda run: above(run.whole.cut, void=LOST_SHARE, act=0.1, watch=0.05),
        "{run.whole.cut:.0%} of the completions are cut off at {run.max_completion_length} tokens: {run.uncut}",
    ),
    Rule(
        "truncation",
        lambda run: run.step.cut == 1 and ("void" if run.is_misasked else "watch"),
        "Every completion was cut at {run.max_completion_length} tokens, so its reward says little: "
        "{run.uncut}",
    ),
    Rule(
        "unusual-rate",
        # 1e-2 is ten times 1e-3, but for rounding
        lambda run: (
            above(run.learning_rate, void=30 * run.usual_rate, watch=10.001 * run.usual_rate)
            or above(run.usual_rate, watch=30 * run.learning_rate)
        ),
        "The learning rate {run.learning_rate:g} is {run.times_usual:.3g} times the {run.usual_rate:g} that "
        "is usual.",
    ),
    Rule(
        "skipped",
        lambda run: above(run.skipped, void=LOST_SHARE, act=0.01, watch=0),
        "{run.skipped:.1%} of the updates were skipped because the gradient was not finite. Scale the rewards "
        "down, lower the learning rate, or try float32. On a GPU a kernel may be at fault: --training-attention eager.",
    ),
)
"""In the order of the findings."""
