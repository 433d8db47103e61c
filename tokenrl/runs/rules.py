"""One table of rules about what the numbers of a training mean.

A rule reads facts (see `runs.findings`) and says how grave they are, in which sentence, and which settings to
change. It names the facts that it needs, and it remembers nothing. `judge` asks each rule whose facts are
all there. So whoever reads the facts decides which rules speak: the step of a training, a check, the end of
a run, the diagnosis of a run directory, an arm of a comparison::

    for finding in judge(facts(rows, settings, "recent")):
        print(finding.weight, finding)  # void truncation: 70% of the completions are cut off at 64 tokens ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tokenrl.core.baselines import LONGEST_WITHOUT_BASELINE
from tokenrl.runs.findings import (
    APART,
    MOST,
    SOLVED,
    Facts,
    Finding,
    Weight,
    doubled,
    lower_rate,
    remedy,
)

Judgement = tuple[Weight | None, str] | tuple[Weight | None, str, Mapping[str, Any]]
"""What a rule returns: the weight (None for nothing), the sentence with facts in braces, the changes."""
RULES: list[tuple[str, frozenset[str], Callable[[Facts], Judgement]]] = []
"""The table, in the order in which findings are told: a flag, the facts without which the rule is not asked,
and the rule itself. It reads settings too, which are always there, and other facts with a default."""
LEAST_ENTROPY = 0.1
"""In nats per action; below it a policy over discrete actions nearly always chooses the same one."""
SURE, SURE_OF_BEST = 4.5, 6.0
"""Standard errors by which the reward of a destroyed policy falls: from the evaluation before training, or
from the best of several. A run looks hundreds of times, so 2 are often chance, and the best was lucky too."""
BONUS = 0.01
"""The entropy bonus to begin with, for advantages of a size near 1."""


def rule(flag: str, needs: str) -> Callable[[Callable[[Facts], Judgement]], None]:
    """Enter a rule into the table: its flag, and the names of the facts that it needs."""
    return lambda function: RULES.append((flag, frozenset(needs.split()), function))


def above(
    number: float, *, watch: float = math.inf, act: float = math.inf, void: float = math.inf
) -> Weight | None:
    """Return the gravest weight whose limit a number exceeds; None if it exceeds none."""
    return (
        "void" if number > void else "act" if number > act else "watch" if number > watch else None
    )


def judge(facts: Facts, *flags: str) -> list[Finding]:
    """Return what the rules find, or those with some flags; a fact that is None or nan counts as missing."""
    facts, findings = {k: v for k, v in facts.items() if v is not None and v == v}, []
    for flag, needs, function in RULES:
        if needs <= facts.keys() and flag in (flags or [flag]):
            weight, text, *changes = function(facts)
            if weight is not None:
                findings.append(Finding(flag, weight, text.format_map(facts), *changes))
    return findings


@rule(
    "policy-destroyed",
    "steps before_reward best_reward best_stderr first_reward latest_reward latest_stderr signs",
)
def policy_destroyed(facts: Facts) -> Judgement:
    """The reward fell by more than noise explains, and a sign shows that the policy can hardly recover.

    Held-out prompts may be easier than training prompts: the first step, of the policy that was evaluated,
    tells by how much. A policy that has kept half of what it had learnt is not lost.
    """
    best, latest = facts["best_reward"], facts["latest_reward"]
    fall, learnt = best - latest, best - facts["before_reward"]
    sure, when = (SURE_OF_BEST, "at its best") if learnt > 0 else (SURE, "before training")
    is_fall = fall > sure * math.hypot(facts["best_stderr"], facts["latest_stderr"])
    is_lost = 2 * (facts["first_reward"] + learnt - latest) > max(fall, learnt)
    cause, changes = lower_rate(facts)
    text = "The policy is destroyed: in {steps} the mean reward fell from {best_reward:.3g} (evaluation "
    text += f"{when}) to {{latest_reward:.3g}}, and {{signs}}. {cause}"
    return "void" if is_fall and is_lost and facts["signs"] else None, text, changes


@rule("entropy-collapsed", "steps first_reward first_entropy latest_reward latest_entropy signs")
def entropy_lost(facts: Facts) -> Judgement:
    """The entropy fell to a quarter before half of the way to the reward `solved_at` was gained."""
    (cause, changes), first = lower_rate(facts), facts["first_reward"]
    is_half = facts["latest_reward"] > (first + facts.get("solved_at", first)) / 2
    is_low = facts["latest_entropy"] < facts["first_entropy"] / 4
    text = "The policy has collapsed: in {steps} the mean reward was {latest_reward:.3g}, after "
    text += f"{{first_reward:.3g}} in step 1, and {{signs}}. {cause}"
    return "act" if is_low and not is_half else None, text, changes


@rule("entropy-collapsed", "recent_entropy")
def entropy_collapsed(facts: Facts) -> Judgement:
    """The policy is nearly deterministic, and has no entropy bonus.

    A bonus is in units of what the advantages are made of: of the spread of rewards, `early_spread`, where
    they are not divided by it. Readers leave `recent_entropy` out for a Gaussian head: the entropy of a
    density may be negative.
    """
    text = "the policy has an entropy of {recent_entropy:.3g} nats per action: it makes nearly always the "
    text += (
        "same choice. Unless that is right, set --estimator.entropy-coef or a lower learning rate."
    )
    if facts["recent_entropy"] >= LEAST_ENTROPY or facts.get("has_entropy_bonus"):
        return None, text
    if facts.get("is_solved"):
        return "watch", text
    unit = (facts.get("early_spread") or 1.0) * facts.get("reward_scale", 1.0)
    bonus = (
        float(f"{BONUS * unit:.1g}")
        if facts.get("scale") == "none" and "num_envs" in facts
        else BONUS
    )
    return "act", text, {"estimator.entropy_coef": bonus}


@rule("no-exploration", "early_entropy gain")
def no_exploration(facts: Facts) -> Judgement:
    """The policy hardly explored from the start and learnt nothing: a low entropy alone is no fault."""
    is_low = facts["early_entropy"] < LEAST_ENTROPY and not facts.get("has_entropy_bonus")
    text = "In the first tenth of the steps the entropy was {early_entropy:.3g} nats, the gain {gain:+.2g}."
    return "void" if is_low and facts["gain"] <= 0 else None, text


@rule("no-entropy", "step_entropy")
def no_entropy(facts: Facts) -> Judgement:
    """The policy to be trained nearly always writes the same completion."""
    text = "The policy nearly always writes the same ({step_entropy:.2g} nats a token): raise --temperature."
    return above(-facts["step_entropy"], watch=-LEAST_ENTROPY, void=-0.01), text


@rule("sampling-differs", "gap largest_gap")
def sampling_differs(facts: Facts) -> Judgement:
    """Sampler and trainer differ by `gap` nats a token, in float32 by 1e-6, in bfloat16 by .01 to .1."""
    mend, void = (
        ("Use --mixed-precision no", 0.5) if facts.get("is_half") else ("Use --dtype float32", 0.05)
    )
    mend = facts.get("short_texts") or mend
    text = f"Sampler and training differ by {{gap:.2g}} nats per token, {{largest_gap:.2g}} at most. {mend}."
    return above(facts["gap"], watch=0.005, void=void), text


@rule("off-policy", "recent_logp_difference recent_effective_samples importance")
def sampled_off_policy(facts: Facts) -> Judgement:
    """The sampler is another policy than the trainer's; see `language.training.mismatch` for the numbers."""
    is_off = facts["recent_logp_difference"] > APART or facts["recent_effective_samples"] < MOST
    text = "Log-probabilities of sampler and training differ by {recent_logp_difference:.2g} nats per token; "
    text += "completions are worth {recent_effective_samples:.0%} of as many of the policy's own. "
    text += facts.get("short_texts") or "Sample and train in one precision"
    text += ", or change --estimator.importance, which is {importance}."
    return "act" if is_off and not facts.get("importance_centre") else None, text


