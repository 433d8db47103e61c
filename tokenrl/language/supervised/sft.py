"""Fine-tunes a model on demonstrations (`tokenrl sft`), with a run directory like every training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokenrl.keywords import arguments_of_call, takes
from tokenrl.language.evaluation.evaluation import evaluate_policy
from tokenrl.language.policy.arguments import fill_form, form_line
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.saved import SavedModel
from tokenrl.language.policy.saving import Card, save_policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.forward import Forward, choose_forward
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.supervised.base import adapt, load_base, vocabulary_of
from tokenrl.language.supervised.defaults import (
    completion_limit,
    demonstrations,
    layers_below,
    room,
    settled,
    with_completions,
    with_origins,
)
from tokenrl.language.supervised.fit import (
    SupervisedTraining,
    as_in_episodes,
    encode_demonstrations,
    run_updates,
)
from tokenrl.language.tasks.held_out import (
    chosen,
    counted,
    division_of,
)
from tokenrl.language.tasks.records import provenance_of, recorded
from tokenrl.language.tasks.task import find_task
from tokenrl.runs.findings import Observed, evaluations
from tokenrl.runs.origin import repetition
from tokenrl.runs.output import number
from tokenrl.runs.reader import Outcome
from tokenrl.runs.resume import resume_settings
from tokenrl.runs.rules import judge
from tokenrl.runs.session import Session
from tokenrl.runs.threads import choose_threads, using_threads

LOSS_NOTE = "The loss is the negative log-likelihood, in nats per token."
EVALUATED = 64
"""Held-out prompts of an evaluation, each with one greedy and one sampled completion: a small cost."""


@dataclass(frozen=True, repr=False)
class SftResult(Outcome):
    """The result of a supervised run; see `Outcome` for the other fields.

    Evaluations have the loss of held-out rows with a completion, and with a reward what the policy earns.

    Attributes:
        loss_before: mean negative log-likelihood of the first batch before its update, in nats per token;
            None if there was no step.
        loss_after: the same of the last batch.
        policy: the trained policy.
    """

    loss_before: float | None
    loss_after: float | None
    policy: Policy = field(repr=False)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            *super()._rows(),
            ("loss of a batch", number(self.loss_before), number(self.loss_after)),
        ]


@takes(SftArguments)
def sft(args: SftArguments | None = None, **options: Any) -> SftResult:
    """Fine-tune a model on demonstrations; the keywords are the fields of `SftArguments`.

    The model is saved in `model/` of the run directory. Arguments that name a model also accept the run
    directory itself.

    Args:
        args: all arguments at once, instead of keywords.
        **options: the fields of `SftArguments`.

    Returns:
        The trained policy, its loss before and after, and where the task has a reward also the evaluations.

    Raises:
        Refused: there are no demonstrations or no model, or the output directory cannot be used.
        Stopped: the loss or its gradient became NaN or infinite.
    """
    args = arguments_of_call(SftArguments, args, options)
    choices = fill_form(resume_settings(args, "sft"))
    with Session("sft", choices) as session, ExitStack() as stack:
        task, rewards = find_task(choices, whole=True)
        rows = demonstrations(task, choices.completion_column)
        name = choices.task if isinstance(choices.task, str) else str(task.name)
        first = {
            "task": division_of(task, choices.eval_size)[0],
            "demonstrations": counted(rows.hashes),
            "seed": choices.seed,
            "run": session.directory,
        }
        session.console.start(f"tokenrl sft: {name}", first, note=LOSS_NOTE)
        session.console.note("loading the model ...")
        policy = load_base(choices, task, session.console.note)
        adapt(choices, policy)
        policy.model.to(device_for(policy.size, choices.cpu))
        threads, reason = choose_threads(policy.size, choices.threads)
        stack.enter_context(using_threads(threads))
        environments = rewards.environments
        rows = as_in_episodes(rows, environments, session.console.warn)
        pairs = encode_demonstrations(policy, rows, environments, choices.allowed)
        length = room(pairs)
        if rewards.functions and task.eval_prompts:
            length, _ = completion_limit(task, choices.model, policy, otherwise=length)
        turns = environments is not None
        forward, decided = choose_forward(choices, policy, length=length, turns=turns)
        decided |= {"threads": threads, "output_dir": session.directory}
        decided["chat_time"] = policy.form.chat_time
        layers = layers_below(choices, task, policy)
        settings, origins = settled(choices, *layers, **decided)
        training = SupervisedTraining(policy, pairs, settings, forward)
        header = _header(settings, origins, forward) | {"threads": f"{threads} ({reason})"}
        session.open(
            settings,
            SavedModel(policy),
            provenance_of(policy, {"demonstrations": rows}),
            {"training": training},
            header,
            names={"task": name, "model": policy.source},
            title=f"{name}, supervised, seed {settings.seed}",
            **recorded(task),
        )
        evaluate = _evaluation(session, task, rewards, training, forward, length)
        run_updates(session, training, evaluate)
        return _finish(session, policy, header)


def _header(args: SftArguments, origins: Mapping[str, str], forward: Forward) -> dict[str, Any]:
    """Return the lines of the header that are known once the model is loaded."""
    line = partial(with_origins, origins)
    steps = f"{args.max_steps} updates"
    batch = f"{args.batch_size} demonstrations"
    rate = line(learning_rate=f"{args.learning_rate:g}")
    return {
        "model": f"{forward.policy.source}{vocabulary_of(forward.policy)}",
        "training": line(" x ", max_steps=steps, batch_size=batch),
        "learning rate": f"{rate}, {args.lr_scheduler_type}",
        "computing": forward.words,
        **form_line(forward.policy.form, args.model),
        **forward.regime.remarks,
    }


def _evaluation(
    session: Session,
    task: Any,
    rewards: Rewards,
    training: SupervisedTraining,
    forward: Forward,
    length: int,
) -> Callable[[], dict[str, float]]:
    """Return a function that evaluates the policy on held-out rows.

    It computes the loss of those that have a completion, and with a reward what completions of the policy earn.
    """
    args = session.args
    policy = forward.policy
    numbers = chosen(task.eval_prompts, args.eval_size or EVALUATED)
    prompts = task.eval_prompts.take(numbers)
    environments = rewards.environments
    # As those that are learnt from, of which a warning has been told.
    demonstrated = with_completions(prompts, args.completion_column)
    rows = as_in_episodes(demonstrated, environments, lambda words: None)
    pairs = encode_demonstrations(policy, rows, environments, args.allowed) if rows else []
    if not prompts or not (rewards.functions or pairs):
        return dict
    for warning in division_of(task, args.eval_size, {f"the model {policy.source}": policy})[1]:
        session.console.warn(warning)
    sampling = Sampling(length, seed=args.seed, allowed=args.allowed)
    generator = TransformersGenerator(policy, regime=forward.regime)

    def evaluate() -> dict[str, float]:
        forward.copy_weights()
        metrics = {"loss": training.held_out_loss(pairs)} if pairs else {}
        if rewards.functions:
            metrics |= evaluate_policy(
                policy, prompts, rewards, sampling, generator=generator
            ).metrics
        return metrics

    return evaluate


def _finish(session: Session, policy: Policy, header: Mapping[str, Any]) -> SftResult:
    """Save the model with its card, write summary and report, and show how the run ended."""
    args = session.args
    policy.trained_prompts = session.provenance.trained_prompts
    losses = [row["loss"] for row in session.rows[1:]] or [None]
    ended = SftResult(
        **session.outcome(), loss_before=losses[0], loss_after=losses[-1], policy=policy
    )
    facts: dict[str, Any] = {**header, "final loss": ended.loss_after, "weights": ended.weights}
    facts |= {f"{name} after": value for name, value in ended.eval_after.items()}
    title = f"{session.provenance.settings['task']}, supervised, seed {args.seed}"
    card = Card(title, facts, repetition(session.command), args.model, ["sft"])
    greedy = evaluations(session.rows, "eval_reward_greedy")
    findings = judge(Observed(keep=session.args.keep, greedy=greedy), "greedy-fell")
    session.finish(ended, lambda path: save_policy(policy, path, card=card), findings)
    return ended
