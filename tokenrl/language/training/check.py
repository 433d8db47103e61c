"""Checks a run before its first update (`--check`): tries it out, and tells all problems at once.

One pass looks at texts and settings, evaluates the policy, makes training steps that change nothing, and
compares the log-probabilities of sampling and scoring. The rules of `runs.rules` say what the numbers mean.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

import torch

from tokenrl.errors import Refused, TokenrlError
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.scoring import score
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.collect import sample
from tokenrl.language.training.defaults import demonstrations, plain_steps
from tokenrl.language.training.run import Run, RunResult
from tokenrl.language.training.step import Record, training_step
from tokenrl.language.training.supervised import encode_demonstrations
from tokenrl.language.training.verdicts import asks_in_text, needs_groups, remedy, settings_facts
from tokenrl.runs.console import duration
from tokenrl.runs.directory import check_space, in_words
from tokenrl.runs.facts import share_equal
from tokenrl.runs.findings import Finding
from tokenrl.runs.metrics import peak_memory
from tokenrl.runs.rules import judge
from tokenrl.runs.session import Session

T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]

ENOUGH, MOST_STEPS = 128, 8
"""Completions, or else steps, after which a check says that there is no signal; small steps are repeated."""
LOOKED_AT = 512
"""Demonstrations, and prompts for their BOS, that are looked at; more take longer and show the same."""


def check_run(run: Run, session: Session, evaluate: Callable[[], Mapping[str, float]]) -> RunResult:
    """Check a run whose parts are ready, print what was found, and return the result.

    Args:
        run: the run. Its weights stay as they are, bit for bit.
        session: the session, which has been opened.
        evaluate: evaluates the policy, as before the first step of a run.

    Returns:
        The result, with exit code 2 if there is a problem, else 0; its `flags` name problems and remarks.
    """
    findings = list[Finding]()
    train = _usable(run, run.task.train_prompts, "training prompts", findings)
    held_out = _usable(run, run.task.eval_prompts, "held-out prompts", findings)
    _check_beginnings_and_answers(run, train[:LOOKED_AT], findings)
    began = time.perf_counter()
    if len(held_out) == len(run.task.eval_prompts):
        session.evaluated(_attempt(findings, "evaluation", evaluate) or {})
    evaluation = time.perf_counter() - began
    rewarded, full, gap = _try_out(run, train, findings) if train else ([], [], None)
    usual = run.defaults.values.get("learning_rate")
    facts = settings_facts(run) | {"lowest_rate": usual, "highest_rate": usual, "whose": "this model"}
    if rewarded or full:
        facts |= _trial_facts(run, rewarded, full)
    if gap is not None:
        facts |= {"gap": gap[0], "largest_gap": gap[1]}
    if facts.get("step_equal") != 1:  # else that is what is said
        facts["before_greedy"] = session.eval_before.get("reward_greedy")
    findings += judge(facts)
    _attempt(findings, "disk-too-small", lambda: check_space(session.output_dir, session.space_needed))
    lines = _lines(run, facts, [*rewarded, *full], evaluation)
    lines["disk"] = f"{in_words(shutil.disk_usage(session.output_dir).free)} are free"
    code = session.conclude("model, data, sampling, rewards and estimator", lines, findings)
    result = run.result(session, "check")
    return replace(result, exit_code=result.exit_code or code)


def _attempt(findings: list[Finding], what: str, work: Callable[[], T]) -> T | None:
    """Do some work and return what it returns; if it fails, add a finding and return None."""
    try:
        return work()
    except TokenrlError as error:
        flag = what if what == "disk-too-small" else f"{what}-failed"
        findings.append(Finding(flag, "void", f"{error} Training would stop at the same error."))
        return None


def _usable(run: Run, rows: Rows, which: str, findings: list[Finding]) -> Rows:
    """Return the rows whose prompts can be asked, and add findings about those too long or refused."""
    args, policy = run.args, run.learner.policy
    context, limit = policy.context or math.inf, args.max_completion_length
    lengths, refused = dict[int, int](), dict[int, str]()
    for number, row in enumerate(rows):
        try:
            lengths[number] = len(policy.encode(row["prompt"]))
        except Refused as error:
            refused[number] = str(error)
    long = {number for number, length in lengths.items() if length + limit > context}
    cut = args.truncate_prompts and limit < context
    if long:
        longest = max(lengths.values())
        text = (
            f"{len(long):,} of {len(rows):,} {which} do not fit: the longest has {longest:,} tokens, and "
            f"with {limit:,} for the completion that is more than the model's context of {context:,}. "
        )
        if cut:
            text += "They are cut on the left, so that the policy does not see their beginning."
        else:
            text += "Shorten the prompts or leave them out"
            text += f", give --max-completion-length {context - longest} or less" if longest < context else ""
            text += ", or cut them on the left with --truncate-prompts." if limit < context else "."
        findings.append(Finding("context-too-short", "watch" if cut else "void", text))
    if refused:
        first = min(refused)
        text = f"{len(refused):,} of {len(rows):,} {which} cannot be asked, the first in row {first}."
        findings.append(Finding("prompts-refused", "void", f"{text} {refused[first]}"))
    lost = refused.keys() | (set() if cut else long)
    return [row for number, row in enumerate(rows) if number not in lost] if lost else rows


def _check_beginnings_and_answers(run: Run, rows: Rows, findings: list[Finding]) -> None:
    """Add findings about prompts with two BOS tokens, and about demonstrations longer than completions."""
    policy, limit = run.learner.policy, run.args.max_completion_length
    bos, mark = policy.tokenizer.bos_token_id, policy.tokenizer.bos_token
    doubled = 0 if bos is None else sum(policy.encode(row["prompt"])[:2] == [bos, bos] for row in rows)
    if doubled:
        text = (
            f"{doubled:,} of {len(rows):,} training prompts begin with two BOS tokens ({mark}), with which "
            f"models answer worse: tokenizer or chat template add one themselves. Take {mark} away from the "
            "beginning of the prompts, the messages or the template."
        )
        findings.append(Finding("doubled-bos", "void", text))
    try:
        pairs = encode_demonstrations(policy, demonstrations(run.task)[:LOOKED_AT])
    except Refused:  # there are none, or they are not used and do not fit
        return
    lengths = [len(completion) for _, completion in pairs]
    long = sum(length > limit for length in lengths)
    if long:
        text = (
            f"{long} of the first {len(lengths)} demonstrations have more than {limit} tokens; the longest "
            f"has {max(lengths)}. The policy cannot write such an answer to its end: give "
            f"--max-completion-length {max(lengths)} or more."
        )
        findings.append(Finding("answers-too-long", "void" if 2 * long > len(lengths) else "watch", text))


def _try_out(
    run: Run, rows: Rows, findings: list[Finding]
) -> tuple[list[Record], list[Record], tuple[float, float] | None]:
    """Make trial steps: with the run's rewards until there is a signal, and one in which every row learns.

    Returns:
        The steps with the run's rewards; the other step, if it succeeded; and how far log-probabilities of
        sampling and of scoring are apart, in nats per token, on average and at most.
    """
    args, rewarded = run.args, list[Record]()
    stream = PromptStream(rows, args.prompts_per_step, args.seed)
    enough = min(MOST_STEPS, math.ceil(ENOUGH / (args.prompts_per_step * args.num_generations)))
    failed = any(finding.flag.endswith("-failed") for finding in findings)
    while not failed and len(rewarded) < enough and _is_flat(run, rewarded):
        number = len(rewarded) + 1
        record = _attempt(findings, "step", lambda: _trial_step(run, run.rewards, stream, number))  # noqa: B023
        if record is None:
            break
        rewarded.append(record)
    spread = Rewards(_spread_rewards)
    full = _attempt(findings, "update", lambda: _trial_step(run, spread, stream, enough + 1))
    gap = _attempt(findings, "scoring", lambda: _scoring_gap(run, rows))
    return rewarded, [] if full is None else [full], gap


def _is_flat(run: Run, records: Sequence[Record]) -> bool:
    """Whether no rewards differ that the estimator compares: in a step or, without groups, between steps."""
    alike = needs_groups(run) or len({record.metrics["reward"] for record in records}) < 2
    return alike and all(share_equal(record.metrics, needs_groups(run)) == 1 for record in records)


class _Still:
    """Stands in for an optimiser: it clears the gradients, and never changes the weights."""

    def __init__(self, optimizer: Any) -> None:
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        """Leave the weights as they are."""


def _trial_step(run: Run, rewards: Rewards, stream: PromptStream, number: int) -> Record:
    """Make a training step, with forward and backward passes, that leaves policy and critic unchanged."""
    learner = replace(
        run.learner,
        optimizer=_Still(run.learner.optimizer),
        critic=copy.deepcopy(run.learner.critic),
        diagnostics=None,
    )
    try:
        running_mean = copy.deepcopy(run.running_mean)
        return training_step(learner, rewards, running_mean, number, stream.next(), stream.take)
    finally:
        run.learner.optimizer.zero_grad()


def _spread_rewards(completions: Sequence[Any], **_: Any) -> list[float]:
    """Give every completion a reward of its own, so that every row has a gradient: a full update's work."""
    return [i * 0.618 % 1 for i in range(1, len(completions) + 1)]