@rule("nothing-to-learn", "step_equal step_reward groups")
def nothing_to_learn(facts: Facts) -> Judgement:
    """No rewards differ in the trial steps of a check; `groups` says how many were compared.

    `others_differ` says that other samples of the same policy do, so that later steps may teach something.
    """
    text = "In none of {groups} do the rewards differ; their mean is {step_reward:.3g}. " + remedy(
        facts
    )
    return None if facts["step_equal"] < 1 else "watch" if facts.get(
        "others_differ"
    ) else "void", text


@rule("few-signals", "step_equal groups")
def few_signals(facts: Facts) -> Judgement:
    """Rewards differ in at most a tenth of the groups of the trial steps."""
    text = "In {step_equal:.0%} of {groups} the rewards are equal. Only the others can teach anything. "
    return "watch" if 0.9 <= facts["step_equal"] < 1 else None, text + remedy(facts)


@rule("no-signal", "steps_without_signal step_reward had_signal")
def no_signal(facts: Facts) -> Judgement:
    """In as many steps in a row as `patience` says (three) no rewards differed (`steps_without_signal`).

    `had_signal` says whether they did in an earlier step.
    """
    weight = above(facts["steps_without_signal"] + 1, void=facts.get("patience", 3))
    text = "In {steps_without_signal} steps in a row no two rewards that are compared differed, so there is "
    text += "nothing to learn from: the mean reward is {step_reward:.3g}"
    before, error = facts.get("before_reward", math.nan), facts.get("before_stderr", math.nan)
    if facts["had_signal"] and facts["step_reward"] < before - 3 * error:
        cause, changes = lower_rate(facts)
        return weight, f"{text}, down from {{before_reward:.3g}} before training. {cause}", changes
    return weight, f"{text}. {remedy(facts)}"


