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
from rich.filesize import decimal

from tokenrl.errors import Refused, TokenrlError
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.collect import logprobs_under, sample
from tokenrl.language.training.defaults import demonstrations, plain_steps
from tokenrl.language.training.run import Run, RunResult
from tokenrl.language.training.step import Record, training_step
from tokenrl.language.training.supervised import encode_demonstrations
from tokenrl.language.training.verdicts import asks_in_text, known_facts
from tokenrl.runs.console import duration
from tokenrl.runs.directory import check_space
from tokenrl.runs.facts import means, share_equal
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
    findings, records, began = list[Finding](), list[Record](), time.perf_counter()
    train = _usable(run, run.task.train_prompts, "training prompts", findings)
    held_out = _usable(run, run.task.eval_prompts, "held-out prompts", findings)
    _look_at_texts(run, train[:LOOKED_AT], findings)
    facts = known_facts(run) | {"whose": "this model"}
    facts |= dict.fromkeys(("lowest_rate", "highest_rate"), facts["usual_rate"])
    if len(held_out) == len(run.task.eval_prompts):
        session.evaluated(_attempt(findings, "evaluation-failed", evaluate) or {})
    evaluation = time.perf_counter() - began
    if train and not any(finding.flag == "evaluation-failed" for finding in findings):
        records = _trial_steps(run, train, findings)
        facts |= _trial_facts(run, records) if records else {}
        facts |= _attempt(findings, "scoring-failed", lambda: _scoring_gap(run, train)) or {}
    if facts.get("step_equal") != 1:  # else that is what is said
        facts["before_greedy"] = session.eval_before.get("reward_greedy")
    findings += judge(facts)
    _attempt(findings, "disk-too-small", lambda: check_space(session.output_dir, session.space_needed))
    lines = _lines(run, facts, records, evaluation)
    lines["disk"] = f"{decimal(shutil.disk_usage(session.output_dir).free)} are free"
    code = session.conclude("model, data, sampling, rewards and estimator", lines, findings)
    result = run.result(session, "check")
    return replace(result, exit_code=result.exit_code or code)


def _attempt(findings: list[Finding], flag: str, work: Callable[[], T]) -> T | None:
    """Do some work and return what it returns; if it fails, add a finding and return None."""
    try:
        return work()
    except TokenrlError as error:
        findings.append(Finding(flag, "void", f"{error} Training would stop at the same error."))
        return None


def _usable(run: Run, rows: Rows, which: str, findings: list[Finding]) -> Rows:
    """Return the rows whose prompts can be asked, and add findings about those too long or refused."""
    policy, limit = run.learner.policy, run.args.max_completion_length
    context, lengths, refused = policy.context or math.inf, dict[int, int](), dict[int, str]()
    for number, row in enumerate(rows):
        try:
            lengths[number] = len(policy.encode(row["prompt"]))
        except Refused as error:
            refused[number] = str(error)
    long = {number for number, length in lengths.items() if length + limit > context}
    cut = run.args.truncate_prompts and limit < context
    if long:
        longest = max(lengths.values())
        mend = "Shorten the prompts, leave them out, or cut them on the left with --truncate-prompts"
        if longest < context:
            mend += f", or give --max-completion-length {context - longest} or less"
        text = (
            f"{len(long):,} of {len(rows):,} {which} do not fit: the longest has {longest:,} tokens, and "
            f"with {limit:,} for the completion that is more than the model's context of {context:,}. "
        )
        text += "The policy does not see their beginning." if cut else f"{mend}."
        findings.append(Finding("context-too-short", "watch" if cut else "void", text))
    if refused:
        first = min(refused)
        text = f"{len(refused):,} of {len(rows):,} {which} cannot be asked, the first in row {first}."
        findings.append(Finding("prompts-refused", "void", f"{text} {refused[first]}"))
    lost = refused.keys() | (set() if cut else long)
    return [row for number, row in enumerate(rows) if number not in lost]


def _look_at_texts(run: Run, rows: Rows, findings: list[Finding]) -> None:
    """Add findings about prompts with two BOS tokens, and about demonstrations longer than completions."""
    policy, limit = run.learner.policy, run.args.max_completion_length
    bos, mark = policy.tokenizer.bos_token_id, policy.tokenizer.bos_token
    doubled = 0 if bos is None else sum(policy.encode(row["prompt"])[:2] == [bos, bos] for row in rows)
    if doubled:
        text = (
            f"{doubled:,} of {len(rows):,} training prompts begin with two BOS tokens ({mark}), with which "
            f"models answer worse. Take {mark} away from the beginning of prompts, messages or template."
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
            f"has {max(lengths)}. Such an answer is cut: give --max-completion-length {max(lengths)} or more."
        )
        findings.append(Finding("answers-too-long", "void" if 2 * long > len(lengths) else "watch", text))