def _scoring_gap(run: Run, rows: Rows) -> tuple[float, float]:
    """Sample a few completions, score them as training does, and compare, in nats per token."""
    learner = run.learner
    sampling = replace(learner.sampling, num_generations=min(4, learner.sampling.group_size), step=1)
    rollout = sample(learner, list(enumerate(rows[:4])), sampling)
    count = min(len(rollout.mask), learner.args.micro_batch_size or len(rollout.mask))
    rollout = rollout.rows(torch.arange(count, device=rollout.mask.device))
    scored = score(learner.model, rollout, **learner.scoring).logprobs.detach()
    apart = (scored - rollout.logprobs)[rollout.mask].double().abs()
    return float(apart.mean()), float(apart.max())


def _trial_facts(run: Run, rewarded: list[Record], full: list[Record]) -> dict[str, Any]:
    """Return the facts of the trial steps; those about rewards only of steps with the run's rewards."""
    args, policy, records = run.args, run.learner.policy, rewarded or full

    def mean(name: str) -> float:
        return fmean(record.metrics[name] for record in records)

    cut = mean("completions/clipped_ratio")
    facts: dict[str, Any] = {
        "step_entropy": mean("entropy"),
        "step_cut": cut if policy.eos_ids or policy.stops else None,  # without an end all are cut
        "is_corrected": args.estimator.importance_cap is not None,
        "is_misasked": asks_in_text(run) or bool(rewarded and _is_flat(run, rewarded)),
    }
    if rewarded:
        count, size = len(rewarded) * args.prompts_per_step, args.num_generations
        if size == 1:
            count, size = len(rewarded), args.prompts_per_step
        norm = mean("grad_norm")
        facts |= {
            "step_reward": mean("reward"),
            "step_equal": fmean(share_equal(record.metrics, needs_groups(run)) for record in rewarded),
            "step_grad_norm": math.inf if math.isnan(norm) else norm,
            "groups": f"{count} group{'s' * (count != 1)} of {size} completion{'s' * (size != 1)}",
            "remedy": remedy(run, cut, mean("reward")),
        }
        if not _is_flat(run, rewarded) and not needs_groups(run):
            facts["step_equal"] = 0.0
    return facts


