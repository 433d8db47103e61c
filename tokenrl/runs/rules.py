"""One table of rules about what the numbers of a training mean: a rule for each subject, with levels.

A rule reads facts (see `runs.findings`) and returns how grave they are, in which sentence, and which settings
to change. It keeps no state. A missing fact silences what needs it, so whoever fills the facts decides which
rules speak: the step of a training, a check, the end of a run, a diagnosis, an arm of a comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot, inf
from typing import Any

from tokenrl.core.refusals import LONGEST_WITHOUT_BASELINE
from tokenrl.runs.findings import (
    LOST_SHARE,
    RULES,
    SOLVED_ADVICE,
    Facts,
    Finding,
    Judgement,
    above,
    lower_rate,
    remedy,
    rounded,
    rule,
)

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
BONUS = 0.01  # of entropy, to begin with, for advantages of a size near 1


def judge(facts: Mapping[str, Any], *flags: str) -> list[Finding]:
    """Return the findings of all rules, or of some flags; a fact that is None or nan counts as missing."""
    missing = {name for name, x in facts.items() if x is None or (isinstance(x, float) and x != x)}
    present = Facts({name: facts[name] for name in facts.keys() - missing})
    findings = []
    for flag, function, precedence in RULES:
        if flags and flag not in flags:
            continue
        try:
            weight, text, *changes = function(present) or (None, "")
            text = text.format_map(present)
        except KeyError:  # the sentence needs a fact that is missing
            continue
        if weight is not None:
            findings.append(Finding(flag, weight, text, dict(*changes), precedence))
    return findings


@rule("policy-destroyed", precedence=2)
def policy_destroyed(facts: Facts) -> Judgement:
    """The reward fell by more than noise explains, and a sign shows that the policy can hardly recover.

    Held-out prompts may be easier than training prompts: the first step, made by the policy that was
    evaluated, shows by how much. A policy that has kept half of what it had learnt is not lost.
    """
    fall = facts.best_reward - facts.latest_reward
    learnt = facts.best_reward - facts.before_reward
    errors = MIN_ERRORS_OF_BEST if learnt > 0 else MIN_ERRORS
    is_fall = fall > errors * hypot(facts.best_stderr, facts.latest_stderr)
    loss = facts.first_reward + learnt - facts.latest_reward
    if not (is_fall and 2 * loss > max(fall, learnt) and facts.signs):
        return None
    cause, changes = lower_rate(facts)
    evaluation = "at its best" if learnt > 0 else "before training"
    text = (
        "The policy is destroyed: in {steps} the mean reward fell from {best_reward:.3g} "
        f"(evaluation {evaluation}) to {{latest_reward:.3g}}, and {{signs}}. "
    )
    return "void", text + cause, changes


@rule("entropy-collapsed")
def entropy_collapsed(facts: Facts) -> Judgement:
    """The policy chooses nearly always the same action, in training before half of what is to learn is learnt.

    In a comparison it did from the start, and learnt nothing: a low entropy alone is no fault. The bonus has
    the units of the advantages: of the spread of rewards, `early_spread`, where they are not divided by it.
    """
    aim = facts.get("solved_at", facts.first_reward)
    is_early = facts.latest_reward <= (facts.first_reward + aim) / 2
    if is_early and facts.latest_entropy < facts.first_entropy / 4:
        cause, changes = lower_rate(facts)
        text = (
            "The policy has collapsed: in {steps} the mean reward was {latest_reward:.3g}, after "
            "{first_reward:.3g} in step 1, and {signs}. "
        )
        return "act", text + cause, changes
    if facts.groups and facts.step_entropy < LEAST_ENTROPY:
        text = "The policy nearly always writes the same ({step_entropy:.2g} nats a token): raise --temperature."
        return above(-facts.step_entropy, watch=-LEAST_ENTROPY, void=-0.01), text
    has_bonus = facts.has_entropy_bonus
    if not has_bonus and facts.early_entropy < LEAST_ENTROPY and facts.gain <= 0:
        text = "In the first tenth of the steps the entropy was {early_entropy:.3g} nats, the gain {gain:+.2g}."
        return "act", text
    if has_bonus or not facts.recent_entropy < LEAST_ENTROPY:
        return None
    text = (
        "the policy has an entropy of {recent_entropy:.3g} nats per action: it makes nearly always the "
        "same choice. Unless that is right, set --estimator.entropy-coef or a lower learning rate."
    )
    if facts.is_solved:
        return "watch", text
    bonus = BONUS
    if "num_envs" in facts and facts.scale == "none":
        bonus = rounded(BONUS * (facts.early_spread or 1.0) * (facts.reward_scale or 1.0))
    return "act", text, {"estimator.entropy_coef": bonus}


@rule("sampling-differs")
def sampling_differs(facts: Facts) -> Judgement:
    """The sampler's log-probabilities differ from the trainer's: in a check by `gap` nats a token.

    In float32 they differ by 1e-6, in bfloat16 by .01 to .1.
    """
    precision = "Use --mixed-precision no" if facts.is_half else "Use --dtype float32"
    weight = above(facts.gap, watch=0.005, void=0.5 if facts.is_half else 0.05)
    if weight:
        text = (
            "Sampler and training differ by {gap:.2g} nats per token, {largest_gap:.2g} at most. "
        )
        return weight, f"{text}{facts.short_texts or precision}."
    is_far = facts.recent_logp_difference > MAX_DIFFERENCE
    if facts.importance_centre or not (is_far or facts.recent_effective_samples < LOST_SHARE):
        return None
    text = (
        "Log-probabilities of sampling and training differ by {recent_logp_difference:.2g} nats per token; "
        "the effective sample size is {recent_effective_samples:.0%} of the completions. "
        f"{facts.short_texts or 'Sample and train in one precision'}, or change --estimator.importance, "
        "which is {importance}."
    )
    return "act", text


@rule("no-signal")
def no_signal(facts: Facts) -> Judgement:
    """Rewards that are compared are equal, so that there is little or nothing to learn from.

    In a check `groups` says how many groups were compared in the trial steps; `others_differ` says that other
    samples of the same policy have unequal rewards. In training no rewards differed in as many steps in a row
    as `patience` says (three); `had_signal` says whether they did in an earlier step.
    """
    if facts.groups and facts.step_equal == 1:
        text = "In none of {groups} do the rewards differ; their mean is {step_reward:.3g}. "
        return "watch" if facts.others_differ else "void", text + remedy(facts)
    if facts.groups and facts.step_equal >= 0.9:
        text = "In {step_equal:.0%} of {groups} the rewards are equal. Only the others can teach anything. "
        return "watch", text + remedy(facts)
    if "had_signal" in facts and facts.steps_without_signal >= facts.get("patience", 3):
        text = (
            "In {steps_without_signal} steps in a row no two rewards that are compared differed, so there is "
            "nothing to learn from: the mean reward is {step_reward:.3g}"
        )
        if not (
            facts.had_signal and facts.step_reward < facts.before_reward - 3 * facts.before_stderr
        ):
            return "void", f"{text}. {remedy(facts)}"
        cause, changes = lower_rate(facts)
        return "void", f"{text}, down from {{before_reward:.3g}} before training. {cause}", changes
    if facts.early_equal > LOST_SHARE and facts.gain <= 0:
        text = "In {early_equal:.0%} of the groups at the start all rewards were equal, the gain {gain:+.2g}."
        return "act", text
    weight = above(facts.recent_equal, watch=LOST_SHARE / 2, act=LOST_SHARE)
    text = "{recent_equal:.0%} of the groups or steps that are compared have equal rewards and so no gradient"
    if weight == "act" and facts.is_easy:
        return "watch", f"{text}: it is too easy by now, so take a harder task."
    sizes = ("num_generations",) if facts.needs_groups else ("prompts_per_step", "num_envs")
    changes = {name: 2 * facts[name] for name in sizes if name in facts and weight == "act"}
    return weight, f"{text}. {remedy(facts)}", changes


@rule("already-solved")
def already_solved(facts: Facts) -> Judgement:
    """Before training, the completions that `who` describes reach `pass_mark`, the reward of right ones."""
    text = "{who} already have a mean reward of {before_greedy:.3g}. " + SOLVED_ADVICE
    return "watch" if facts.before_greedy >= facts.pass_mark else None, text


@rule("nothing-learnt")
def nothing_learnt(facts: Facts) -> Judgement:
    """The reward of the `held_out` prompts gained at most two standard errors; `gain` is paired by prompt.

    `share_without_signal` is the share of all steps in which no rewards differed.
    """
    if not facts.gain <= 2 * facts.gain_stderr:
        return None
    text = (
        "the held-out reward was {before_reward:.3g} before training and {after_reward:.3g} after it, a "
        "difference of {gain:.2g} ± {gain_stderr:.1g} over {held_out} prompts. "
    )
    if facts.gain < -2 * facts.gain_stderr:
        cause, changes = lower_rate(facts)
        return "act", f"{text}It has fallen. {cause}", changes
    advice = "More steps, more completions a step or a higher rate may give one."
    if facts.before_reward >= facts.pass_mark:
        advice = f"Little was left to gain. {SOLVED_ADVICE}"
    elif facts.share_without_signal >= LOST_SHARE:
        advice = (
            "In {share_without_signal:.0%} of the steps no two rewards that are compared differed. "
        )
        advice += remedy(facts)
    return "act", f"{text}It is no gain beyond noise. {advice}"


@rule("reward-fell")
def reward_fell(facts: Facts) -> Judgement:
    """The reward is lower than at its best, `peak_reward`, by more than chance."""
    text = "The reward has fallen from its best, {peak_reward:.3g} at step {peak_step}, to {now_reward:.3g}."
    weight = "act" if facts.fell and not facts.is_solved else None
    return weight, text, {"learning_rate": facts.learning_rate / 2}


@rule("greedy-fell")
def greedy_fell(facts: Facts) -> Judgement:
    """The greedy reward is lower than at its best, whatever the reward of samples, and its weights are lost."""
    error = hypot(facts.best_greedy_stderr, facts.after_greedy_stderr)
    fall = facts.best_greedy_reward - facts.after_greedy_reward
    if facts.is_solved or facts.keep == "best" or not fall > GREEDY_ERRORS * error:
        return None
    text = (
        "The greedy reward has fallen from its best, {best_greedy_reward:.3g} at step {best_greedy_step}, to "
        "{after_greedy_reward:.3g}. No update follows it: samples or demonstrations may get better at the "
        "same time. With --keep best model/ gets the weights of the best evaluation."
    )
    return "act", text, {"keep": "best"}


@rule("greedy-gap")
def samples_below_greedy(facts: Facts) -> Judgement:
    """Before training the best of several samples earns less than the greedy completion of the same prompt."""
    error = hypot(facts.before_greedy_stderr, facts.before_most_stderr)
    gap = facts.before_greedy_reward - facts.before_most_reward
    text = (
        "Before training the greedy completions of held-out prompts earn {before_greedy_reward:.3g}, the best "
        "of {eval_generations} samples {before_most_reward:.3g}, all samples {before_reward:.3g}. Updates "
        "follow the samples, so the greedy reward may fall. More demonstrations bring the two together, and so "
        "does a lower --temperature; it makes another policy, and that is the policy that every estimator trains."
    )
    return "watch" if gap > GREEDY_ERRORS * error else None, text


@rule("reward-flat", precedence=0)
def reward_flat(facts: Facts) -> Judgement:
    """The reward has not changed by more than its noise; `is_early` if less than half of a run is done."""
    if "gained" not in facts or facts.gained or facts.fell or facts.is_solved:
        return None
    text = "The reward has not changed by more than its noise"
    if facts.is_early:
        return "watch", f"{text}, but less than half of the run is done."
    return "act", f"{text}.", {"learning_rate": 2 * facts.learning_rate}


@rule("still-rising")
def still_rising(facts: Facts) -> Judgement:
    """The reward was still `rising` when the run ended; `is_whole` if that was its last step."""
    changes = {"max_steps": 2 * facts.max_steps} if facts.is_whole else {}
    text = "The reward was still rising when the run ended."
    return "watch" if facts.rising and not facts.is_solved else None, text, changes


@rule("truncation")
def truncation(facts: Facts) -> Judgement:
    """The limit cuts all completions of a step, or a part of later ones, or most episodes.

    `uncut` is the remedy, and `is_misasked` says that it is sure. `room` is the number of tokens that the
    model's context leaves for completions; `horizon` is the most steps of an episode.
    """
    if facts.step_cut == 1:
        text = "Every completion was cut at {max_completion_length} tokens, so its reward says little: {uncut}"
        return "void" if facts.is_misasked else "watch", text
    if weight := above(facts.recent_cut, watch=0.05, act=0.1, void=LOST_SHARE):
        limit = facts.max_completion_length
        longer = min(2 * limit, facts.get("room", inf))
        text = "{recent_cut:.0%} of the completions are cut off at {max_completion_length} tokens. "
        if not longer > limit:
            return weight, f"{text}The model's context leaves no more."
        changes = {} if weight == "watch" else {"max_completion_length": longer}
        return weight, f"{text}Raise --max-completion-length.", changes
    if facts.is_solved or not facts.recent_length > 0.9 * facts.horizon > 0.9:
        return None
    text = "Episodes last {recent_length:.3g} of at most {horizon} steps, so that the limit ends most of them"
    if facts.gained:
        return "watch", f"{text}; fine where lasting long is the aim."
    return "act", f"{text}.", {"max_episode_steps": 2 * facts.horizon}


@rule("unusual-rate")
def unusual_rate(facts: Facts) -> Judgement:
    """The rate is far from what is usual for `whose`: between `lowest_rate` and `highest_rate`."""
    rate = facts.learning_rate
    usual = min(max(rate, facts.lowest_rate), facts.highest_rate)
    weight = above(rate / usual, watch=10.001, void=30)  # 1e-2 is ten times 1e-3, but for rounding
    text = (
        f"The learning rate {rate:g} is {rate / usual:.3g} times the {usual:g} that is usual for {{whose}}. "
        f"Set --learning-rate {usual:g}."
    )
    return weight or above(usual / rate, watch=30), text, {"learning_rate": usual}


@rule("skipped")
def updates_skipped(facts: Facts) -> Judgement:
    """Shares of the updates have a gradient that is not finite (`skipped`), or none at all (`idle`).

    For a trial step whose gradient is not finite readers give inf, since nan would count as missing.
    """
    if facts.step_grad_norm == inf:
        text = "The gradient is not finite; such updates are skipped. Scale the rewards down, or try float32."
        return "void", text
    if facts.skipped == 0 and facts.idle >= LOST_SHARE / 2:
        return "watch", "{idle:.0%} of the updates had no gradient and left the weights alone."
    weight = above(facts.skipped, watch=0, act=0.01)
    changes = {"learning_rate": facts.learning_rate / 2} if weight == "act" else {}
    text = "{skipped:.1%} of the updates were skipped because the gradient was not finite."
    return weight, text, changes


@rule("clipped-updates")
def gradient_clipped(facts: Facts) -> Judgement:
    """The bound of the gradient's norm decides the size of most steps; `grad_clipped` is their share."""
    text = (
        "The gradient was clipped in {grad_clipped:.0%} of the updates: the bound sets their size."
    )
    return above(facts.grad_clipped, watch=LOST_SHARE), text


