"""Evaluates models on a task's held-out prompts, the command `tokenrl evaluate`."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused
from tokenrl.files import write_json
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.language.commands.arguments import EvaluateArguments
from tokenrl.language.commands.opening import (
    as_in_runs,
    load_saved,
    models_of,
    place,
    remark,
    state_of,
)
from tokenrl.language.evaluation.best_of_n import best_of_n_metrics
from tokenrl.language.evaluation.estimates import estimates
from tokenrl.language.evaluation.evaluation import Evaluation, check_sizes, evaluate_policy
from tokenrl.language.policy.arguments import fill_form
from tokenrl.language.policy.characters import prompt_warnings
from tokenrl.language.rollout.rewarded import failures_of
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.base import policy_of
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.task import find_task
from tokenrl.runs.findings import Observed
from tokenrl.runs.metric_table import metric_of
from tokenrl.runs.output import measured, rich_console, rich_table
from tokenrl.runs.rules import judge
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import part_of


@takes(EvaluateArguments)
def evaluate(
    args: EvaluateArguments | None = None, **options: Any
) -> Evaluation | dict[str, Evaluation]:
    """Evaluate models on a task's held-out prompts; the keywords are the fields of `EvaluateArguments`.

    Several models are loaded one after the other. All get the same prompts and the same random numbers.

    Args:
        args: all arguments at once, instead of keywords.
        **options: the fields of `EvaluateArguments`.

    Returns:
        For one model its metrics and greedy completions. `evaluate_policy` lists the metrics; `best_of` adds
        `best_of_n_metrics`. For a list or tuple of models a dict of these by model, in its order. The metrics
        of every model but the first also have its `paired_differences` to the first.

    Raises:
        Refused: a model, the reference, the task or a reward cannot be used, or a number is out of range.
        Stopped: a reward function failed.
    """
    args = arguments_of_call(EvaluateArguments, args, options)
    results = _evaluations(args)[1]
    _write(args, results)
    return results[args.model] if isinstance(args.model, str) else results


def _evaluations(args: EvaluateArguments) -> tuple[Any, dict[str, Evaluation]]:
    """Settle the arguments and evaluate the models; return the task, and the evaluations by model."""
    with contextlib.redirect_stderr(io.StringIO() if args.quiet else sys.stderr):
        args = as_trained(args)
        results: dict[str, Evaluation] = {}
        for name in models_of(args):
            result = _evaluated(args, name)
            if results:
                first = next(iter(results.values()))
                differences = paired_differences(first.by_prompt, result.by_prompt)
                result = replace(result, metrics=result.metrics | differences)
            for finding in judge(Observed(constant=result.constant), "constant-answer"):
                remark(finding.text)
            results[name] = result
    return args.task, results


def _write(args: EvaluateArguments, results: Mapping[str, Evaluation]) -> None:
    """Write the metrics into the file that the arguments name, those of several models by the model."""
    if args.json is not None:
        numbers: dict[str, Any] = {name: result.metrics for name, result in results.items()}
        write_json(Path(args.json), numbers if len(numbers) > 1 else next(iter(numbers.values())))


def as_trained(args: EvaluateArguments) -> EvaluateArguments:
    """Settle what the arguments leave open, from the runs that saved the models.

    Raises:
        Refused: no model is named, nothing names a task, or as `as_in_runs` says.
    """
    models = models_of(args)
    if not all(models) or not models:
        raise Refused("Name the model to evaluate: model (--model), a directory or hub name.")
    args = as_in_runs(args)
    if args.task is None:
        raise Refused(
            f"Name the task to evaluate on: task (--task). No run of one saved {', '.join(models)}."
        )
    return args


def _evaluated(args: EvaluateArguments, model: str) -> Evaluation:
    """Evaluate one model, asked as its own run or the arguments say."""
    args = fill_form(args, model)
    k = args.k
    generations = max((4, *k)) if args.num_generations is None else args.num_generations
    check_sizes(k, generations)
    task, rewards = find_task(args, may_lack_rewards=True)
    rewards.state = state_of(model)
    policy = load_saved(args, model)
    length = place(args, policy, model, task)
    settled = replace(args, num_generations=generations, max_completion_length=length)
    sampling = part_of(settled, Sampling)
    reference = None if args.reference is None else policy_of(args.reference, args)
    if reference is not None:
        reference.model.to(policy.device)
    divided = division_of(task, args.eval_size, {f"the model {model}": policy})[1]
    for warning in (*divided, *prompt_warnings(policy.tokenizer, task.eval_prompts)):
        remark(warning)
    with using_threads(choose_threads(policy.size)[0]):
        if generations and not k:
            k = (1, generations)
        evaluation = evaluate_policy(
            policy, task.eval_prompts, rewards, sampling, k=k, reference=reference
        )
        if failed := failures_of(evaluation.failures):
            remark(f"{model}: {failed}")
        metrics = evaluation.metrics | {"max_completion_length": length}
        if args.best_of:
            gold = rewards
            if args.reward:  # the task's own rewards measure the choice
                with contextlib.suppress(Refused):  # a data set has none
                    gold = find_task(replace(args, reward=(), reward_weights=()))[1]
            gold.state = rewards.state
            pool = replace(sampling, num_generations=args.best_of)
            metrics |= best_of_n_metrics(policy, task.eval_prompts, rewards, gold, pool)
    return replace(evaluation, metrics=metrics)


def paired_differences(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Compare two policies that were evaluated on the same prompts, prompt by prompt.

    The standard error belongs to the mean of the prompts' differences. It is smaller than the error of two
    separate evaluations, because a prompt is about as hard for both (Miller 2024, arXiv 2411.00640). It
    describes these two sets of weights; trainings with other seeds differ more.

    Args:
        first: `Evaluation.by_prompt` of the first policy.
        second: `Evaluation.by_prompt` of the second policy.

    Returns:
        For each name that both have, `difference/NAME`, second minus first, and `difference/NAME_stderr`.
        Prompts at which either has no value are left out.
    """
    differences = {}
    for name in [name for name in second if name in first]:
        pairs = zip(first[name], second[name], strict=True)
        differences[f"difference/{name}"] = [b - a for a, b in pairs]
    return estimates(differences)


def print_evaluation(args: EvaluateArguments) -> int:
    """Evaluate models and print a table of the metrics: of one with what they mean, of several side by side."""
    task, evaluations = _evaluations(args)
    models = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    first, *compared = models
    title = f"held-out prompts of {task} (± standard error)"
    if compared:
        title = f"{title}; difference/ is minus {first}, by prompt"
        table = rich_table(title, ("",), [*models], overflow="fold")
    else:
        table = rich_table(f"{first}: {title}", ("",), ["value"], overflow="fold")
        table.add_column("")
    names = {*chain.from_iterable(models.values())}
    for name in sorted(names, key=lambda name: (metric_of(name).row, name)):
        if name.endswith("_stderr"):
            continue
        error = f"{name}_stderr"
        cells = [measured(metrics.get(name), metrics.get(error)) for metrics in models.values()]
        if not compared:
            cells.append(metric_of(name).caption)
        table.add_row(name, *cells)
    rich_console().print(table)
    _write(args, evaluations)
    return 0