@rule("no-signal-at-start", "early_equal gain")
def no_signal_at_start(facts: Facts) -> Judgement:
    """Most groups had equal rewards in the first tenth of the steps, and nothing was learnt.

    Given only where groups are compared. Of two completions most have equal rewards in good health too.
    """
    text = "In {early_equal:.0%} of the groups at the start all rewards were equal, the gain {gain:+.2g}."
    return "void" if facts["early_equal"] > MOST and facts["gain"] <= 0 else None, text


@rule("signal", "recent_equal")
def signal(facts: Facts) -> Judgement:
    """Many groups have equal rewards by now; more samples of each step make that rarer."""
    weight = above(facts["recent_equal"], watch=MOST / 2, act=MOST)
    text = "{recent_equal:.0%} of the groups or steps that are compared have equal rewards and so no gradient"
    if weight == "act" and facts.get("is_easy"):
        return "watch", f"{text}: it is too easy by now, so take a harder task."
    names = ("num_generations",) if facts.get("needs_groups") else ("prompts_per_step", "num_envs")
    return weight, f"{text}. {remedy(facts)}", doubled(facts, *names) if weight == "act" else {}


@rule("already-solved", "before_greedy pass_mark who")
def already_solved(facts: Facts) -> Judgement:
    """Before training, the completions that `who` describes reach `pass_mark`, the reward of right ones."""
    text = "{who} already have a mean reward of {before_greedy:.3g}. "
    return "watch" if facts["before_greedy"] >= facts["pass_mark"] else None, text + SOLVED


