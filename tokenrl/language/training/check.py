"""Checks a run before its first update (`--check`): tries it out, and tells all problems at once.

One pass looks at texts and settings, evaluates the policy, and makes two training steps that change nothing:
one with the run's rewards, which shows whether there is a signal, and one in which every completion has a
reward of its own, which shows what a full update costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokenrl.core.entropy import LEAST_ENTROPY
from tokenrl.core.guards import teaches_nothing
from tokenrl.errors import TokenrlError
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.checked_texts import Texts, check_texts
from tokenrl.language.training.cost import disk_cost, disk_finding, memory_cost, size, time_cost
from tokenrl.language.training.run import Run, RunResult
from tokenrl.language.training.step import Record
from tokenrl.language.training.trial import Gap, scoring_gap, spread_rewards, trial_step
from tokenrl.language.training.verdicts import SOLVED, remedy, solves, to_chat, uncut
from tokenrl.runs.checkup import Finding, checked, conclude, rate_finding
from tokenrl.runs.session import Session

FEW = 0.1
"""Up to this share of groups whose rewards differ, a check calls the signal weak."""
NO_ENTROPY = 0.01
"""In nats per token; below it nearly all completions of a prompt are the same."""
LARGE_GAP, NOTABLE_GAP = 0.05, 0.005
"""Mean differences of log-probabilities, in nats: a problem, as of another model, and a remark. Float32 gives
about 1e-6, bfloat16 about 1e-2."""


class Trials(NamedTuple):
    """What was tried out; None stands for what could not be.

    Attributes:
        real: a training step with the run's rewards.
        full: a training step in which every row has a gradient.
        gap: how far sampling and scoring are apart.
        evaluation: seconds of the evaluation.
        findings: what failed.
    """

    real: Record | None
    full: Record | None
    gap: Gap | None
    evaluation: float
    findings: list[Finding]

    @property
    def records(self) -> list[Record]:
        """The steps that succeeded."""
        return [record for record in (self.real, self.full) if record is not None]


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
    trials = _try_out(run, session, texts, evaluate)
    disk = disk_cost(run, session.output_dir, trials.real or trials.full)
    usual = run.defaults.values["learning_rate"]
    found = [
        *texts.findings,
        *trials.findings,
        *_signal_findings(run, session, trials.real),
        *_sampling_findings(run, trials),
        rate_finding(run.args.learning_rate, usual, "this model"),
        disk_finding(run, disk),
    ]
    measured = _measured(run, trials) | {"learning rate": f"{run.args.learning_rate:g} (usual: {usual:g})"}
    if trials.records:
        measured["time"] = time_cost(run, trials.records, trials.evaluation)
    measured["memory"] = memory_cost(run)
    measured["disk"] = f"up to {size(disk.needed)} of {size(disk.free)} that are free"
    parts = "model, data, sampling, rewards and estimator"
    code = conclude(session, parts, measured, [finding for finding in found if finding is not None])
    return checked(run.result(session, "check"), code)


def _try_out(run: Run, session: Session, texts: Texts, evaluate: Callable[[], Mapping[str, float]]) -> Trials:
    """Evaluate, and make the trial steps, on the prompts that can be asked."""
    findings: list[Finding] = []

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except TokenrlError as error:
            found, why = f"A trial of the {what} failed.", "Training would stop at the same error."
            findings.append(Finding(f"{what}-failed", found, why, str(error)))
            return None

    began = time.perf_counter()
    if len(texts.held_out) == len(run.task.eval_prompts):
        session.evaluated(attempt("evaluation", evaluate) or {})
    evaluation = time.perf_counter() - began
    if not texts.train:
        return Trials(None, None, None, evaluation, findings)
    stream = PromptStream(texts.train, run.args.prompts_per_step, run.args.seed)
    real = None
    if not findings:  # else the rewards would fail again
        real = attempt("step", lambda: trial_step(run, run.rewards, stream, 1))
    full = attempt("update", lambda: trial_step(run, Rewards(spread_rewards), stream, 2))
    gap = attempt("scoring", lambda: scoring_gap(run, texts.train))
    return Trials(real, full, gap, evaluation, findings)


def _signal_findings(run: Run, session: Session, real: Record | None) -> list[Finding]:
    """Return what is wrong with the rewards of a step."""
    if real is None:
        return []
    metrics, compares = real.metrics, run.args.estimator.needs_groups
    cut = metrics["completions/clipped_ratio"]
    mend = remedy(run, cut, metrics["reward"])
    if cut == 1 and _has_ends(run):
        mend = "Let completions end first, as said under all-truncated."
    if teaches_nothing(run.args.estimator, metrics):
        found = f"In none of {_groups(run)} do the rewards differ; their mean is {metrics['reward']:.3g}."
        return [Finding("nothing-to-learn", found, "There is nothing to learn from.", mend)]
    findings = []
    share = 1 - metrics["frac_reward_zero_std"]
    if compares and share <= FEW:
        found = f"In only {share:.0%} of {_groups(run)} the rewards differ."
        findings.append(
            Finding("few-signals", found, "Only these groups can teach anything.", mend, grave=False)
        )
    greedy = session.eval_before.get("reward_greedy")
    if greedy is not None and solves(run, greedy):
        found = f"The greedy completions of held-out prompts already have a mean reward of {greedy:.3g}."
        findings.append(Finding("already-solved", found, "Little is left to gain.", SOLVED, grave=False))
    if not math.isfinite(metrics["grad_norm"]):
        why = "Such updates are skipped, and the run stops after some of them."
        mend = "Scale the rewards down; in low precision try float32."
        findings.append(Finding("gradient-not-finite", "The gradient is not finite.", why, mend))
    return findings


def _sampling_findings(run: Run, trials: Trials) -> list[Finding]:
    """Return what is wrong with the completions and their log-probabilities."""
    findings = []
    gap = trials.gap
    for record in trials.records[:1]:
        cut, entropy = record.metrics["completions/clipped_ratio"], record.metrics["entropy"]
        if cut == 1 and _has_ends(run):
            found = f"Every completion was cut at {run.args.max_completion_length} tokens, before an end."
            why = "A reward for whole answers cannot tell them apart."
            flat = trials.real is None or teaches_nothing(run.args.estimator, record.metrics)
            grave = flat or to_chat(run)
            findings.append(Finding("all-truncated", found, why, _sentence(uncut(run)), grave))
        if entropy < LEAST_ENTROPY:
            found = f"The policy's entropy is {entropy:.2g} nats per token."
            why = "It nearly always writes the same completion, so there is little to compare."
            mend = "Raise --temperature, or start from a model that was trained less."
            findings.append(Finding("no-entropy", found, why, mend, grave=entropy < NO_ENTROPY))
    if gap is not None and not gap.mean <= NOTABLE_GAP:
        found = f"Log-probabilities of the sampler and of training differ by {gap.mean:.2g} nats per token "
        found += f"on average, by {gap.largest:.2g} at most."
        why = "The gradient is then that of another policy than the one that sampled."
        mend = (
            "Take float32 (--dtype float32, --mixed-precision no), or weight tokens by the ratio of the two "
        )
        mend += "with --estimator.importance-cap 2."
        weighted = run.args.estimator.importance_cap is not None
        grave = not gap.mean <= LARGE_GAP and not weighted
        findings.append(Finding("sampling-differs", found, why, mend, grave))
    return findings


def _measured(run: Run, trials: Trials) -> dict[str, str]:
    """Return the first lines of the table: what the completions are like."""
    lines = {}
    if trials.real is not None:
        metrics = trials.real.metrics
        share = f"{1 - metrics['frac_reward_zero_std']:.0%} of {_groups(run)}"
        lines["reward"] = f"{metrics['reward']:.3g} on average; differs within {share}"
    for record in trials.records[:1]:
        length, cut = (record.metrics[f"completions/{name}"] for name in ("mean_length", "clipped_ratio"))
        limit = run.args.max_completion_length
        lines["completions"] = f"{length:.1f} tokens on average; {cut:.0%} cut at {limit}"
        lines["entropy"] = f"{record.metrics['entropy']:.3g} nats per token"
    if trials.gap is not None:
        apart = f"{trials.gap.mean:.1g} nats per token on average, {trials.gap.largest:.1g} at most"
        lines["scoring"] = f"differs from sampling by {apart}"
    return lines


def _has_ends(run: Run) -> bool:
    """Whether a completion can end before the maximum length."""
    return bool(run.learner.policy.eos_ids or run.learner.policy.stops)


def _groups(run: Run) -> str:
    """Say between how many completions of how many prompts the rewards are compared."""
    prompts, size = run.args.prompts_per_step, run.args.num_generations
    return f"{prompts} groups of {size} completions" if size > 1 else f"1 group of {prompts} completions"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
