"""Evaluates models on a task's held-out prompts, the command `tokenrl evaluate`."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.configuration import check_code, read_config, values_of_code
from tokenrl.errors import Refused
from tokenrl.files import plain, write_json
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.language.commands.arguments import EvaluateArguments
from tokenrl.language.evaluation.best_of_n import best_of_n_metrics
from tokenrl.language.evaluation.estimates import estimates
from tokenrl.language.evaluation.evaluation import Evaluation, check_sizes, evaluate_policy
from tokenrl.language.policy.arguments import fill_form, form_line, run_of
from tokenrl.language.policy.characters import prompt_warnings
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.calls import TrainerState
from tokenrl.language.rollout.rewarded import failures_of
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.base import policy_of
from tokenrl.language.supervised.defaults import completion_limit
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.sources import IN_MEMORY, TaskArguments
from tokenrl.language.tasks.task import PromptTask, find_task, own_task
from tokenrl.runs.findings import Observed
from tokenrl.runs.metric_table import metric_of
from tokenrl.runs.output import measured, rich_console, rich_table, visible
from tokenrl.runs.reader import read_run
from tokenrl.runs.rules import judge
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import arguments, field_types, lay, part_of

T = TypeVar("T")


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


def models_of(args: Any) -> tuple[str, ...]:
    """Return the models that arguments name."""
    return args.model if isinstance(args.model, tuple) else (args.model,)


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


def remark(words: str) -> None:
    """Print a remark or a warning on the standard error."""
    print(visible(f"tokenrl: {words}"), file=sys.stderr)


def as_in_runs(args: T, announce: Callable[[str], None] = remark) -> T:
    """Lay arguments over the settings of the runs that saved the models, and these over the usual values.

    Args:
        args: the arguments of `tokenrl evaluate`, `tokenrl sample` or `tokenrl lab measure`, of which some are
            open.
        announce: prints what was taken from the runs.

    Raises:
        Refused: the runs differ in a setting, one was given objects of a Python program, which have no name, or
            code would be executed that a run names and this user did not (see `check_code`).
    """
    choices: Any = args
    usual = {f.name: f.metadata["usual"] for f in fields(choices) if "usual" in f.metadata}
    usual["task"] = choices.environment or usual["task"]
    from_runs = dict[str, Any]()
    runs = []
    for model in filter(run_of, models_of(choices)):
        runs.append(model)
        for name, value in _of_run(choices, model, {*usual}).items():
            if from_runs.setdefault(name, value) != value and name != "seed":
                raise Refused(
                    f"The runs of {', '.join(runs)} differ in {name}, {from_runs[name]} and {value}: give {name} "
                    f"(--{name.replace('_', '-')})."
                )
    layers = ("default", usual), ("run", from_runs), ("given", vars(args))
    settled = arguments(type(args), lay(*layers)[0])
    texts = []
    for name in from_runs:
        value = getattr(settled, name)
        if value != usual[name]:
            words = value if isinstance(value, tuple) else [value]
            texts.append(" ".join(map(str, [name, *words])))
    if texts:
        announce(f"as in the run of {', '.join(runs)}: {', '.join(texts)}")
    return settled


def _of_run(args: Any, model: str, names: set[str]) -> dict[str, Any]:
    """Return the settings of the run that saved a model which count for arguments that leave them open.

    Of another task neither the data nor the rewards are the run's, nor the length if that task has its own.

    Args:
        args: the arguments.
        model: the model, as it was named.
        names: the settings that a run can decide.
    """
    run = run_of(model)
    assert run is not None
    config = read_config(run)
    if args.reward is not None and plain(args.reward) != config.get("reward"):
        names = names - {"reward_weights"}
    if not _is_task_of(args.task, str(config.get("task"))):
        names = names - {*field_types(TaskArguments)}
        own = own_task(args.task)
        if own and own.max_completion_length:
            names -= {"max_completion_length"}
    left_open = [name for name in vars(args) if getattr(args, name) is None]
    settings = {name: config[name] for name in left_open if name in names & config.keys()}
    # Objects of a Python program have no name elsewhere.
    objects = str([value for *_, value in values_of_code(type(args), settings)])
    has_objects = args.task is None or re.search("<|__main__:", objects)
    if config.get("command") == "" and has_objects:
        raise Refused(
            f"The run of {model} was given objects of a Python program, which have no name here: say with "
            "task (--task) what it was trained on, and with reward (--reward) and environment "
            "(--environment) by what."
        )
    check_code(type(args), settings, run, config, trusted=args.trust_run)
    return settings


def _is_task_of(task: Any, recorded: str) -> bool:
    """Return whether a task is that of a run; data from Python is, if the run was given data from Python too."""
    if isinstance(task, str | None):
        name = task or recorded
    else:
        own = own_task(task)
        name = own.name if own else IN_MEMORY
    return name == recorded or (name == IN_MEMORY and recorded.startswith(IN_MEMORY))


def state_of(model: str) -> TrainerState:
    """Return how far the run was that saved a model, for reward functions; as outside of a run without one."""
    path = run_of(model)
    if path is None:
        return TrainerState()
    run = read_run(path)
    name = Path(model).resolve().name
    last = len(run.metrics) - 1
    step = int(name.removeprefix("step_")) if re.fullmatch("step_[0-9]+", name) else last
    epoch = run.metrics[step].get("epoch", 0.0)
    return TrainerState(step, run.config.get("max_steps") or 1, epoch)


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
        remark(f"asked: {line}")
    truncate = getattr(args, "truncate_prompts", False)
    limit = args.max_completion_length
    return policy, limit or completion_limit(task, model, policy, length, truncate)[0]


def load_placed(args: Any, model: str) -> Policy:
    """Load a model and move it to the accelerator's device; without an accelerator that is the CPU."""
    policy = policy_of(model, args)
    policy.model.to(device_for(policy.size))
    return policy


def _evaluated(args: EvaluateArguments, model: str) -> Evaluation:
    """Evaluate one model, asked as its own run or the arguments say."""
    args = fill_form(args, model)
    k = args.k
    generations = max((4, *k)) if args.num_generations is None else args.num_generations
    check_sizes(k, generations)
    task, rewards = find_task(args, may_lack_rewards=True)
    rewards.state = state_of(model)
    policy, length = opened(args, model, task)
    settled = replace(args, num_generations=generations, max_completion_length=length)
    sampling = part_of(settled, Sampling)
    reference = None if args.reference is None else load_placed(args, args.reference)
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