@rule("nothing-learnt", "gain gain_stderr before_reward after_reward held_out share_without_signal")
def nothing_learnt(facts: Facts) -> Judgement:
    """The reward of the `held_out` prompts gained at most two standard errors; `gain` is paired by prompt.

    `share_without_signal` is the share of all steps in which no rewards differed.
    """
    gain, error, (advice, changes) = facts["gain"], facts["gain_stderr"], lower_rate(facts)
    text = "the held-out reward was {before_reward:.3g} before training and {after_reward:.3g} after it, a "
    text += "difference of {gain:.2g} ± {gain_stderr:.1g} over {held_out} prompts. "
    if gain < -2 * error:
        return "act", f"{text}It has fallen. {advice}", changes
    advice = "More steps, more completions a step or a higher rate may give one."
    if facts["before_reward"] >= facts.get("pass_mark", math.inf):
        advice = f"Little was left to gain. {SOLVED}"
    elif facts["share_without_signal"] >= MOST:
        advice = (
            "In {share_without_signal:.0%} of the steps no two rewards that are compared differed. "
        )
        advice += remedy(facts)
    return "act" if gain <= 2 * error else None, f"{text}It is no gain beyond noise. {advice}"


@rule("reward-fell", "fell peak_reward peak_step now_reward")
def reward_fell(facts: Facts) -> Judgement:
    """The reward is lower than at its best, `peak_reward`, by more than chance."""
    text = "The reward has fallen from its best, {peak_reward:.3g} at step {peak_step}, to {now_reward:.3g}."
    is_fall = facts["fell"] and not facts.get("is_solved")
    return "act" if is_fall else None, text, {"learning_rate": facts["learning_rate"] / 2}


@rule("reward-flat", "gained fell is_early")
def reward_flat(facts: Facts) -> Judgement:
    """The reward has not changed by more than its noise; `is_early` if less than half of a run is done."""
    is_flat = not (facts["gained"] or facts["fell"] or facts.get("is_solved"))
    text = "The reward has not changed by more than its noise"
    if is_flat and facts["is_early"]:
        return "watch", f"{text}, but less than half of the run is done."
    return "act" if is_flat else None, f"{text}.", {"learning_rate": 2 * facts["learning_rate"]}


@rule("still-rising", "rising is_whole")
def still_rising(facts: Facts) -> Judgement:
    """The reward was still `rising` when the run ended; `is_whole` if that was its last step."""
    changes = doubled(facts, "max_samples", "max_steps") if facts["is_whole"] else {}
    text = "The reward was still rising when the run ended."
    return "watch" if facts["rising"] and not facts.get("is_solved") else None, text, changes


@rule("all-truncated", "step_cut max_completion_length uncut")
def all_truncated(facts: Facts) -> Judgement:
    """Every completion of a step was cut; `uncut` is the remedy, and `is_misasked` says that it is sure."""
    text = "Every completion was cut at {max_completion_length} tokens, so its reward says little: {uncut}"
    return None if facts["step_cut"] < 1 else "void" if facts.get("is_misasked") else "watch", text


@rule("truncation", "recent_cut max_completion_length")
def truncation(facts: Facts) -> Judgement:
    """The limit cuts a part of the completions; `room` is what the model's context leaves for them."""
    limit = facts["max_completion_length"]
    longer = min(2 * limit, facts.get("room", math.inf))
    text = "{recent_cut:.0%} of the completions are cut off at {max_completion_length} tokens. "
    text += (
        "Raise --max-completion-length."
        if longer > limit
        else "The model's context leaves no more."
    )
    weight = above(facts["recent_cut"], watch=0.05, act=0.1, void=MOST)
    return (
        weight,
        text,
        {"max_completion_length": longer} if weight != "watch" and longer > limit else {},
    )


@rule("truncation", "recent_length horizon")
def episodes_cut(facts: Facts) -> Judgement:
    """The time limit ends most episodes, `horizon` being the most steps of one."""
    text = "Episodes last {recent_length:.3g} of at most {horizon} steps, so that the limit ends most of them"
    is_cut = facts["recent_length"] > 0.9 * facts["horizon"] > 0.9 and not facts.get("is_solved")
    if is_cut and facts.get("gained"):
        return "watch", f"{text}; fine where lasting long is the aim."
    return "act" if is_cut else None, f"{text}.", {"max_episode_steps": 2 * facts["horizon"]}


