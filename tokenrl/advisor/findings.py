"""Judges the metrics of a run, one function for each thing that can go wrong.

Every function takes the history and what is known of its progress, and returns a finding; None if the run
does not record the metric. What a rule of training or of the advice decides is asked of that rule.
"""

from __future__ import annotations

from tokenrl.advisor.history import History
from tokenrl.advisor.progress import Progress
from tokenrl.advisor.rules import (
    ACT,
    CLIPPED,
    CUT,
    DEAD_GROUPS,
    EASY,
    ENTROPY,
    FINE,
    HOPELESS,
    SKIPPED,
    WATCH,
    cut_too_often,
    mostly_dead,
    one_figure,
)
from tokenrl.advisor.show import Finding
from tokenrl.core.baselines import check_horizon
from tokenrl.core.entropy import LEAST_ENTROPY, entropy_collapsed
from tokenrl.core.losses import LARGEST_ERROR
from tokenrl.core.rows import teaches_nothing
from tokenrl.errors import Refused


def entropy_finding(history: History, progress: Progress) -> Finding | None:
    """Judge the entropy of the last tenth of the steps, by the rule of training."""
    recent, coefficient = history.recent("entropy"), history.estimator.entropy_coef
    if recent is None:
        return None
    value = f"{recent.value:.3g} nats per {'token' if history.language else 'action'}"
    verdict, changes = FINE, {}
    if not history.language and history.arguments.head != "softmax":
        text = f"{value}; of a density, which may be negative, so the rule about collapse does not apply"
    elif entropy_collapsed(coefficient, recent.value):
        verdict = WATCH if history.solved else ACT
        text = f"entropy-collapsed: {value}, below {LEAST_ENTROPY:g}, and no entropy bonus"
        text += "; the task is solved, so nothing is lost unless it changes" if history.solved else ""
        changes = {} if history.solved else {"estimator.entropy_coef": _bonus(history)}
    elif recent.value < LEAST_ENTROPY:
        verdict = FINE if history.solved else WATCH
        text = f"{value}, below {LEAST_ENTROPY:g} despite the bonus of {coefficient:g}"
    else:
        text = f"{value}; below {LEAST_ENTROPY:g} without a bonus it would count as collapsed"
    return Finding("entropy", verdict, text, recent.value, recent.steps, changes)


def _bonus(history: History) -> float:
    """Return the bonus that the advice gives, in units of the spread of the advantages at the start."""
    if history.language or history.estimator.scale != "none":
        return ENTROPY
    spread = history.early("reward_std") or 1.0
    return one_figure(ENTROPY * spread * history.arguments.reward_scale)


def destroyed_finding(history: History, progress: Progress) -> Finding | None:
    """Judge whether the updates destroyed the policy; None if they did not."""
    lost, rate = progress.lost, history.arguments.learning_rate
    if lost is None:
        return None
    text = f"{lost} The learning rate, {rate:g}, is the likely cause"
    return Finding(lost.flag, ACT, text, lost.after, (lost.since, lost.step), {"learning_rate": rate / 4})


def signal_finding(history: History, progress: Progress) -> Finding | None:
    """Judge how many groups of completions, or how many rollouts of episodes, have rewards that differ."""
    groups = history.estimator.needs_groups
    recent = history.recent("frac_reward_zero_std" if groups else "reward_std")
    if recent is None or _within_episodes(history):
        return None
    first, last = recent.steps
    rows = [row for row in history.rows if first <= row["step"] <= last and row.get("reward_std") is not None]
    rows = [row for row in rows if row.get("episodes", 2) > 1]  # of pieces: one return differs from no other
    if not rows:
        return None
    idle = sum(teaches_nothing(history.estimator, row) for row in rows) / len(rows)
    share = recent.value if groups else idle
    text = f"{share:.0%} of {'groups' if groups else 'rollouts'} have equal rewards and so no gradient"
    if groups and idle:
        text += f"; in {idle:.0%} of the steps no group has one"
    verdict, changes = FINE, {}
    if mostly_dead(share) and (history.solved or _easy(history)):
        verdict, text = WATCH, f"{text}; too easy by now, there is little left to learn: take a harder task"
    elif mostly_dead(share) and progress.lost:
        verdict, text = WATCH, f"{text}; it was lost with the policy"
    elif mostly_dead(share):
        verdict, changes = ACT, _more_differences(history)
        start = "a warm start (--warm-start, or tokenrl sft) or a graded reward"
        start = start if history.language else "a shaped reward or a start nearer the goal"
        text += f"; too hard, so {start} helps most" if share > HOPELESS else f"; more than {DEAD_GROUPS:.0%}"
    elif 2 * share > DEAD_GROUPS:
        verdict, text = WATCH, f"{text}; above {DEAD_GROUPS:.0%} it would waste most of the work"
    return Finding("signal", verdict, text, share, recent.steps, changes)


