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
from tokenrl.language.rollout.scoring import score
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.collect import sample
from tokenrl.language.training.defaults import demonstrations, plain_steps
from tokenrl.language.training.run import Run, RunResult
from tokenrl.language.training.step import Record, training_step
from tokenrl.language.training.supervised import encode_demonstrations
from tokenrl.language.training.verdicts import asks_in_text, known_facts, needs_groups
from tokenrl.runs.console import duration
from tokenrl.runs.directory import check_space, in_words
from tokenrl.runs.facts import means
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
    findings, began = list[Finding](), time.perf_counter()
    train = _usable(run, run.task.train_prompts, "training prompts", findings)
    held_out = _usable(run, run.task.eval_prompts, "held-out prompts", findings)
    _check_beginnings_and_answers(run, train[:LOOKED_AT], findings)
    if len(held_out) == len(run.task.eval_prompts):
        session.evaluated(_attempt(findings, "evaluation-failed", evaluate) or {})
    evaluation = time.perf_counter() - began
    records, apart = list[Record](), None
    if train and not any(finding.flag == "evaluation-failed" for finding in findings):
        records = _trial_steps(run, train, findings)
        apart = _attempt(findings, "scoring-failed", lambda: _scoring_gap(run, train))
    usual = run.defaults.values.get("learning_rate")
    facts = known_facts(run) | {"lowest_rate": usual, "highest_rate": usual, "whose": "this model"}
    facts |= _trial_facts(run, records)
    if apart is not None:
        facts |= {"gap": float(apart.mean()), "largest_gap": float(apart.max())}
    if facts.get("step_equal") != 1:  # else that is what is said
        facts["before_greedy"] = session.eval_before.get("reward_greedy")
    findings += judge(facts)
    _attempt(findings, "disk-too-small", lambda: check_space(session.output_dir, session.space_needed))
    lines = _lines(run, facts, records, evaluation)
    lines["disk"] = f"{in_words(shutil.disk_usage(session.output_dir).free)} are free"
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
            text += "Shorten the prompts, leave them out, or cut them on the left with --truncate-prompts"
            text += (
                f", or give --max-completion-length {context - longest} or less" * (longest < context) + "."
            )
        findings.append(Finding("context-too-short", "watch" if cut else "void", text))
    if refused:
        first = min(refused)
        text = f"{len(refused):,} of {len(rows):,} {which} cannot be asked, the first in row {first}."
        findings.append(Finding("prompts-refused", "void", f"{text} {refused[first]}"))
    lost = refused.keys() | (set() if cut else long)
    return [row for number, row in enumerate(rows) if number not in lost]


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


def _trial_steps(run: Run, rows: Rows, findings: list[Finding]) -> list[Record]:
    """Make trial steps until there is a signal, or until enough completions showed none."""
    args, records = run.args, list[Record]()
    stream = PromptStream(rows, args.prompts_per_step, args.seed)
    enough = min(MOST_STEPS, math.ceil(ENOUGH / (args.prompts_per_step * args.num_generations)))
    while len(records) < enough and _share_equal(run, records) == 1:
        record = _attempt(findings, "step-failed", lambda: _trial_step(run, stream, len(records) + 1))
        if record is None:
            break
        records.append(record)
    return records


def _share_equal(run: Run, records: Sequence[Record]) -> float:
    """Return the share of groups with equal rewards; without groups 1 if all steps have one reward."""
    rewards = {record.metrics["reward"] for record in records}
    found = means("step", [record.metrics for record in records], needs_groups(run))["step_equal"]
    return found if found is not None and (needs_groups(run) or len(rewards) == 1) else float(not rewards)


class _Still:
    """Stands in for an optimiser: it clears the gradients, and never changes the weights."""

    def __init__(self, optimizer: Any) -> None:
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        """Leave the weights as they are."""


def _trial_step(run: Run, stream: PromptStream, number: int) -> Record:
    """Make a training step, with forward and backward passes, that leaves policy and critic unchanged."""
    optimizer, critic = _Still(run.learner.optimizer), copy.deepcopy(run.learner.critic)
    learner = replace(run.learner, optimizer=optimizer, critic=critic, diagnostics=None)
    try:
        running_mean = copy.deepcopy(run.running_mean)
        return training_step(learner, run.rewards, running_mean, number, stream.next(), stream.take)
    finally:
        run.learner.optimizer.zero_grad()


def _scoring_gap(run: Run, rows: Rows) -> torch.Tensor:
    """Sample a few completions, score them as training does, and return how far each token is apart [M]."""
    learner = run.learner
    sampling = replace(learner.sampling, num_generations=min(4, learner.sampling.group_size), step=1)
    rollout = sample(learner, list(enumerate(rows[:4])), sampling)
    count = min(len(rollout.mask), learner.args.micro_batch_size or len(rollout.mask))
    rollout = rollout.rows(torch.arange(count, device=rollout.mask.device))
    scored = score(learner.model, rollout, **learner.scoring).logprobs.detach()
    return (scored - rollout.logprobs)[rollout.mask].double().abs()


def _trial_facts(run: Run, records: list[Record]) -> dict[str, Any]:
    """Return the facts of the trial steps."""
    if not records:
        return {}
    args, policy = run.args, run.learner.policy
    facts = means("step", [record.metrics for record in records], needs_groups(run))
    equal, size = _share_equal(run, records), args.num_generations
    groups = len(records) * args.prompts_per_step
    if size == 1:
        groups, size = len(records), args.prompts_per_step
    return facts | {
        "step_equal": equal,
        "step_cut": facts["step_cut"]
        if policy.eos_ids or policy.stops
        else None,  # without an end all are cut
        "step_grad_norm": math.inf if facts["step_grad_norm"] is None else facts["step_grad_norm"],
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
        length = fmean(record.metrics["completions/mean_length"] for record in records)
        cut = fmean(record.metrics["completions/clipped_ratio"] for record in records)
        limit = args.max_completion_length
        lines["completions"] = f"{length:.1f} tokens on average; {cut:.0%} cut at {limit}"
        lines["entropy"] = f"{facts['step_entropy']:.3g} nats per token"
        seconds = fmean(record.timings["collect"] + record.timings["update"] for record in records)
        count = 1 + -(-plain_steps(args) // args.eval_every) if args.eval_every else 2
        steps = args.max_steps
        whole = duration(steps * seconds + count * evaluation)
        lines["time"] = f"{seconds:.2g} s per step, about {whole} for {steps} steps, {count} evaluations"
    if "gap" in facts:
        apart = f"{facts['gap']:.1g} nats per token on average, {facts['largest_gap']:.1g} at most"
        lines["scoring"] = f"differs from sampling by {apart}"
    known = f", {args.optimizer}" if usual is None else f" (usual: {usual:g})"
    lines["learning rate"] = f"{args.learning_rate:g}{known}"
    lines["memory"] = ", ".join(
        f"{in_words(size * 1024**3)} of the {'GPU' if 'cuda' in name else 'computer'} so far"
        for name, size in peak_memory().items()
    )
    return lines