@rule("clipping")
def ratios_clipped(facts: Facts) -> Judgement:
    """Many importance ratios are clipped in the later passes over a rollout."""
    weight = above(facts.recent_clip_ratio, watch=0.15, act=0.3)
    changes = {"num_iterations": facts.num_iterations // 2}
    if not facts.num_iterations > 1:
        changes = {"learning_rate": facts.learning_rate / 2}
    text = "{recent_clip_ratio:.1%} of the tokens are clipped (num_iterations {num_iterations})."
    return weight, text, changes if weight == "act" else {}


@rule("kl")
def kl_off_target(facts: Facts) -> Judgement:
    """The KL is far off `target_kl`; or without a target it grew from `peak_kl`, while the reward fell."""
    text = "The KL is {recent_kl:.3g} nats per completion, "
    if "target_kl" in facts:
        error = facts.recent_kl / facts.target_kl - 1
        text += f"{error:+.0%} off its target {{target_kl:g}}."
        if error > 1:
            return "act", text, {"estimator.beta": 2 * facts.beta}
        return above(abs(error), watch=0.2), text
    if not (facts.fell and 0 < facts.peak_kl < facts.recent_kl):
        return None
    changes = {"target_kl": rounded(facts.peak_kl, 2)}
    return "act", f"{text}up from {{peak_kl:.3g}} where the reward was best.", changes


@rule("critic")
def critic_adds_noise(facts: Facts) -> Judgement:
    """The critic explains less than nothing; with targets far from size 1 the scale of rewards may be why."""
    if facts.is_solved or not facts.recent_explained_variance < 0:
        return None
    text = "The critic explains {recent_explained_variance:.0%} of the variance of returns: it adds noise"
    if facts.gained:
        return "watch", f"{text}, though the reward rises."
    spread = facts.early_spread or 1.0
    changes = {"value_learning_rate": 2 * facts.get("value_learning_rate", facts.learning_rate)}
    if not 1 / 3 < spread * facts.get("reward_scale", 1.0) < 3:
        changes = {"reward_scale": rounded(1 / spread)}
    return "act", f"{text}.", changes if "num_envs" in facts else {}


@rule("no-baseline")
def no_baseline(facts: Facts) -> Judgement:
    """Nothing is subtracted from the return of many actions; an episode has at most `horizon` actions."""
    if facts.get("has_baseline", True):
        return None
    changes = {"estimator.baseline": "running_mean"}
    if facts.num_generations > 1:
        changes = {"estimator.baseline": "rloo"}
    elif facts.num_envs > 1:
        changes = {"estimator.baseline": "timestep_mean", "estimator.returns": "reward_to_go"}
    weight = above(facts.horizon, watch=1, act=LONGEST_WITHOUT_BASELINE)
    text = "Episodes may last {horizon:,} actions, and no baseline is subtracted: noise hides their effects."
    return weight, text, changes


@rule("slow-reward")
def slow_reward(facts: Facts) -> Judgement:
    """The `slowest_reward` takes most of the time of a step, in the mean of `timed_steps` steps."""
    is_slow = facts.reward_seconds > max(1.0, facts.step_seconds / 2)
    if not (is_slow and facts.timed_steps >= 5):
        return None
    text = "The reward {slowest_reward} took {reward_seconds:.1f} of {step_seconds:.1f} seconds per step. "
    return "watch", f"{text}Score all completions together, or make it async."
