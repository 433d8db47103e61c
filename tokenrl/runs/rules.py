"""One table of rules about what the numbers of a training mean.

A rule reads one record (see `runs.findings`) and returns a finding, or None. It keeps no state, and says
nothing if a number that it needs was not observed. A subject may have several rules; the first that finds
something speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import TypeAlias, TypeVar

from tokenrl.runs.findings import ENDLESS, LOST_SHARE, Finding, Observed, Weight

LEAST_ENTROPY = 0.1
"""In nats per action; below it a policy over discrete actions nearly always chooses the same one."""
MIN_ERRORS = 4.5
MIN_ERRORS_OF_BEST = 6.0
"""Standard errors by which the reward of a destroyed policy falls. Tested hundreds of times per run, a fall
of 2 standard errors is often chance; the best of several evaluations is biased upwards."""
GREEDY_ERRORS = 3.0  # of a difference that is judged once in a run
MAX_DIFFERENCE = 0.05
"""Nats per token between sampler and trainer. If chance decides their signs, the importance weights of
completions of 100 tokens spread by a factor of 1.9 around 1."""
OTHER_MODEL = 0.5
"""Nats per token that no rounding reaches: bfloat16 changes log-probabilities by .01 to .1."""
MAX_ABSTAINED = 0.02  # of completions to which a reward function gives no reward
BONUS = 0.01  # of entropy, to begin with, for advantages of a size near 1
SOLVED_ADVICE = (
    "The policy already solves these prompts: take harder ones, or evaluate it (tokenrl evaluate)."
)
Judgement: TypeAlias = "Finding | None"
T = TypeVar("T")


class Unobserved(LookupError):
    """A rule needs a number that was not observed, so it is silent."""


def judge(observed: Observed, *flags: str) -> list[Finding]:
    """Return the findings of all rules, or of some flags, at most one of each flag."""
    findings: dict[str, Finding] = {}
    for rule in RULES:
        try:
            finding = rule(observed)
        except Unobserved:
            continue
        if finding and (not flags or finding.flag in flags):
            findings.setdefault(finding.flag, finding)
    return list(findings.values())


def require(value: T | None) -> T:
    """Return a value that was observed.

    Raises:
        Unobserved: it was not, so it is None or nan.
    """
    if value is None or value != value:
        raise Unobserved
    return value


def above(number: float, watch: float = inf, act: float = inf, void: float = inf) -> Weight | None:
    """Return the gravest weight whose limit a number exceeds; None if it exceeds none."""
    if number > void:
        return "void"
    if number > act:
        return "act"
    return "watch" if number > watch else None


def policy_destroyed(observed: Observed) -> Judgement:
    """The reward fell by more than noise explains, and a sign shows that the policy can hardly recover.

    Held-out prompts may be easier than training prompts: the first step, made by the policy that was
    evaluated, shows by how much. A policy that has kept half of what it had learnt is not lost.
    """
    latest = require(observed.latest)
    best = max(observed.sampled, default=None)
    if not (best and latest.signs):
        return None
    reward = latest.reward.value
    learnt = best.value - observed.sampled[0].value
    is_fall = best.exceeds(latest.reward, MIN_ERRORS_OF_BEST if learnt > 0 else MIN_ERRORS)
    if not (is_fall and 2 * (latest.first + learnt - reward) > max(best.value - reward, learnt)):
        return None
    text = f"The policy is destroyed: the mean reward fell from {best.value:.3g} to {reward:.3g}"
    return too_fast(observed, "policy-destroyed", "void", f"{text}, and {latest.signs}.")


def entropy_low_at_end(observed: Observed) -> Judgement:
    """The policy chooses nearly always the same action.

    The bonus has the units of the advantages: of the spread of rewards, where they are not divided by it.
    """
    entropy = observed.recent.entropy
    if observed.has_entropy_bonus or not entropy < LEAST_ENTROPY:
        return None
    text = (
        f"The policy has an entropy of {entropy:.3g} nats per action: it makes nearly always the same choice. "
        "Unless that is right, set --estimator.entropy-coef or a lower learning rate."
    )
    if observed.is_solved:
        return Finding("entropy-collapsed", "watch", text)
    bonus = BONUS
    if observed.num_envs and observed.scale == "none":
        spread = require(observed.early.spread) * require(observed.reward_scale)
        bonus = rounded(BONUS * (spread or 1.0))
    return Finding("entropy-collapsed", "act", text, {"estimator.entropy_coef": bonus})


def sampling_differs(observed: Observed) -> Judgement:
    """The sampler's log-probabilities differ from the trainer's: in float32 by 1e-6, in bfloat16 by .01 to .1."""
    difference = observed.recent.logp_difference
    share = observed.recent.effective_samples
    is_far = difference > MAX_DIFFERENCE or share < LOST_SHARE
    if observed.importance_centre or not is_far:
        return None
    advice = "Sample and train in one precision, or change --estimator.importance."
    if observed.sync_every > 1:
        advice = (
            "The sampler has weights of earlier steps: lower --sync-every or the learning rate, or correct for them "
            "by --estimator.importance."
        )
    elif difference > OTHER_MODEL:
        advice = (
            "No precision differs so much: the sampler has another model, other weights, or another prompt or "
            "temperature. Check what it loads, and that it takes over the weights after each update."
        )
    text = (
        f"Log-probabilities of sampling and training differ by {difference:.2g} nats per token; "
        f"the effective sample size is {share:.0%} of the completions. {advice}"
    )
    return Finding("sampling-differs", "void" if share < LOST_SHARE else "act", text)


def rewards_abstain(observed: Observed) -> Judgement:
    """A reward function gave more than a few completions no reward."""
    for metric, share in observed.abstained.items():
        name = metric.split("/", 1)[1].removesuffix("/abstained")
        text = (
            f"The reward function {name} gave no reward to {share:.0%} of the completions. Where others give one, "
            "it counts as 0 in their sum, so right completions are pushed down too, unless --on-abstain "
            f"leave-out leaves these completions out of their groups. {observed.faults.get(name, '')}"
        )
        if share > MAX_ABSTAINED:
            return Finding("rewards-abstain", "watch", text.strip())
    return None


def no_signal_in_trial(observed: Observed) -> Judgement:
    """All or nearly all rewards that were compared before training are equal."""
    groups = require(observed.groups)
    trial = observed.step
    weight = above(trial.equal, watch=0.9, void=0.999)
    text = f"In {trial.equal:.0%} of {groups} the rewards are equal. Only the others can teach anything."
    if weight == "void":
        text = f"In none of {groups} do the rewards differ; their mean is {trial.reward:.3g}."
    if observed.others_differ:
        weight = weight and "watch"
    return weight and Finding("no-signal", weight, f"{text} {remedy(observed, trial.reward)}")


def no_signal_in_steps(observed: Observed) -> Judgement:
    """No rewards differed in several steps in a row; if the reward was higher before, the policy is lost."""
    count = require(observed.idle_steps)
    reward = require(observed.step.reward)
    text = (
        f"In {count} steps in a row no two rewards that are compared differed, so there is nothing to learn "
        f"from: the mean reward is {reward:.3g}"
    )
    for before in observed.sampled[:1]:
        if reward < before.value - 3 * before.error:
            text += f", down from {before.value:.3g} before training."
            return too_fast(observed, "no-signal", "void", text)
    return Finding("no-signal", "void", f"{text}. {remedy(observed, reward)}")


def lost_from_start(observed: Observed) -> Judgement:
    """Nothing was gained, and the first tenth of the steps shows why: a low entropy alone is no fault."""
    early = observed.early
    if require(observed.gain_of_arm) > 0:
        return None
    if early.entropy < LEAST_ENTROPY and not observed.has_entropy_bonus:
        text = (
            f"Nothing was gained, and the entropy was {early.entropy:.3g} nats from the start on."
        )
        return Finding("entropy-collapsed", "act", text)
    text = f"Nothing was gained: {early.equal:.0%} of the first groups had equal rewards."
    return Finding("no-signal", "act", text) if early.equal > LOST_SHARE else None


def little_signal_at_end(observed: Observed) -> Judgement:
    """Many groups of the last tenth of the steps have equal rewards."""
    equal = observed.recent.equal
    weight = above(equal, watch=LOST_SHARE / 2, act=LOST_SHARE)
    text = f"{equal:.0%} of the groups or steps that are compared have equal rewards and so no gradient."
    if weight == "act" and observed.is_solved:
        return Finding(
            "no-signal", "watch", f"{text} The task is too easy by now: take a harder one."
        )
    changes = {"num_generations": 2 * (observed.num_generations or 1)}
    if observed.num_envs:
        changes = {"num_envs": 2 * observed.num_envs}
    text = f"{text} {remedy(observed)}"
    return weight and Finding("no-signal", weight, text, changes if weight == "act" else {})


def nothing_learnt(observed: Observed) -> Judgement:
    """The reward of the held-out prompts gained at most two standard errors."""
    gain = require(observed.gain)
    if not gain.value <= 2 * gain.error:
        return None
    text = (
        f"The held-out reward was {gain.before:.3g} before training, and has changed by {gain.value:.2g} ± "
        f"{gain.error:.1g}. "
    )
    if gain.value < -2 * gain.error:
        return too_fast(observed, "nothing-learnt", "act", f"{text}It has fallen.")
    advice = "More steps, more completions a step or a higher rate may give one."
    if gain.before >= observed.pass_mark:
        advice = f"Little was left to gain. {SOLVED_ADVICE}"
    elif gain.equal >= LOST_SHARE:
        advice = (
            f"In {gain.equal:.0%} of the steps no two rewards that are compared differed. "
            f"{remedy(observed)}"
        )
    return Finding("nothing-learnt", "act", f"{text}It is no gain beyond noise. {advice}")


def greedy_fell(observed: Observed) -> Judgement:
    """The greedy reward is lower than at its best, whatever the reward of samples, and its weights are lost."""
    best = max(observed.greedy, default=None)
    if best is None or observed.is_solved or observed.keep == "best":
        return None
    after = observed.greedy[-1]
    if not best.exceeds(after, GREEDY_ERRORS):
        return None
    text = (
        f"The greedy reward has fallen from its best, {best.value:.3g} at step {best.step}, to "
        f"{after.value:.3g}. No update follows it: samples or demonstrations may get better at the same "
        "time. With --keep best model/ gets the weights of the best evaluation."
    )
    return Finding("greedy-fell", "act", text, {"keep": "best"})


def samples_below_greedy(observed: Observed) -> Judgement:
    """Before training the best of several samples earns less than the greedy completion of the same prompt."""
    if not (observed.sampled and observed.greedy and observed.most):
        return None
    greedy = observed.greedy[0]
    most = observed.most[0]
    if not greedy.exceeds(most, GREEDY_ERRORS):
        return None
    text = (
        f"Before training the greedy completions of held-out prompts earn {greedy.value:.3g}, the best of "
        f"{require(observed.eval_generations)} samples {most.value:.3g}, all samples {observed.sampled[0].value:.3g}. "
        "Updates follow the samples, so the greedy reward may fall. More demonstrations bring the two together, "
        "and so does a lower --temperature; it makes another policy, which is the one that is trained."
    )
    return Finding("greedy-gap", "watch", text)


def all_completions_cut(observed: Observed) -> Judgement:
    """The limit cuts all completions of a step."""
    if observed.step.cut != 1:
        return None
    limit = require(observed.max_completion_length)
    text = (
        f"Every completion was cut at {limit} tokens, so its reward says little: {observed.uncut}"
    )
    return Finding("truncation", "void" if observed.is_misasked else "watch", text)


def completions_cut(observed: Observed) -> Judgement:
    """The limit cuts a part of the completions."""
    cut = observed.recent.cut
    limit = require(observed.max_completion_length)
    weight = above(cut, watch=0.05, act=0.1, void=LOST_SHARE)
    text = f"{cut:.0%} of the completions are cut off at {limit} tokens. Raise --max-completion-length."
    if weight == "void":
        text = f"{text} {ENDLESS}"
    changes = {} if weight == "watch" else {"max_completion_length": 2 * limit}
    return weight and Finding("truncation", weight, text, changes)


def unusual_rate(observed: Observed) -> Judgement:
    """The learning rate is far from what is usual."""
    rate = require(observed.learning_rate)
    usual = min(max(rate, require(observed.lowest_rate)), require(observed.highest_rate))
    ratio = rate / usual
    weight = above(ratio, watch=10.001, void=30)  # 1e-2 is ten times 1e-3, but for rounding
    weight = weight or above(1 / ratio, watch=30)
    text = f"The learning rate {rate:g} is {ratio:.3g} times the {usual:g} that is usual."
    return weight and Finding("unusual-rate", weight, text, {"learning_rate": usual})


def updates_skipped(observed: Observed) -> Judgement:
    """Updates were skipped because their gradient was not finite."""
    share = require(observed.skipped)
    weight = above(share, watch=0, act=0.01, void=LOST_SHARE)
    changes = {} if weight == "watch" else {"learning_rate": require(observed.learning_rate) / 2}
    text = (
        f"{share:.1%} of the updates were skipped because the gradient was not finite. Scale the rewards "
        "down, lower the learning rate, or try float32."
    )
    return weight and Finding("skipped", weight, text, changes)


RULES: tuple[Callable[[Observed], Judgement], ...] = (
    policy_destroyed,
    entropy_low_at_end,
    sampling_differs,
    rewards_abstain,
    no_signal_in_trial,
    no_signal_in_steps,
    lost_from_start,
    little_signal_at_end,
    nothing_learnt,
    greedy_fell,
    samples_below_greedy,
    completions_cut,
    all_completions_cut,
    unusual_rate,
    updates_skipped,
)
"""In the order of the findings."""


def too_fast(observed: Observed, flag: str, weight: Weight, text: str) -> Finding:
    """Return a finding about a loss, of which the learning rate is the likely cause, with a lower rate."""
    rate = require(observed.learning_rate)
    usual = observed.highest_rate or rate
    advised = usual if usual < rate else rate / 4
    text += f" The learning rate, {rate:g}, is the likely cause: try --learning-rate {advised:g}."
    return Finding(flag, weight, text, {"learning_rate": advised})


def remedy(observed: Observed, reward: float = nan) -> str:
    """Say what helps most where rewards do not differ, whose mean is `reward`."""
    cut = observed.step.cut
    if observed.num_envs:
        return "Reward steps towards the goal, or try more or longer episodes (--num-envs, --num-steps)."
    if reward >= observed.pass_mark:
        return SOLVED_ADVICE
    if observed.can_warm_start:
        return "This model cannot do the task yet: add --warm-start, to begin with the task's demonstrations."
    if cut >= LOST_SHARE:
        limit = observed.max_completion_length
        return (
            f"{cut:.0%} of completions are cut at {limit} tokens, before an end: {observed.uncut}"
        )
    advice = (
        "Use prompts that the policy sometimes solves, a graded reward, demonstrations (tokenrl sft), "
        "or more generations per prompt."
    )
    if reward == 0:
        advice += " If the reward compares texts with a column of numbers, which are never equal, write str(answer)."
    return advice


def rounded(number: float, figures: int = 1) -> float:
    """Round to a few significant figures, where only the order of magnitude matters."""
    return float(f"{number:.{figures}g}")