def _within_episodes(history: History) -> bool:
    """Whether steps are compared within their episode only, so that equal returns of episodes say nothing."""
    one = not history.language and history.arguments.num_envs == 1
    return one or bool(history.estimator.within_rows)


def _easy(history: History) -> bool:
    """Whether the training reward reaches the threshold or, without one, looks like a success rate near 1."""
    reward = history.recent("reward")
    if reward is None:
        return False
    if history.threshold is not None:
        return reward.value >= history.threshold
    return history.language and EASY <= reward.value <= 1


def _more_differences(history: History) -> dict[str, float]:
    if history.language and history.estimator.needs_groups:
        return {"num_generations": 2 * history.arguments.num_generations}
    name = "prompts_per_step" if history.language else "num_envs"
    return {name: 2 * getattr(history.arguments, name)}


def truncation_finding(history: History, progress: Progress) -> Finding | None:
    """Judge how many completions the maximum length cuts, or whether episodes last as long as they may."""
    if history.language:
        recent, room = history.recent("completions/clipped_ratio"), history.arguments.max_completion_length
        if recent is None:
            return None
        text = f"{recent.value:.0%} of completions are cut at {room} tokens, before an EOS"
        verdict = ACT if cut_too_often(recent.value) else WATCH if 2 * recent.value >= CUT else FINE
        changes = {"max_completion_length": 2 * room} if verdict == ACT else {}
        return Finding("truncation", verdict, text, recent.value, recent.steps, changes)
    recent = history.recent("episode_length")
    if recent is None or not history.horizon:
        return None
    share = recent.value / history.horizon  # how many episodes were cut is not recorded
    text = f"episodes last {recent.value:.3g} of at most {history.horizon} steps"
    verdict, changes = FINE, {}
    if share > 1 - CUT and history.horizon > 1 and not history.solved:
        verdict, changes = ACT, {"max_episode_steps": 2 * history.horizon}
        text += ", so that the limit ends most of them"
        if progress.gained:
            verdict, changes = WATCH, {}
            text += "; fine where lasting long is the aim"
    return Finding("truncation", verdict, text, share, recent.steps, changes)


def horizon_finding(history: History, progress: Progress) -> Finding:
    """Judge the length of episodes where nothing is subtracted from the return, by the rule of training."""
    estimator, steps, horizon = history.estimator, (1, history.step), history.horizon
    length = "of unknown length" if horizon is None else f"of up to {horizon:,} actions"
    value = None if horizon is None else float(horizon)
    if estimator.subtracts_baseline or horizon == 1:
        text = f"episodes {length}, baseline {estimator.baseline}, returns {estimator.returns}"
        return Finding("horizon", FINE, text, value, steps, {})
    changes = _some_baseline(history)
    try:
        check_horizon(estimator, horizon)
    except Refused:
        text = (
            f"episodes {length} and no baseline: the noise of the whole return hides the effect of one action"
        )
        return Finding("horizon", ACT, text, value, steps, changes)
    text = f"episodes {length} and no baseline: short enough, but a baseline costs nothing"
    return Finding("horizon", WATCH, text, value, steps, changes)


