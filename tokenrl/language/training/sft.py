"""Fine-tunes a model on demonstrations (`tokenrl sft`), with a run directory like every training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenrl.calls import called
from tokenrl.errors import Refused
from tokenrl.language.policy.cards import Card, base_model
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.prompts import asked, settled_form
from tokenrl.language.policy.saving import save_policy
from tokenrl.language.rollout.ways import choose_way
from tokenrl.language.tasks.memory import IN_MEMORY, description, memory_splits, recorded
from tokenrl.language.tasks.sources import read_splits, with_prompts
from tokenrl.language.tasks.task import PromptTask, find_task, is_toy_task
from tokenrl.language.training.arguments import SftArguments, SftSettings
from tokenrl.language.training.setup import make_policy
from tokenrl.language.training.supervised import SupervisedTraining
from tokenrl.runs.outcome import Outcome
from tokenrl.runs.session import Session
from tokenrl.runs.timings import Stopwatch
from tokenrl.settings import settled

DEFAULTS = {"max_steps": 200, "batch_size": 64, "learning_rate": 2e-5}


@dataclass(frozen=True)
class SftResult(Outcome):
    """The result of a supervised run; see `Outcome` for the other fields. Nothing is evaluated.

    Attributes:
        loss_before: mean negative log-likelihood of the first batch before its update, in nats per token;
            None if there was no step.
        loss_after: the same of the last batch.
        policy: the trained policy.
    """

    loss_before: float | None
    loss_after: float | None
    policy: Policy = field(repr=False)


def sft(args: SftArguments | None = None, **options: Any) -> SftResult:
    """Fine-tune a model on demonstrations; the keywords are the fields of `SftArguments`.

    The model is saved in `model/` of the run directory. Arguments that name a model also accept the run
    directory itself.

    Args:
        args: all arguments at once, instead of keywords.
        **options: the fields of `SftArguments`.

    Returns:
        The trained policy and its loss before and after.

    Raises:
        Refused: there are no demonstrations or no model, or the output directory cannot be used.
        Stopped: the loss became NaN or infinite.
    """
    args = settled_form(called(SftArguments, args, options))
    with Session(
        "sft", args.output_dir, overwrite=args.overwrite, quiet=args.quiet, tracking=args
    ) as session:
        task, rows = _demonstrations(args)
        policy = make_policy(args, task, session.console.note)
        choose_way(policy)
        args = _resolve(args, task)
        how = {"max_steps": args.max_steps, "batch_size": args.batch_size, "seed": args.seed}
        training = SupervisedTraining(policy, rows, learning_rate=args.learning_rate, **how)
        facts = {
            "model": policy.source,
            "demonstrations": f"{len(rows):,}",
            "updates": f"{args.max_steps} of {args.batch_size}, learning rate {args.learning_rate:g}",
            **asked(policy.form, args.model),
            **({"prompts": policy.remark} if policy.remark else {}),
        }
        name = args.task if isinstance(args.task, str) else str(task.name)
        title = f"{name}, supervised, seed {args.seed}"
        session.open(
            f"tokenrl sft: {name}", facts, note="The loss is the negative log-likelihood, in nats per token."
        )
        session.begin(args, names={"task": name, "model": policy.source}, title=title, **recorded(task))
        losses, watch = [], Stopwatch()
        for _ in session.steps(args.max_steps):
            metrics = watch.time(training.update)
            losses.append(metrics["loss"])
            session.record(metrics, watch.timings(training.tokens))
        first, last = (losses[0], losses[-1]) if losses else (None, None)
        ended = SftResult(**session.outcome("finished"), loss_before=first, loss_after=last, policy=policy)
        made = session.origin.in_words()
        card = Card(title, facts | {"final loss": last}, made, base_model(args.model), ["sft"])
        session.finish(ended, lambda path: save_policy(policy, path, card=card))
        return ended


def _resolve(args: SftArguments, task: Any) -> SftSettings:
    """Fill in the arguments left open, from the warm start that the task recommends or else a default."""
    warm = getattr(task, "warm_start", None)
    recommended = {} if warm is None else {"batch_size": warm.batch_size, "max_steps": warm.steps}
    if warm is not None and args.model is None:  # that rate is for tiny models, not for pretrained ones
        recommended["learning_rate"] = warm.learning_rate
    return settled(SftSettings, args, DEFAULTS | recommended)


def _demonstrations(args: SftArguments) -> tuple[Any, list[dict[str, Any]]]:
    """Return the task (None for a data set that has a name) and its rows of prompt and completion."""
    named = isinstance(args.task, str)
    if hasattr(args.task, "train_prompts") or (named and (":" in args.task or is_toy_task(args.task))):
        task, _ = find_task(args)
        rows = list(getattr(task, "demonstrations", None) or [])
        if not rows:
            raise Refused(
                f"The task {task.name!r} has no demonstrations. Give a task that has some, or a data set "
                "with a prompt and a completion column."
            )
        return task, rows
    if args.model is None:
        raise Refused(
            "A data set has no model of its own: name the one to fine-tune, --model DIRECTORY_OR_HUB_NAME."
        )
    splits = read_splits(args.task) if named else memory_splits(args.task)
    where = repr(args.task) if named else "The data"
    if args.split not in splits:
        raise Refused(f"{where} has no split {args.split!r}; it has {', '.join(splits)}.")
    rows = with_prompts(splits[args.split], where, args.prompt_column, args.prompt_template)
    if args.completion_column not in rows[0]:
        raise Refused(
            f"{where} has no column {args.completion_column!r}; it has {', '.join(rows[0])}. Name the "
            "column of the completions with completion_column (--completion-column)."
        )
    rows = [row | {"completion": row[args.completion_column]} for row in rows]
    if named:
        return None, rows
    origin = description(splits)
    return PromptTask(IN_MEMORY + origin["fingerprint"], rows, [], None, origin=origin), rows
