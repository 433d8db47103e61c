"""Checks a run before it is trained (`--check`): the rules judge the first training step of a copy.

The step has the run's own settings, prompts and random numbers, so that it is the first step of the run; but where
a critic learns first, the policy is updated all the same, as in the steps that follow. Its first prompt is shown as
the model reads it, and completions with their rewards.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

from rich.filesize import decimal

from tokenrl.errors import ALIKE, TokenrlError
from tokenrl.language.evaluation.evaluation import transcript
from tokenrl.language.policy.characters import MANY, texts_in, unknown_characters
from tokenrl.language.rollout.rewarded import failures_of
from tokenrl.language.rollout.sampling import encode
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.experience import examples
from tokenrl.language.training.run import RunResult, TrainingRun
from tokenrl.language.training.step import Record, training_step
from tokenrl.language.training.verdicts import asks_in_text, observe_run
from tokenrl.runs.findings import share_equal
from tokenrl.runs.metrics import peak_memory
from tokenrl.runs.output import harmless, quantity, visible
from tokenrl.runs.rules import Finding, Means, Weight, judge
from tokenrl.runs.session import Session

ENOUGH = 32
"""Fewest completions whose equal rewards are a problem; of fewer they may be chance, and are a remark."""
MEMORY = {"peak_memory_gib": "memory", "peak_cuda_memory_gib": "memory of the GPU"}
"""What the peaks of memory are called in the table."""
LONGEST_SHOWN = 1000
"""Characters of the prompt that are shown."""
MOST_UNKNOWN = 0.03
"""Largest share of characters that a tokenizer may lose without a problem."""


def check_run(run: TrainingRun, session: Session) -> RunResult:
    """Make the first step of a run, print it with what the rules find, and return the result.

    Args:
        run: the run. Its weights have been trained afterwards, and nothing of it is saved. Rewards have their
            states of before again.
        session: the session, which has been opened.

    Returns:
        The result, with exit code 2 if there is a problem, else 0; its `flags` name problems and remarks.
    """
    findings = _text_findings(run)
    before = run.rewards.state_dict()
    observed = observe_run(run, [])
    lines = {}
    try:
        session.console.note("making the first step ...")
        run.check_prompts()
        learner, rewards = run.learner, run.training_rewards
        learner.args = replace(run.args, value_warmup=0)  # so that the policy is updated too
        record = training_step(learner, rewards, run.memory, 1, run.stream)
    except TokenrlError as error:
        text = f"{error} Training would stop at the same error."
        findings.append(Finding("step-failed", "void", text))
    else:
        _show_step(run, session, record)
        lines = _lines(run, record)
        if failed := failures_of(record.failures):
            findings.append(Finding("environment-fails", "void", failed))
        if run.args.warm_start and not run.warm_started:
            session.console.note("The warm start has not been made, so this step is not judged.")
        else:
            args, metrics = run.args, record.metrics
            whole = Means()
            if run.rewards.environments is not None:  # a turn that was cut off is never acted on
                whole = Means(cut=metrics["completions/clipped_ratio"])
            equal = share_equal(metrics, args.estimator.needs_groups)
            observed = observe_run(run, [{"step": 1, **metrics}])
            observed = replace(
                observed,
                whole=whole,
                groups=_groups(args),
                is_misasked=asks_in_text(run) or equal == 1,
                others_differ=args.teacher is not None or args.completions < ENOUGH,
                skipped=float(not math.isfinite(metrics["grad_norm"])),
            )
            if record.unread:
                findings.append(Finding("unread-tokens", "watch", record.unread))
    run.rewards.load_state_dict(before)
    # A remark on a value that was left to tokenrl would contradict tokenrl's own choice.
    is_open = run.plan.origins.get("max_completion_length") != "given"
    for finding in judge(observed):
        if not (is_open and finding.flag == "truncation" and finding.weight == "watch"):
            findings.append(finding)
    session.conclude("model, data, sampling, rewards and estimator", lines, findings)
    return run.result(session)


def _groups(args: TrainArguments) -> str:
    """Return in words which completions of a step are compared, and how many there are."""
    size = args.num_generations
    count = args.completions
    groups = f"{quantity(args.prompts_per_step, 'group')} of {size} completions ({count:,} in all)"
    return groups if size > 1 else f"{count:,} completions"


def _lines(run: TrainingRun, record: Record) -> dict[str, str]:
    """Return the lines of the table about the first step, and what the run takes at its pace."""
    args = run.args
    metrics = record.metrics
    lines = {}
    if not run.unrewarded:
        unequal = 1 - share_equal(metrics, args.num_generations > 1)
        share = f"{unequal:.0%} of {_groups(args)}"
        lines["reward"] = f"{metrics['reward']:.3g} on average; differs within {share}"
    cut = f"{metrics['completions/clipped_ratio']:.0%} cut at {args.max_completion_length}"
    lines["completions"] = f"{metrics['completions/mean_length']:.1f} tokens on average; {cut}"
    sampling = record.timings["collect"]
    evaluated = len(run.task.eval_prompts) * (1 + args.eval_generations)
    run.eval_seconds = sampling * evaluated / run.sampled
    time = run.forecast_duration(sampling + record.timings["update"])
    lines["time"] = f"{time}, at the pace of this step"
    return lines | {MEMORY[n]: decimal(int(x * 1024**3)) for n, x in peak_memory().items()}


def _show_step(run: TrainingRun, session: Session, record: Record) -> None:
    """Print the first prompt as model and teacher read it, or the first episode, and completions with each reward."""
    rows = record.rows()
    console = session.console
    episodic = run.rewards.environments is not None
    if not episodic:
        policy = run.learner.policy
        (ids,) = encode(policy, rows[:1], run.learner.sampling)
        text = policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        console.note(f"The first prompt, as the model reads it: {visible(text, LONGEST_SHOWN)}")
    if text := rows[0].get("teacher_prompt"):
        console.note(f"Its teacher reads in place of it: {visible(text, LONGEST_SHOWN)}")
    table = examples(rows, run.args.num_generations)
    names = [f"rewards/{name}" for name in run.rewards.names]
    console.completions_table(table, ["reward"] if len(names) < 2 else [*names, "reward"])
    if episodic:
        first = table[0]
        parts = transcript(first["prompt"], first["messages"], first["ending"], first["failure"])
        console.note(f"The first of these episodes:\n{harmless(parts)}")


def _text_findings(run: TrainingRun) -> list[Finding]:
    """Return a finding if the tokenizer loses characters of prompts, answers or demonstrations."""
    task = run.task
    parts = task.train_prompts, task.eval_prompts, task.demonstrations
    rows = [row for part in parts for row in islice(part, MANY)]
    columns = ("prompt", *ALIKE[0])
    texts = [text for row in rows for name in columns for text in texts_in(row.get(name))]
    tokenizer = run.learner.policy.tokenizer
    words, share = unknown_characters(tokenizer, texts, "prompts, answers and demonstrations")
    if not share:
        return []
    text = f"The tokenizer loses {words}. Take a model that can read and write them, or other spellings."
    weight: Weight = "void" if share > MOST_UNKNOWN else "watch"
    return [Finding("unknown-characters", weight, text)]