def _lines(
    run: Run, facts: Mapping[str, Any], records: Sequence[Record], evaluation: float
) -> dict[str, str]:
    """Return the lines of the table: what was measured."""
    args, lines = run.args, {}
    if "step_reward" in facts:
        share = f"{1 - facts['step_equal']:.0%} of {facts['groups']}"
        lines["reward"] = f"{facts['step_reward']:.3g} on average; differs within {share}"
    if records:
        length, cut = (
            fmean(record.metrics[f"completions/{name}"] for record in records)
            for name in ("mean_length", "clipped_ratio")
        )
        lines["completions"] = (
            f"{length:.1f} tokens on average; {cut:.0%} cut at {args.max_completion_length}"
        )
        lines["entropy"] = f"{facts['step_entropy']:.3g} nats per token"
    if "gap" in facts:
        apart = f"{facts['gap']:.1g} nats per token on average, {facts['largest_gap']:.1g} at most"
        lines["scoring"] = f"differs from sampling by {apart}"
    known = "" if facts["usual_rate"] is None else f" (usual: {facts['usual_rate']:g})"
    lines["learning rate"] = f"{args.learning_rate:g}{known or f', {args.optimizer}'}"
    if records:
        seconds = fmean(sum(record.timings[name] for name in ("collect", "update")) for record in records)
        count = 1 + -(-plain_steps(args) // args.eval_every) if args.eval_every else 2
        steps = args.max_steps
        whole = duration(steps * seconds + count * evaluation)
        lines["time"] = f"{seconds:.2g} s per step, about {whole} for {steps} steps, {count} evaluations"
    lines["memory"] = ", ".join(
        f"{in_words(size * 1024**3)} of the {'GPU' if 'cuda' in name else 'computer'} so far"
        for name, size in peak_memory().items()
    )
    return lines
