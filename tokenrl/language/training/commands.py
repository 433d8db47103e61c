"""What `tokenrl sft` and `evaluate` do, as functions of the fields of their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenrl.errors import Refused
from tokenrl.language.policy.saving import model_card, refuse_foreign_directory, save_policy
from tokenrl.language.tasks.sources import read_splits, with_prompts
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import EvaluateArguments, SftArguments
from tokenrl.language.training.evaluation import Evaluation, evaluate_policy
from tokenrl.language.training.evaluation_metrics import check_sizes
from tokenrl.language.training.setup import arguments, load_placed, make_policy
from tokenrl.language.training.supervised import fit
from tokenrl.runs.checkpoint import replace_directory
from tokenrl.runs.console import Console
from tokenrl.runs.directory import write_json
from tokenrl.settings import check_number

SFT_DEFAULTS = {"max_steps": 200, "batch_size": 64, "learning_rate": 2e-5}


def sft(args: SftArguments | None = None, **options: Any) -> Path:
    """Fine-tune a model on a task's demonstrations and save it.

    Returns:
        The directory of the model.

    Raises:
        Refused: no demonstrations, no model, or an output directory that holds something else.
    """
    args = args or arguments(SftArguments, options)
    directory = Path(args.output_dir)
    refuse_foreign_directory(directory, overwrite=args.overwrite)
    task, rows = _demonstrations(args)
    console = Console(quiet=args.quiet)
    policy = make_policy(args, task, console.note)
    warm = getattr(task, "warm_start", None)
    recommended = {} if warm is None else {"batch_size": warm.batch_size, "max_steps": warm.steps}
    if warm is not None and args.model is None:  # a rate for tiny models, not for pretrained ones
        recommended["learning_rate"] = warm.learning_rate
    chosen = {name: getattr(args, name) for name in SFT_DEFAULTS if getattr(args, name) is not None}
    settings = SFT_DEFAULTS | recommended | chosen
    facts = {
        "model": policy.source,
        "demonstrations": f"{len(rows):,}",
        "updates": f"{settings['max_steps']} of {settings['batch_size']}, "
        f"learning rate {settings['learning_rate']:g}",
    }
    console.start(
        f"tokenrl sft: {args.task}", facts, note="The loss is the negative log-likelihood, nats a token."
    )
    with console.progress(int(settings["max_steps"])) as progress:
        losses = fit(policy, rows, seed=args.seed, progress=progress.update, **settings)  # type: ignore[arg-type]
    card = model_card(
        f"{args.task}, supervised",
        facts | {"final loss": losses[-1]},
        command=f"tokenrl sft --task {args.task}",
    )
    replace_directory(directory, lambda path: save_policy(policy, path, card=card))
    console.note(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}\nmodel {directory}")
    return directory


def _demonstrations(args: SftArguments) -> tuple[Any, list[dict[str, Any]]]:
    """The task, if there is one, and rows of prompt and completion."""
    if not isinstance(args.task, str) or ":" in args.task or _is_toy(args.task):
        task, _ = find_task(args)
        rows = list(getattr(task, "demonstrations", None) or [])
        if not rows:
            raise Refused(
                f"The task {task.name!r} has no demonstrations; give a task that has, or a data set with a "
                "prompt and a completion column."
            )
        return task, rows
    if args.model is None:
        raise Refused(
            "A data set brings no model: say which to fine-tune with --model DIRECTORY_OR_HUB_NAME."
        )
    splits = read_splits(args.task)
    if args.split not in splits:
        raise Refused(f"{args.task!r} has no split {args.split!r}; it has {', '.join(splits)}.")
    rows = with_prompts(splits[args.split], args.task, args.prompt_column, args.prompt_template)
    if args.completion_column not in rows[0]:
        raise Refused(
            f"{args.task!r} has no column {args.completion_column!r}; it has {', '.join(rows[0])}. Name the "
            "one that holds the completions with --completion-column."
        )
    return None, [row | {"completion": row[args.completion_column]} for row in rows]


def _is_toy(name: str) -> bool:
    try:
        from importlib import import_module

        return name in import_module("toy_tasks").NAMES
    except ImportError:
        return False


def evaluate(args: EvaluateArguments | None = None, **options: Any) -> Evaluation:
    """Evaluate a model on a task's held-out prompts; see `evaluate_policy` and `details` for the numbers.

    Raises:
        Refused: no such model, reference or task, a reward that cannot be used, or a number out of range.
    """
    args = args or arguments(EvaluateArguments, options)
    if not args.model:
        raise Refused("Say which model to evaluate: --model DIRECTORY_OR_HUB_NAME.")
    check_number("temperature", args.temperature, above=0)
    k = (args.k,) if isinstance(args.k, int) else tuple(args.k)
    generations = max((4, *k)) if args.num_generations is None else args.num_generations
    check_number("num_generations", generations, at_least=0)
    check_sizes(k, generations)  # before the model is loaded
    task, rewards = find_task(args)
    how: dict[str, Any] = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    policy = load_placed(args.model, **how)
    evaluation = evaluate_policy(
        policy,
        task.eval_prompts,
        rewards,
        max_completion_length=args.max_completion_length or task.max_completion_length or 256,
        num_generations=generations,
        temperature=args.temperature,
        seed=args.seed,
        truncate_prompts=args.truncate_prompts,
        detailed=True,
        k=k or ((1, generations) if generations else ()),
        reference=None if args.reference is None else load_placed(args.reference, **how),
    )
    if args.json:
        write_json(Path(args.json), evaluation.metrics)
    return evaluation
