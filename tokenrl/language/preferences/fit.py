"""Trains a reward model on preferences with the Bradley-Terry loss.

The model of choices is that of Bradley & Terry 1952, the loss that of Stiennon et al. 2020 and Ouyang et al.
2022, equation 1. Training uses one process and one device, and no adapters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tokenrl.errors import Refused
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.language.policy.arguments import fill_form, form_line
from tokenrl.language.policy.saved import SavedModel
from tokenrl.language.policy.saving import Card, save_policy
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.preferences.data import RewardData, load_reward_data, make_backbone
from tokenrl.language.preferences.evaluation import encode_pairs, preference_metrics, score_pairs
from tokenrl.language.preferences.pairs import Pair, check_pairs
from tokenrl.language.preferences.sampled import write_preferences
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rollout.forward import choose_passes
from tokenrl.language.rollout.passes import Passes
from tokenrl.language.supervised.defaults import settled
from tokenrl.language.supervised.fit import Descent, run_updates
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.records import provenance_of, recorded
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.task import PromptTask
from tokenrl.runs.checkpoint import tables
from tokenrl.runs.metrics import write_completions
from tokenrl.runs.origin import repetition
from tokenrl.runs.reader import Outcome
from tokenrl.runs.resume import resume_settings
from tokenrl.runs.session import Session
from tokenrl.runs.threads import choose_threads, using_threads

LOSS_NOTE = "The loss is the negative log-likelihood of the choices, in nats per pair; guessing gives 0.693."


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | float = 0.0,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """Mean negative log-likelihood of the choices, P(chosen) = sigmoid(d) with d = r_c - r_r - margin.

        -mean[log sigmoid(d)] + coefficient mean[(r_c + r_r)^2]

    The first term depends only on differences of rewards; the second (Eisenstein et al. 2023) keeps their
    mean near 0. The margin is that of Llama 2 (Touvron et al. 2023, equation 2).

    Args:
        chosen_rewards: rewards r_c of the chosen completions [B].
        rejected_rewards: rewards r_r of the rejected completions [B].
        margin: by how much r_c should exceed r_r: a number, or one per pair [B].
        center_rewards_coefficient: weight of the second term.

    Returns:
        A scalar.
    """
    difference = chosen_rewards - rejected_rewards - margin  # [B]
    center = (chosen_rewards + rejected_rewards).square().mean()
    return center_rewards_coefficient * center - logsigmoid(difference).mean()


class PreferenceTraining(Descent):
    """Training of a reward model: minimises the Bradley-Terry loss. Dropout is off.

    The reward model is changed in place.
    """

    subject = "the reward model"

    def __init__(
        self,
        reward_model: RewardModel,
        pairs: Sequence[Pair],
        args: RewardModelArguments,
        passes: Passes,
    ) -> None:
        """Tokenise the pairs and make the optimiser.

        Args:
            reward_model: the model to train.
            pairs: the pairs to train on.
            args: the settings.
            passes: how passes are computed.

        Raises:
            Refused: a text is longer than the model's context.
        """
        trained = [p for p in reward_model.model.parameters() if p.requires_grad]
        self._encoded = encode_pairs(reward_model, pairs)
        # Both texts are padded to the longest, and have no prompt apart.
        columns = [2 * max(map(len, texts)) for texts in self._encoded]
        super().__init__(trained, columns, [0] * len(columns), args, passes)
        self._model = copy.copy(reward_model)
        self._model.model = passes.model
        self._margins = [args.margin if pair.margin is None else pair.margin for pair in pairs]
        self._center = args.center_rewards_coefficient
        self._rewards: list[Tensor] = []

    def loss(self, rows: Sequence[int], batch: Sequence[int]) -> Tensor:
        """Return the share of the pairs of a pass in the mean over the batch."""
        texts = [self._encoded[i][0] for i in rows] + [self._encoded[i][1] for i in rows]
        self.tokens += sum(map(len, texts))
        rewards = self._model.logits(texts).view(2, -1)  # of the chosen and of the rejected
        self._rewards.append(rewards.detach())
        margin = rewards.new_tensor([self._margins[i] for i in rows])
        loss = bradley_terry_loss(*rewards, margin=margin, center_rewards_coefficient=self._center)
        return loss * (len(rows) / len(batch))

    def update(self) -> dict[str, float]:
        """Update the reward model on the next batch.

        Returns:
            Metrics of the batch, from before the update.

        Raises:
            Stopped: the loss or its gradient became NaN or infinite.
        """
        self._rewards.clear()
        metrics = super().update()
        chosen, rejected = torch.cat(self._rewards, dim=1).float()
        difference = chosen - rejected
        is_right = difference.heaviside(difference.new_tensor(0.5))
        return metrics | {
            "accuracy": float(is_right.mean()),
            "margin": float(difference.mean()),
            "rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
            "num_tokens": self.tokens,
        }


def fit_reward_model(
    reward_model: RewardModel, pairs: Sequence[Pair], args: RewardModelArguments
) -> list[dict[str, float]]:
    """Train a reward model for `args.max_steps` updates, without a run directory.

    Args:
        reward_model: the model to train, in place.
        pairs: the pairs to train on.
        args: the settings.

    Returns:
        The metrics of each update.

    Raises:
        Refused: a text is longer than the model's context.
        Stopped: the loss or its gradient became NaN or infinite.
    """
    passes, _ = choose_passes(args, reward_model.model)
    training = PreferenceTraining(reward_model, pairs, args, passes)
    return [training.update() for _ in range(args.max_steps)]


@dataclass(frozen=True, repr=False)
class RewardModelResult(Outcome):
    """The result of training a reward model; see `Outcome` for the other fields.

    Attributes:
        eval_before: metrics on the held-out pairs before training; see `preference_metrics`.
        reward_model: the trained model, which is itself a reward function; saved in `model/` of the run
            directory.
    """

    reward_model: RewardModel = field(repr=False)


@takes(RewardModelArguments)
def train_reward_model(
    args: RewardModelArguments | None = None, **options: Any
) -> RewardModelResult:
    """Train a reward model; the keywords are the fields of `RewardModelArguments`.

    Where the command line takes names, the keywords also take objects: `data` rows in memory, or a dict of
    splits; `model` whatever `reward_backbone` takes; `task` a task; `policy` a `Policy`; `reward` functions.

    Args:
        args: all arguments at once, instead of keywords.
        **options: the fields of `RewardModelArguments`.

    Returns:
        The trained reward model, and its evaluations.

    Raises:
        Refused: the arguments, the model or the data cannot be used; raised before the first step.
        Stopped: the run failed after it had begun.

    Example:
        >>> from tokenrl import train_reward_model
        >>> result = train_reward_model(task="sort_digits", output_dir="runs/judge")
        >>> result.eval_after["accuracy"]
    """
    args = arguments_of_call(RewardModelArguments, args, options)
    args = resume_settings(args, "reward-model")
    choices = fill_form(args, args.model if args.policy is None else args.policy)
    with Session("reward-model", choices) as session, ExitStack() as stack:
        sources = [name for name in (choices.data, choices.task) if isinstance(name, str)]
        first = {"seed": choices.seed, "run": session.directory}
        source = ", ".join(sources) or "data in memory"
        session.console.start(f"tokenrl reward-model: {source}", first, note=LOSS_NOTE)
        session.console.note("loading the preferences and the model ...")
        data = load_reward_data(choices, session.console.note)
        reward_model = make_backbone(choices, data.task, session.console.note)
        reward_model.ask(choices.form)
        threads, reason = choose_threads(reward_model.model.num_parameters(), choices.threads)
        stack.enter_context(using_threads(threads))
        time = reward_model.form.chat_time
        decided = {"threads": threads, "output_dir": session.directory, "chat_time": time}
        passes, computing = choose_passes(choices, reward_model.model)
        args = fill_defaults(choices, data, decided | computing)
        training = PreferenceTraining(reward_model, data.train, args, passes)
        held_out = encode_pairs(reward_model, data.held_out)
        rows = {"train": data.train, "held_out": data.held_out}
        parts = {name: Rows.of(map(asdict, pairs)) for name, pairs in rows.items()}
        size = None if args.eval_size == RewardModelArguments.eval_size else args.eval_size
        models = {f"the model {reward_model.__name__}": reward_model}
        pairs = PromptTask(data.name, parts["train"], parts["held_out"], divided=data.divided)
        line, warnings = division_of(pairs, size, models, "pairs")
        title = f"Reward model, {data.name}, seed {args.seed}"
        names = {"data": data.name, "model": reward_model.__name__, "policy": "in memory"}
        header = _header(args, line, reward_model)
        header |= {"threads": f"{threads} ({reason})", "computing": passes.words}
        session.open(
            args,
            SavedModel(reward_model, "reward model"),
            provenance_of(reward_model, parts),
            {"training": training},
            header,
            names=names | {"task": data.task and data.task.name},
            title=title,
            pairs={"train": len(data.train), "held_out": len(data.held_out)},
            **(recorded(data.task) if data.task else {}),
        )
        for warning in warnings:
            session.console.warn(warning)

        def evaluate() -> dict[str, float]:
            return preference_metrics(score_pairs(reward_model, held_out), data.held_out)

        if args.check:
            session.evaluated(evaluate())
            check_pairs(session, data.train, data.held_out)
            return RewardModelResult(**session.outcome(), reward_model=reward_model)
        run_updates(session, training, evaluate)
        ended = RewardModelResult(**session.outcome(), reward_model=reward_model)
        _finish(session, data, ended, title, score_pairs(reward_model, held_out))
        return ended


def fill_defaults(
    choices: RewardModelArguments, data: RewardData, decided: dict[str, Any]
) -> RewardModelArguments:
    """Lay the settings of a call over the defaults that follow from the data.

    Args:
        choices: the settings of the call, of which some are open.
        data: the pairs.
        decided: settings that the run has decided.

    Raises:
        Refused: the margin is given twice.
    """
    if choices.margin and any(pair.margin is not None for pair in data.train):
        raise Refused(
            f"margin={choices.margin} and a column 'margin' were both given: give one of the two."
        )
    batch_size = min(choices.batch_size, len(data.train))
    usual = {
        "max_steps": math.ceil(len(data.train) / batch_size),
        "learning_rate": 1e-3 if choices.model is None else 1e-5,
    }
    return settled(choices, ("default", usual), **decided, batch_size=batch_size)[0]


def _header(args: RewardModelArguments, line: str, reward_model: RewardModel) -> dict[str, Any]:
    """Return the lines of the header that is printed when the run starts."""
    model = reward_model.model
    size = model.num_parameters(only_trainable=True)
    return {
        "model": f"{reward_model.__name__} ({size:,} trainable parameters, {model.device})",
        "data": line,
        "loss": f"Bradley-Terry, margin {args.margin:g}",
        "step": f"{args.max_steps} of {args.batch_size} pairs, learning rate {args.learning_rate:g}",
        **form_line(reward_model.form, args.model if args.policy is None else args.policy),
    }


def _finish(
    session: Session, data: RewardData, ended: RewardModelResult, title: str, rewards: Any
) -> None:
    """Save the model and the pairs, write summary and report, and show how the run ended.

    Args:
        session: the session of the run.
        data: the pairs.
        ended: the result.
        title: the title of the run.
        rewards: rewards of the chosen and rejected completions of the held-out pairs [N, 2].
    """
    directory = session.output_dir
    ended.reward_model.trained_prompts = session.provenance.trained_prompts
    for name, preferences in data.rows.items():
        write_preferences(directory / name, preferences)
    rows = []
    for pair, (chosen, rejected) in zip(data.held_out, rewards.tolist(), strict=True):
        texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        rows.append(texts | {"reward_chosen": chosen, "reward_rejected": rejected})
    # the worst mistakes first
    rows.sort(key=lambda row: row["reward_chosen"] - row["reward_rejected"])
    for earlier in tables(directory / "completions"):  # of a run that this one continues
        earlier.unlink()
    write_completions(directory / "completions", ended.steps, rows)
    facts: dict[str, Any] = {f"{name} on held-out pairs": x for name, x in ended.eval_after.items()}
    facts |= {**form_line(ended.reward_model.form), "weights": ended.weights}
    words = repetition(session.command)
    card = Card(title, facts, words, session.args.model, ["reward-model"], kind="reward model")
    session.finish(ended, lambda path: save_policy(ended.reward_model, path, card=card))