@rule("unusual-rate", "learning_rate lowest_rate highest_rate whose")
def unusual_rate(facts: Facts) -> Judgement:
    """The rate is far from what is usual for `whose`: between `lowest_rate` and `highest_rate`."""
    rate = facts["learning_rate"]
    usual = min(max(rate, facts["lowest_rate"]), facts["highest_rate"])
    text = (
        f"The learning rate {rate:g} is {rate / usual:.3g} times the {usual:g} that is usual for "
    )
    weight = above(rate / usual, watch=10.001, void=30)  # 1e-2 is ten times 1e-3, but for rounding
    text += f"{{whose}}. Set --learning-rate {usual:g}."
    return weight or above(usual / rate, watch=30), text, {"learning_rate": usual}


@rule("gradient-not-finite", "step_grad_norm")
def gradient_not_finite(facts: Facts) -> Judgement:
    """The gradient of a trial step overflows; readers give inf, since nan would count as missing."""
    text = "The gradient is not finite; such updates are skipped. Scale the rewards down, or try float32."
    return None if math.isfinite(facts["step_grad_norm"]) else "void", text


@rule("skipped", "skipped learning_rate")
def updates_skipped(facts: Facts) -> Judgement:
    """A share of the updates was `skipped`, or left the weights alone (`idle`)."""
    if facts["skipped"] == 0 and facts.get("idle", 0) >= MOST / 2:
        return "watch", "{idle:.0%} of the updates had no gradient and left the weights alone."
    weight = above(facts["skipped"], watch=0, act=0.01)
    text = "{skipped:.1%} of the updates were skipped because the gradient was not finite."
    return weight, text, {"learning_rate": facts["learning_rate"] / 2} if weight == "act" else {}


@rule("clipped-updates", "grad_clipped")
def gradient_clipped(facts: Facts) -> Judgement:
    """The bound of the gradient's norm decides the size of most steps; `grad_clipped` is their share."""
    text = (
        "The gradient was clipped in {grad_clipped:.0%} of the updates: the bound sets their size."
    )
    return above(facts["grad_clipped"], watch=MOST), text


