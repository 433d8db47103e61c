"""Checks a run before its first update (`--check`): tries it out, and tells all problems at once.

One pass looks at texts and settings, evaluates the policy, makes training steps that change nothing, and
compares the log-probabilities of sampling and scoring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tokenrl.language.training.checked_texts import check_texts
from tokenrl.language.training.cost import disk_cost, disk_finding, memory_cost, time_cost
from tokenrl.language.training.run import Run, RunResult
from tokenrl.language.training.step import averaged
from tokenrl.language.training.trial import Trials, try_out
from tokenrl.language.training.verdicts import asks_in_text, pass_mark, remedy, uncut
from tokenrl.runs.checkup import Finding, checked, conclude, rate_finding
from tokenrl.runs.rules import LEAST_ENTROPY, SOLVED
from tokenrl.runs.session import Session
from tokenrl.runs.space import in_words

FEW = 0.1
"""Up to this share of groups whose rewards differ, a check calls the signal weak."""
NO_ENTROPY = 0.01
"""In nats per token; below it nearly all completions of a prompt are the same."""
LARGE_GAP, NOTABLE_GAP = 0.05, 0.005
"""Mean differences of log-probabilities, in nats: a problem, as of another model, and a remark. Float32 gives
about 1e-6, bfloat16 about 1e-2."""


def check_run(run: Run, session: Session, evaluate: Callable[[], Mapping[str, float]]) -> RunResult:
    """Check a run whose parts are ready, print what was found, and return the result.

    Args:
        run: the run. Its weights stay as they are, bit for bit.
        session: the session, which has been opened.
        evaluate: evaluates the policy, as before the first step of a run.

    Returns:
        The result, with exit code 2 if there is a problem, else 0; its `flags` name problems and remarks.
    """
    texts = check_texts(run)
    trials = try_out(run, session, texts, evaluate)
    disk = disk_cost(run, session.output_dir, trials.records)
    rate, usual = run.args.learning_rate, run.defaults.values.get("learning_rate")
    found = [
        *texts.findings,
        *trials.findings,
        *_signal_findings(run, session, trials),
        *_sampling_findings(run, trials),
        None if usual is None else rate_finding(rate, usual, "this model"),
        disk_finding(run, disk),
    ]
    known = f" (usual: {usual:g})" if usual is not None else f", {run.args.optimizer}"
    measured = _measured(run, trials) | {"learning rate": f"{rate:g}{known}"}
    if trials.records:
        measured["time"] = time_cost(run, trials.records, trials.evaluation)
    measured["memory"] = memory_cost(run)
    measured["disk"] = f"up to {in_words(disk.needed)} of {in_words(disk.free)} that are free"
    parts = "model, data, sampling, rewards and estimator"
    code = conclude(session, parts, measured, [finding for finding in found if finding is not None])
    return checked(run.result(session, "check"), code)


def _signal_findings(run: Run, session: Session, trials: Trials) -> list[Finding]:
    """Return what is wrong with the rewards of the trial steps."""
    if not trials.rewarded:
        return []
    metrics, groups = averaged(trials.sampled), _groups(run, len(trials.rewarded))
    cut = metrics["completions/clipped_ratio"]
    mend = remedy(run, cut, metrics["reward"])
    if cut == 1 and _has_ends(run):
        mend = "Let completions end first, as said under all-truncated."
    if trials.flat:
        found = f"In none of {groups} do the rewards differ; their mean is {metrics['reward']:.3g}."
        return [Finding("nothing-to-learn", found, "There is nothing to learn from.", mend)]
    findings = []
    share = 1 - metrics["frac_reward_zero_std"]
    if run.args.estimator.needs_groups and share <= FEW:
        found = f"In only {share:.0%} of {groups} the rewards differ."
        findings.append(
            Finding("few-signals", found, "Only these groups can teach anything.", mend, grave=False)
        )
    greedy = session.eval_before.get("reward_greedy")
    mark = pass_mark(run)
    if greedy is not None and mark is not None and greedy >= mark:
        found = f"The greedy completions of held-out prompts already have a mean reward of {greedy:.3g}."
        findings.append(Finding("already-solved", found, "Little is left to gain.", SOLVED, grave=False))
    if not math.isfinite(metrics["grad_norm"]):
        why = "Such updates are skipped, and the run stops after some of them."
        mend = "Scale the rewards down; in low precision try float32."
        findings.append(Finding("gradient-not-finite", "The gradient is not finite.", why, mend))
    return findings


def _sampling_findings(run: Run, trials: Trials) -> list[Finding]:
    """Return what is wrong with the completions and their log-probabilities."""
    findings, gap = [], trials.gap
    if trials.records:
        metrics = averaged(trials.sampled)
        cut, entropy = metrics["completions/clipped_ratio"], metrics["entropy"]
        if cut == 1 and _has_ends(run):
            found = f"Every completion was cut at {run.args.max_completion_length} tokens, before an end."
            why = "A reward for whole answers cannot tell them apart."
            mend = uncut(run)
            grave = trials.flat or asks_in_text(run)
            findings.append(Finding("all-truncated", found, why, mend[:1].upper() + mend[1:], grave))
        if entropy < LEAST_ENTROPY:
            found = f"The policy's entropy is {entropy:.2g} nats per token."
            why = "It nearly always writes the same completion, so there is little to compare."
            mend = "Raise --temperature, or start from a model that was trained less."
            findings.append(Finding("no-entropy", found, why, mend, grave=entropy < NO_ENTROPY))
    if gap is not None and not gap.mean <= NOTABLE_GAP:
        found = f"Log-probabilities of the sampler and of training differ by {gap.mean:.2g} nats per token "
        found += f"on average, by {gap.largest:.2g} at most."
        why = "The gradient is then that of another policy than the one that sampled."
        mend = "Take float32 (--dtype float32, --mixed-precision no), or weight tokens by the ratio of the "
        mend += "two, with --estimator.importance-cap 2."
        weighted = run.args.estimator.importance_cap is not None
        grave = not gap.mean <= LARGE_GAP and not weighted
        findings.append(Finding("sampling-differs", found, why, mend, grave))
    return findings


def _measured(run: Run, trials: Trials) -> dict[str, str]:
    """Return the first lines of the table: what the completions are like."""
    lines = {}
    if trials.rewarded:
        metrics = averaged(trials.sampled)
        share = f"{1 - metrics['frac_reward_zero_std']:.0%} of {_groups(run, len(trials.rewarded))}"
        lines["reward"] = f"{metrics['reward']:.3g} on average; differs within {share}"
    if trials.records:
        metrics = averaged(trials.sampled)
        length, cut = (metrics[f"completions/{name}"] for name in ("mean_length", "clipped_ratio"))
        limit = run.args.max_completion_length
        lines["completions"] = f"{length:.1f} tokens on average; {cut:.0%} cut at {limit}"
        lines["entropy"] = f"{metrics['entropy']:.3g} nats per token"
    if trials.gap is not None:
        apart = f"{trials.gap.mean:.1g} nats per token on average, {trials.gap.largest:.1g} at most"
        lines["scoring"] = f"differs from sampling by {apart}"
    return lines


def _has_ends(run: Run) -> bool:
    """Whether a completion can end before the maximum length."""
    return bool(run.learner.policy.eos_ids or run.learner.policy.stops)


def _groups(run: Run, steps: int) -> str:
    """Say between how many completions of how many prompts the rewards of the trial steps are compared."""
    prompts, size = run.args.prompts_per_step, run.args.num_generations
    count, each = (steps * prompts, size) if size > 1 else (steps, prompts)
    return f"{count} group{'s' * (count != 1)} of {each} completion{'s' * (each != 1)}"