def _some_baseline(history: History) -> dict[str, str]:
    if history.language:
        several = history.arguments.num_generations > 1
        return {"estimator.baseline": "rloo" if several else "running_mean"}
    if history.arguments.num_envs == 1:
        return {"estimator.baseline": "running_mean"}
    return {"estimator.baseline": "timestep_mean", "estimator.returns": "reward_to_go"}


def skipped_finding(history: History, progress: Progress) -> Finding | None:
    """Judge how many updates were skipped because their gradient was not finite."""
    _, counts = history.series("skipped_steps")
    if not counts:
        return None
    args = history.arguments
    updates = history.step * args.num_iterations * args.num_minibatches
    share, text = (
        counts[-1] / updates,
        f"{counts[-1]:.0f} of {updates:,} updates skipped, gradient not finite",
    )
    verdict = FINE if not counts[-1] else WATCH if share <= SKIPPED else ACT
    changes = {"learning_rate": args.learning_rate / 2} if verdict == ACT else {}
    return Finding("skipped", verdict, text, share, (1, history.step), changes)


def clip_finding(history: History, progress: Progress) -> Finding | None:
    """Judge the share of tokens whose importance ratio was clipped."""
    recent, args = history.recent("clip_ratio"), history.arguments
    if recent is None:
        return None
    share = recent.value
    verdict = ACT if share > CLIPPED else WATCH if 2 * share > CLIPPED else FINE
    fewer = {"num_iterations": args.num_iterations // 2}
    slower = {"learning_rate": args.learning_rate / 2}
    changes = {} if verdict != ACT else fewer if args.num_iterations > 1 else slower
    text = f"{share:.1%} of tokens are clipped, and learn nothing more (num_iterations {args.num_iterations})"
    return Finding("clipping", verdict, text, share, recent.steps, changes)


def kl_finding(history: History, progress: Progress) -> Finding | None:
    """Judge the KL to the reference: against its target, or else by whether the reward fell meanwhile."""
    recent = history.recent("kl")
    if recent is None:
        return None
    target, value = history.arguments.target_kl, f"{recent.value:.3g} nats per completion"
    verdict, changes, text = FINE, {}, value
    if target is not None:
        error = (recent.value - target) / target
        text = f"{value}, {error:+.0%} off its target of {target:g}"
        if abs(error) > LARGEST_ERROR:
            verdict, text = WATCH, f"{text}; its weight moves as fast as it may"
        if error > 1:
            verdict, changes = ACT, {"estimator.beta": 2 * history.estimator.beta}
    elif progress.fell:
        steps, values = history.series("kl")
        before = [kl for step, kl in zip(steps, values, strict=True) if step <= progress.best.steps[1]]
        if before and 0 < before[-1] < recent.value:
            verdict, changes = ACT, {"target_kl": float(f"{before[-1]:.2g}")}
            text = f"{value}, up from {before[-1]:.3g} where the reward was best"
    return Finding("KL", verdict, text, recent.value, recent.steps, changes)


def critic_finding(history: History, progress: Progress) -> Finding | None:
    """Judge the share of the returns' variance that the critic explains."""
    recent, args = history.recent("explained_variance"), history.arguments
    if recent is None:
        return None
    text = f"explains {recent.value:.0%} of the variance of returns"
    if recent.value >= 0 or history.solved:
        return Finding("critic", FINE, text, recent.value, recent.steps, {})
    spread = history.early("reward_std")
    scale = one_figure(1 / spread) if spread else args.reward_scale
    changes = {"value_learning_rate": 2 * args.value_learning_rate}
    if not 1 / 3 < scale / args.reward_scale < 3:  # its targets are far from size 1
        changes = {"reward_scale": scale}
    verdict = WATCH if progress.gained else ACT
    text += ": below 0 it adds noise" + ("" if verdict == ACT else ", though the reward rises")
    return Finding("critic", verdict, text, recent.value, recent.steps, changes if verdict == ACT else {})