@rule("clipping", "recent_clip_ratio num_iterations")
def ratios_clipped(facts: Facts) -> Judgement:
    """Many importance ratios are clipped in the later passes over a rollout."""
    weight, passes = above(facts["recent_clip_ratio"], watch=0.15, act=0.3), facts["num_iterations"]
    text = "{recent_clip_ratio:.1%} of the tokens are clipped (num_iterations {num_iterations})."
    fewer = (
        {"num_iterations": passes // 2}
        if passes > 1
        else {"learning_rate": facts["learning_rate"] / 2}
    )
    return weight, text, fewer if weight == "act" else {}


@rule("kl", "recent_kl target_kl beta")
def kl_off_target(facts: Facts) -> Judgement:
    """The KL to the reference is far off `target_kl`."""
    error = facts["recent_kl"] / facts["target_kl"] - 1
    text = f"The KL is {{recent_kl:.3g}} nats per completion, {error:+.0%} off its target {{target_kl:g}}."
    weight = above(error, act=1) or above(abs(error), watch=0.2)
    return weight, text, {"estimator.beta": 2 * facts["beta"]} if weight == "act" else {}


@rule("kl", "fell peak_kl recent_kl")
def kl_grows(facts: Facts) -> Judgement:
    """The reward fell from its best while the KL grew from `peak_kl`, and there is no target to hold it."""
    is_growth = (
        facts["fell"] and "target_kl" not in facts and 0 < facts["peak_kl"] < facts["recent_kl"]
    )
    text = "The KL is {recent_kl:.3g} nats per completion, up from {peak_kl:.3g} where the reward was best."
    return "act" if is_growth else None, text, {"target_kl": float(f"{facts['peak_kl']:.2g}")}


@rule("critic", "recent_explained_variance")
def critic_adds_noise(facts: Facts) -> Judgement:
    """The critic explains less than nothing; with targets far from size 1 the scale of rewards may be why."""
    text = "The critic explains {recent_explained_variance:.0%} of the variance of returns: it adds noise"
    if facts["recent_explained_variance"] >= 0 or facts.get("is_solved"):
        return None, text
    if facts.get("gained"):
        return "watch", f"{text}, though the reward rises."
    spread, scale = facts.get("early_spread") or 1.0, facts.get("reward_scale", 1.0)
    changes = {"value_learning_rate": 2 * facts.get("value_learning_rate", facts["learning_rate"])}
    if not 1 / 3 < spread * scale < 3:
        changes = {"reward_scale": float(f"{1 / spread:.1g}")}
    return "act", f"{text}.", changes if "num_envs" in facts else {}


@rule("gradient-noise", "snr snr_stderr")
def gradient_noise(facts: Facts) -> Judgement:
    """The signal of an update is weak beside its noise; `snr` is their ratio. Larger batches raise it."""
    ratio, error = facts["snr"], facts["snr_stderr"]
    text = "The signal-to-noise ratio of an update is {snr:.3g} ± {snr_stderr:.1g}: "
    larger = doubled(facts, "prompts_per_step", "num_envs")
    if facts.get("is_solved") or ratio > max(0.1, 2 * error):
        return None, text
    if ratio > 2 * error:
        return "watch", f"{text}below 0.1 progress is slow.", larger
    text += "no signal can be told from the noise."
    return ("watch", text) if facts.get("gained") else ("act", text, larger)


@rule("no-baseline", "has_baseline horizon")
def no_baseline(facts: Facts) -> Judgement:
    """Nothing is subtracted from the return of many actions, of which an episode has at most `horizon`."""
    changes = {"estimator.baseline": "running_mean"}
    if facts.get("num_generations", 1) > 1:
        changes = {"estimator.baseline": "rloo"}
    elif facts.get("num_envs", 1) > 1:
        changes = {"estimator.baseline": "timestep_mean", "estimator.returns": "reward_to_go"}
    weight = above(
        0 if facts["has_baseline"] else facts["horizon"], watch=1, act=LONGEST_WITHOUT_BASELINE
    )
    text = "Episodes may last {horizon:,} actions, and no baseline is subtracted: noise hides their effects."
    return weight, text, changes


@rule("slow-reward", "timed_steps reward_seconds step_seconds slowest_reward")
def slow_reward(facts: Facts) -> Judgement:
    """The `slowest_reward` takes most of the time of a step, in the mean of `timed_steps` steps."""
    seconds, whole = facts["reward_seconds"], facts["step_seconds"]
    text = "The reward {slowest_reward} took {reward_seconds:.1f} of {step_seconds:.1f} seconds per step. "
    is_slow = facts["timed_steps"] >= 5 and seconds > max(1.0, whole / 2)
    return "watch" if is_slow else None, text + "Score all completions together, or make it async."


@rule("slow-machine", "rate_at_start rate_now length_ratio threads")
def slow_machine(facts: Facts) -> Judgement:
    """Sampling is far slower than at the start, though completions are about as long: see `slowing`."""
    text = "The last steps sampled {rate_now:,.0f} tokens per second, the first ones {rate_at_start:,.0f}, "
    text += "at similar lengths. Other work on this machine is the likely cause: look at what else it runs."
    if facts["threads"] > 1:
        text += (
            " On a CPU, {threads} threads then wait for each other: try --resume auto --threads 1."
        )
    is_slow = 3 * facts["rate_now"] < facts["rate_at_start"] and 0.5 < facts["length_ratio"] < 2
    return "watch" if is_slow else None, text