def _trial_steps(run: Run, rows: Rows, findings: list[Finding]) -> list[Record]:
    """Make training steps that change nothing, until there is a signal or enough completions showed none."""
    args, learner, records = run.args, run.learner, list[Record]()
    stream = PromptStream(rows, args.prompts_per_step, args.seed)
    still = torch.optim.SGD(learner.policy.trainable_parameters(), lr=0.0)
    enough = min(MOST_STEPS, math.ceil(ENOUGH / (args.prompts_per_step * args.num_generations)))

    def step() -> Record:
        critic, mean = copy.deepcopy((learner.critic, run.running_mean))
        trial = replace(learner, optimizer=still, critic=critic, diagnostics=None)
        return training_step(trial, run.rewards, mean, len(records) + 1, stream.next(), stream.take)

    while len(records) < enough and _share_equal(run, records) == 1:
        record = _attempt(findings, "step-failed", step)
        learner.optimizer.zero_grad()
        if record is None:
            break
        records.append(record)
    return records


def _share_equal(run: Run, records: Sequence[Record]) -> float:
    """Return the share of groups with equal rewards; without groups 1 if all steps have one reward."""
    groups = run.args.estimator.needs_groups
    if not groups and len({record.metrics["reward"] for record in records}) > 1:
        return 0.0
    return fmean([share_equal(record.metrics, groups) for record in records] or [1.0])


def _scoring_gap(run: Run, rows: Rows) -> dict[str, float]:
    """Sample a few completions and score them as training does; return how far apart tokens are, as facts."""
    learner = run.learner
    sampling = replace(learner.sampling, num_generations=min(4, learner.sampling.group_size), step=1)
    rollout = sample(learner, list(enumerate(rows[:4])), sampling)
    scored = logprobs_under(learner, learner.model, rollout)
    apart = (scored - rollout.logprobs)[rollout.mask].double().abs()
    return {"gap": float(apart.mean()), "largest_gap": float(apart.max())}


def _trial_facts(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    """Return the facts of the trial steps."""
    args, policy = run.args, run.learner.policy
    facts = means("step", [record.metrics for record in records], args.estimator.needs_groups)
    equal, groups, size = (
        _share_equal(run, records),
        len(records) * args.prompts_per_step,
        args.num_generations,
    )
    if size == 1:
        groups, size = len(records), args.prompts_per_step
    if not (policy.eos_ids or policy.stops):  # without an end all are cut
        facts["step_cut"] = None
    if facts["step_grad_norm"] is None:
        facts["step_grad_norm"] = math.inf
    return facts | {
        "step_equal": equal,
        "is_corrected": args.estimator.importance_cap is not None,
        "is_misasked": asks_in_text(run) or equal == 1,
        "groups": f"{groups} group{'s' * (groups != 1)} of {size} completion{'s' * (size != 1)}",
        "who": "The greedy completions of held-out prompts",
    }


def _lines(
    run: Run, facts: Mapping[str, Any], records: Sequence[Record], evaluation: float
) -> dict[str, str]:
    """Return the lines of the table: what was measured."""
    args, lines, usual = run.args, {}, facts["usual_rate"]
    if records:
        share = f"{1 - facts['step_equal']:.0%} of {facts['groups']}"
        lines["reward"] = f"{facts['step_reward']:.3g} on average; differs within {share}"
        length, cut = (
            fmean(record.metrics[f"completions/{name}"] for record in records)
            for name in ("mean_length", "clipped_ratio")
        )
        cut_at = f"{cut:.0%} cut at {args.max_completion_length}"
        lines["completions"] = f"{length:.1f} tokens on average; {cut_at}"
        lines["entropy"] = f"{facts['step_entropy']:.3g} nats per token"
        seconds = fmean(record.timings["collect"] + record.timings["update"] for record in records)
        count = 1 + -(-plain_steps(args) // args.eval_every) if args.eval_every else 2
        whole = f"{duration(args.max_steps * seconds + count * evaluation)} for {args.max_steps} steps"
        lines["time"] = f"{seconds:.2g} s per step, about {whole}, {count} evaluations"
    if "gap" in facts:
        apart = f"{facts['gap']:.1g} nats per token on average, {facts['largest_gap']:.1g} at most"
        lines["scoring"] = f"differs from sampling by {apart}"
    known = f", {args.optimizer}" if usual is None else f" (usual: {usual:g})"
    lines["learning rate"] = f"{args.learning_rate:g}{known}"
    lines["memory"] = ", ".join(
        f"{decimal(int(size * 1024**3))} of the {'GPU' if 'cuda' in name else 'computer'} so far"
        for name, size in peak_memory().items()
    )
    return lines
