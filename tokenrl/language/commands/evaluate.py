"""Evaluates models on a task's held-out prompts, the command `tokenrl evaluate`."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, overload

from tokenrl.configuration import check_code, read_config
from tokenrl.errors import Refused
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.language.commands.arguments import EvaluateArguments
from tokenrl.language.evaluation.best_of_n import best_of_n_metrics
from tokenrl.language.evaluation.evaluation import (
    Evaluation,
    check_sizes,
    evaluate_policy,
    over_prompts,
)
from tokenrl.language.policy.arguments import fill_form, form_line, run_of
from tokenrl.language.policy.characters import prompt_warnings
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import Policy, load_policy
from tokenrl.language.rewards.calls import TrainerState
from tokenrl.language.rollout.distribution import Distribution, distribution_of
from tokenrl.language.rollout.rewarded import failures_of
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.defaults import completion_limit
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.records import IN_MEMORY
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import PromptTask, find_task, own_task
from tokenrl.runs.console import measured
from tokenrl.runs.directory import STEP
from tokenrl.runs.files import check_place, plain, write_json
from tokenrl.runs.metric_table import metric_of
from tokenrl.runs.output import rich_console, rich_table, visible
from tokenrl.runs.reader import read_run
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import arguments, field_types, lay

DIFFERENCE = "difference/"
"""Begins the names of metrics that compare a policy with another."""


@overload
def evaluate(
    args: EvaluateArguments | None = None, *, model: str | os.PathLike[str] = "", **options: Any
) -> Evaluation: ...


@overload
def evaluate(
    args: EvaluateArguments | None = None, *, model: list[str] | tuple[str, ...], **options: Any
) -> dict[str, Evaluation]: ...


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
    with contextlib.redirect_stderr(io.StringIO() if args.quiet else sys.stderr):
        return _evaluations(as_trained(args))


def _evaluations(args: EvaluateArguments) -> Evaluation | dict[str, Evaluation]:
    """Evaluate the models of arguments that leave nothing open."""
    names = (args.model,) if isinstance(args.model, str) else args.model
    results: dict[str, Evaluation] = {}
    for name in names:
        result = _evaluated(args, name)
        if results:
            first = results[names[0]]
            differences = paired_differences(first.by_prompt, result.by_prompt)
            result = replace(result, metrics=result.metrics | differences)
        results[name] = result
    if args.json is not None:
        numbers: dict[str, Any] = {name: result.metrics for name, result in results.items()}
        if len(names) == 1:
            numbers = numbers[names[0]]
        write_json(Path(args.json), numbers)
    return results[args.model] if isinstance(args.model, str) else results


def as_trained(args: EvaluateArguments) -> EvaluateArguments:
    """Fill in what the arguments leave open, from the runs that saved the models, and print what was taken.

    Raises:
        Refused: no model is named; the file of results cannot be written; nothing names a task;
            the runs differ in a setting; or a run was given objects of a Python program, which have no name.
    """
    models = (args.model,) if isinstance(args.model, str) else args.model
    if not all(models) or not models:
        raise Refused("Name the model to evaluate: model (--model), a directory or hub name.")
    if args.json is not None:
        check_place(args.json)
    filled: EvaluateArguments = as_in_runs(args, models, *vars(Distribution()), "seed")
    if filled.task is None:
        raise Refused(
            f"Name the task to evaluate on: task (--task). No run of one saved {', '.join(models)}."
        )
    return filled


def as_in_runs(args: Any, models: Sequence[str], *further: str) -> Any:
    """Fill in what the arguments leave open of the task and its data, and print what was taken.

    Args:
        args: the arguments, those of `tokenrl evaluate` or `tokenrl sample`; what is left open is None.
        models: the models, as they were named.
        *further: names of settings that are taken from a run whatever the task is.

    Raises:
        Refused: as `as_trained` says.
    """
    from_runs = dict[str, Any]()
    runs = list[str]()
    open_names = [name for name, value in vars(args).items() if value is None]
    for model in models:
        run = run_of(model)
        if run is None:
            continue
        runs.append(model)
        config = read_config(run)
        names = {*further, *_names_for(args, config)} & config.keys()
        settings = {name: config[name] for name in open_names if name in names}
        # Objects of a Python program have no name elsewhere.
        objects = str([settings.get(name) for name in ("reward", "environment")])
        has_objects = args.task is None or re.search("<|__main__:", objects)
        if config.get("command") == "" and has_objects:
            raise Refused(
                f"The run of {model} was given objects of a Python program, which have no name here: say with "
                "task (--task) what it was trained on, and with reward (--reward) and environment "
                "(--environment) by what."
            )
        check_code(settings, str(run), config, trusted=args.trust_run)
        for name, value in settings.items():
            earlier = from_runs.setdefault(name, value)
            if earlier != value and name != "seed":
                flag = name.replace("_", "-")
                raise Refused(
                    f"The runs of {', '.join(runs)} differ in {name}, {earlier} and {value}: give {name} (--{flag})."
                )
    usual = vars(TaskArguments()) | {"task": args.environment}
    layers = ("default", usual), ("run", from_runs), ("given", vars(args))
    filled = arguments(type(args), lay(*layers)[0])
    usual = usual | vars(Distribution()) | {"seed": 0, "truncate_prompts": False}
    texts = []
    for name in from_runs:
        value = getattr(filled, name)
        if value != usual.get(name):
            words = map(str, value) if isinstance(value, tuple) else [str(value)]
            texts.append(" ".join([name, *words]))
    if texts:
        remark = f"tokenrl: as in the run of {', '.join(runs)}: {', '.join(texts)}"
        print(visible(remark), file=sys.stderr)
    return filled


def state_of(model: str) -> TrainerState:
    """Return how far the run was that saved a model, for reward functions; as outside of a run without one."""
    run = run_of(model)
    if run is None:
        return TrainerState()
    name = Path(model).resolve().name
    rows = read_run(run).metrics
    step = int(name.removeprefix("step_")) if re.fullmatch(STEP, name) else len(rows) - 1
    epoch = rows[step].get("epoch", 0.0)
    return TrainerState(step, read_config(run).get("max_steps") or 1, epoch)


def _names_for(args: Any, config: Mapping[str, Any]) -> set[str]:
    """Return the settings of a run that hold for the arguments too: all of them if its task is theirs.

    Data from Python has no name, and counts as the run's if that was given data from Python too. Another task
    may bring a limit of its own for the length.
    """
    task = args.task
    recorded = str(config.get("task"))
    names = {"max_completion_length", "truncate_prompts"}
    own = None
    if isinstance(task, str | None):
        name = task or recorded
    else:
        own = own_task(task)
        name = own.name if own else IN_MEMORY
    if name != recorded and not (name == IN_MEMORY and recorded.startswith(IN_MEMORY)):
        own = own or own_task(task)  # of another name, whose limit counts
        if own and own.max_completion_length:
            names.remove("max_completion_length")
        return names
    names |= {*field_types(TaskArguments)}
    if args.reward is not None and plain(args.reward) != config.get("reward"):
        names.remove("reward_weights")
    return names


def opened(args: Any, model: str, task: PromptTask, length: int = 256) -> tuple[Policy, int]:
    """Load a model, ask it as the arguments say, and print how; return it with the limit of a completion.

    Args:
        args: the arguments, those of `tokenrl evaluate` or `tokenrl sample`.
        model: the model as it was named.
        task: the task.
        length: the limit where neither the arguments nor the task have one.

    Raises:
        Refused: the model cannot be loaded, or cannot be asked so.
    """
    policy = load_placed(args, model)
    policy.ask(args.form)
    for line in form_line(policy.form, model).values():
        print(f"tokenrl: asked: {line}", file=sys.stderr)
    truncate = bool(getattr(args, "truncate_prompts", None))
    limit = args.max_completion_length
    return policy, limit or completion_limit(task, model, policy, length, truncate)[0]


def load_placed(args: Any, model: str) -> Policy:
    """Load a model and move it to the accelerator's device; without an accelerator that is the CPU."""
    policy = load_policy(model, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    policy.model.to(device_for(policy.size))
    return policy


def _evaluated(args: EvaluateArguments, model: str) -> Evaluation:
    """Evaluate one model, asked as its own run or the arguments say."""
    args = fill_form(args, model)
    generations = max((4, *args.k)) if args.num_generations is None else args.num_generations
    check_sizes(args.k, generations)
    task, rewards = find_task(args, may_lack_rewards=True)
    rewards.state = state_of(model)
    policy, length = opened(args, model, task)
    sampling = Sampling(length, generations, args.seed or 0, **distribution_of(args))
    sampling = replace(sampling, truncate_prompts=bool(args.truncate_prompts))
    reference = None if args.reference is None else load_placed(args, args.reference)
    divided = division_of(task, args.eval_size, {f"the model {model}": policy})[1]
    for warning in (*divided, *prompt_warnings(policy.tokenizer, task.eval_prompts)):
        print(f"tokenrl: {visible(warning)}", file=sys.stderr)
    with using_threads(choose_threads(policy.size)[0]):
        k = args.k
        if generations and not k:
            k = (1, generations)
        evaluation = evaluate_policy(
            policy, task.eval_prompts, rewards, sampling, k=k, reference=reference
        )
        if failed := failures_of(evaluation.failures):
            print(f"tokenrl: {visible(f'{model}: {failed}')}", file=sys.stderr)
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
    metrics: dict[str, float] = {}
    for name in [name for name in second if name in first]:
        pairs = zip(first[name], second[name], strict=True)
        mean, error = over_prompts([b - a for a, b in pairs])
        metrics[f"{DIFFERENCE}{name}"] = mean
        metrics[f"{DIFFERENCE}{name}_stderr"] = error
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def print_evaluation(args: EvaluateArguments) -> int:
    """Evaluate models and print a table of the metrics: of one with what they mean, of several side by side."""
    args = as_trained(args)
    result = evaluate(args)
    evaluations = result if isinstance(result, dict) else {str(args.model): result}
    models = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    first, *compared = models
    title = f"held-out prompts of {args.task} (± standard error)"
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
    return 0
