"""Minimises losses over rows of data with AdamW, some rows at a time; the loss of demonstrations is here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.core.schedules import share_of_rate
from tokenrl.errors import Refused, Stopped, with_places
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.prompts import completion_text, following_ids
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.tools import joined
from tokenrl.language.rollout.allowed import check_allowed, with_allowed
from tokenrl.language.rollout.forward import Forward
from tokenrl.language.rollout.passes import Passes
from tokenrl.language.rollout.rollout import Rollout, pad_left, to_device
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import score, score_in_parts
from tokenrl.language.supervised.arguments import DescentArguments
from tokenrl.language.tasks.rows import Row, Rows
from tokenrl.language.tasks.sources import as_prompt, fault_of_prompt
from tokenrl.language.tasks.stream import RowOrder, batch_orders
from tokenrl.runs.session import Session
from tokenrl.settings import MAX_COUNT

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its completion


class Descent(ABC):
    """Minimises a loss over rows with AdamW. Rows are drawn without replacement, one epoch after the other.

    An update has as many passes as its rows need; its loss and its weights are those of the whole batch.

    Attributes:
        tokens: number of tokens learnt from so far.
    """

    tokens = 0
    subject: str
    """What is trained, in words, for errors."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        columns: Sequence[int],
        prompts: Sequence[int],
        args: DescentArguments,
        passes: Passes,
    ) -> None:
        """Start before the first update.

        Args:
            parameters: the weights to train.
            columns: of each row, the tokens of its completion or texts.
            prompts: of each row, the tokens of a prompt before them; see `Shapes`.
            args: the settings; `max_steps`, `batch_size` and `learning_rate` are not open.
            passes: how passes are computed.
        """
        self._parameters = list(parameters)
        self._columns = columns
        self._prompts = prompts
        self._args = args
        self._passes = passes
        self._batches = RowOrder(len(columns), args.seed, batch_orders)
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            fused=self._parameters[0].device.type in ("cpu", "cuda"),
        )

    @property
    def step(self) -> int:
        """The number of updates so far."""
        return self._batches.position // self._args.batch_size

    @abstractmethod
    def loss(self, rows: Sequence[int], batch: Sequence[int]) -> Tensor:
        """Return the share of the rows of a pass in the loss of the batch, by the numbers of both."""

    def update(self) -> dict[str, float]:
        """Update the weights on the next batch.

        Returns:
            `loss`, before the update, `grad_norm` before clipping, `learning_rate`, and `padding`, the share of the
            columns of completions or texts that were computed and belong to no token. And `epoch`, the passes over
            the rows so far.

        Raises:
            Stopped: the loss or the norm of its gradient is NaN or infinite; the weights are as before.
        """
        args = self._args
        passes = self._passes
        kind = args.lr_scheduler_type
        share = share_of_rate(kind, self.step, args.max_steps, args.warmup_steps)
        rate = args.learning_rate * share
        batch = self._batches.draw(args.batch_size)
        lengths = [self._columns[i] for i in batch]
        prompts = [self._prompts[i] for i in batch]
        parts = passes.divide((lengths, prompts, range(len(batch))), args.micro_batch_size)
        self._optimizer.param_groups[0]["lr"] = rate
        passes.copy_weights()
        self._optimizer.zero_grad()
        losses = []
        for part in parts:
            loss = self.loss([batch[i] for i in part], batch)
            loss.backward()
            passes.accumulate_gradients()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self._parameters, args.max_grad_norm or math.inf)
        loss_before = torch.stack(losses).sum().item()
        for name, value in {"loss": loss_before, "norm of the gradient": float(norm)}.items():
            if not math.isfinite(value):  # clipped, it would be NaN in every weight
                self._optimizer.zero_grad()
                wrong = f"The {name} of {self.subject} is {value} at step {self.step}, which changes no weight"
                raise Stopped(
                    f"{wrong}: lower the learning rate; in low precision try float32. On a GPU a kernel may be "
                    "at fault, as that of attention."
                )
        self._optimizer.step()
        columns = sum(len(part) * max(lengths[i] for i in part) for part in parts)
        return {
            "loss": loss_before,
            "grad_norm": float(norm),
            "learning_rate": rate,
            "padding": 1 - sum(lengths) / columns,
            "epoch": self._batches.position / len(self._columns),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation needs besides the weights; tensors are references, not copies."""
        return {
            "tokens": self.tokens,
            "batches": self._batches.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the weights are loaded apart from this.

        Raises:
            Refused: the number of rows, the seed or the shapes of the weights differ from what was saved.
        """
        self.tokens = state["tokens"]
        self._batches.load_state_dict(state["batches"])
        self._optimizer.load_state_dict(state["optimizer"])


def run_updates(
    session: Session, training: Descent, evaluate: Callable[[], dict[str, float]]
) -> None:
    """Evaluate a new run before training, and make the updates that are left, with evaluations.

    Args:
        session: the run, after `open`.
        training: makes the updates.
        evaluate: returns the metrics of the model as it is now.

    Raises:
        Stopped: the loss or its gradient became NaN or infinite.
    """
    if not session.continues:
        session.evaluated(evaluate())
    for _ in session.steps():
        with session.update():
            metrics = training.update()
        if session.due(session.args.eval_every):
            metrics |= session.evaluated(evaluate())
        session.record(metrics, {"tokens_per_second": session.rate(training.tokens)})
    if session.owes_evaluation:
        session.evaluated(evaluate())


def encode_demonstrations(
    policy: Policy,
    rows: Sequence[Row],
    environments: Environments | None = None,
    allowed: Any = "",
) -> list[Pair]:
    """Tokenise demonstrations; each completion ends with the tokenizer's EOS, if it has one.

    Args:
        policy: the policy.
        rows: rows of `prompt` and `completion`. Of a completion of messages each turn of the assistant is learnt,
            behind all that stands before it, with its calls of tools as the chat template writes them.
        environments: where the rows come from. Prompts describe their tools, as those of episodes do, or else
            those of the row.
        allowed: the rule that each turn has to fulfil, see `Distribution`; empty for none.

    Returns:
        A pair for each turn of the assistant.

    Raises:
        Refused: there are none, or one is longer than the context, has no completion or is not allowed.
    """
    sampling = with_allowed(policy, rows, Sampling(MAX_COUNT, allowed=allowed))
    if not rows:
        raise Refused(
            "There are no demonstrations to learn from. Give rows of prompt and completion."
        )
    pairs = []
    for location, row in with_places(rows):
        tools = (environments and environments.tools(row)) or row.get("tools")
        try:
            turns = _turns(row)
            for number, message in enumerate(turns):
                if message["role"] == "assistant":
                    before = as_prompt(row["prompt"])
                    prompt = [*before, *turns[:number]] if number else before
                    pairs.append(_pair(policy, prompt, message, tools))
                    if allowed:
                        check_allowed(policy, sampling, row, pairs[-1][1])
        except Refused as error:
            raise Refused(f"The demonstration of {location}: {error}") from error
    return pairs


def as_in_episodes(
    rows: Iterable[Any], environments: Environments | None, warn: Callable[[str], None]
) -> Rows:
    """Return demonstrations with the prompts that episodes of their rows begin with, with the text of `reset`.

    A prompt that ends with this text, or a chat whose last message of the user does, stays as it is. So does
    the prompt of a row whose columns `reset` cannot take, and all of them if `reset` returns another text with
    another seed.

    Args:
        rows: demonstrations with a `prompt`, and the columns that `reset` takes.
        environments: where the rows come from; None for completions of one turn, which stay as they are.
        warn: prints that the text depends on the seed.
    """
    rows = Rows.of(rows)
    if environments is None:
        return rows
    prompts = [*rows.column("prompt")]
    for number, row in enumerate(rows):
        with suppress(Refused):
            episodes = environments.reset([row, row], [0, 1])
            environments.release(episodes)
            text, other = (episode.observation for episode in episodes)
            if text != other:
                warn(
                    f"{episodes[0].name_of('reset')} draws its text at random, so it is not added to "
                    "demonstrations: their prompts must hold what the policy reads first."
                )
                return rows
            if not _is_opened(row["prompt"], text):
                prompts[number] = episodes[0].opening
    return replace(rows, columns={**rows.columns, "prompt": prompts})


def _is_opened(prompt: Any, text: str) -> bool:
    """Return whether a prompt ends with the text of `reset`, as an episode joins the two."""
    words = [prompt]
    if not isinstance(prompt, str):
        words = [message["content"] for message in prompt if message["role"] == "user"]
    return any(word == joined(word.removesuffix(text), text) for word in words[-1:])


def _turns(row: Row) -> list[Any]:
    """Return the completion of a demonstration as messages."""
    turns = as_prompt(row.get("completion"))
    fault = fault_of_prompt(turns, "completion")
    if isinstance(turns, str):
        turns = [{"role": "assistant", "content": turns}]
    if not fault:
        roles = " ".join(turn["role"] for turn in turns)
        is_divided = isinstance(row.get("prompt"), str) and len(turns) > 1
        if is_divided or not roles.endswith("assistant") or "assistant assistant" in roles:
            fault = f"its completion has messages of {roles}"
    if fault or "prompt" not in row:
        raise Refused(
            f"{fault or 'it has no prompt'}. It needs a prompt and a completion, which is text, or a list of "
            "messages that ends with the assistant's; several messages follow a prompt of chat messages only, no "
            "two of the assistant each other. Write any other value as text, such as its JSON."
        )
    return list(turns)


def _pair(policy: Policy, prompt: Any, message: Row, tools: Any) -> Pair:
    space, text = completion_text(policy, prompt, message, tools)
    before = policy.encode(prompt, tools=tools)
    ids = following_ids(policy, before, text, space)
    if ids is None:
        raise Refused(
            f"behind its prompt the tokenizer cannot write {text!r:.60} so that both read as written. Give the "
            "prompt an end behind which it can."
        )
    eos = policy.tokenizer.eos_token_id
    if eos is not None and (not ids or ids[-1] not in policy.eos_ids):
        ids.append(eos)
    if not ids:
        raise Refused("it has no token, nor an EOS: leave it out.")
    length = len(before) + len(ids)
    if policy.context is not None and length > policy.context:
        raise Refused(
            f"it has {length} tokens, more than the model's context of {policy.context}: leave it out, or take a "
            "model with a longer context."
        )
    return before, ids


def demonstration_batch(policy: Policy, pairs: Sequence[Pair]) -> Rollout:
    """Put tokenised demonstrations into a rollout, one row for each, so that `score` can score them."""
    prompts, completions = zip(*pairs, strict=True)
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id)
    backwards, mask = pad_left([c[::-1] for c in completions], policy.pad_id)
    ids = backwards.flip(1)
    mask = mask.flip(1)
    zeros = torch.zeros(mask.shape)
    index = torch.arange(len(pairs))
    return Rollout(prompt_ids, prompt_mask, index, ids, mask, zeros, zeros[:, 0].bool())


class SupervisedTraining(Descent):
    """Supervised training: minimises the mean negative log-likelihood of the completions' tokens.

    The policy is changed in place. Losses are in nats per token.
    """

    subject = "the supervised stage"

    def __init__(
        self, policy: Policy, pairs: Sequence[Pair], args: DescentArguments, forward: Forward
    ) -> None:
        """Start before the first update.

        Args:
            policy: the policy to train.
            pairs: the demonstrations, as `encode_demonstrations` returns them.
            args: the settings, as in `Descent`.
            forward: how the policy is computed.
        """
        prompts, completions = ([*map(len, texts)] for texts in zip(*pairs, strict=True))
        super().__init__(policy.trainable_parameters(), completions, prompts, args, forward)
        self._pairs = pairs
        self._forward = forward

    def loss(self, rows: Sequence[int], batch: Sequence[int]) -> Tensor:
        """Return the negative log-likelihood of the rows' completions over the number of the batch's tokens."""
        part = demonstration_batch(self._forward.policy, [self._pairs[i] for i in rows])
        logprobs = score(self._forward.model, part, self._forward.regime).logprobs
        mask = to_device(part.mask, logprobs.device)
        self.tokens += int(part.mask.sum())
        tokens = sum(self._columns[i] for i in batch)
        return -torch.where(mask, logprobs, 0).sum() / tokens

    def held_out_loss(self, pairs: Sequence[Pair]) -> float:
        """Return the mean negative log-likelihood of other completions' tokens, in nats per token."""
        size = self._args.batch_size
        total = 0.0
        for first in range(0, len(pairs), size):
            part = demonstration_batch(self._forward.policy, pairs[first : first + size])
            logprobs = score_in_parts(self._forward.model, part, self._forward.regime).logprobs
            total -= logprobs[part.mask].double().sum().item()
        return total / sum(len(completion) for _, completion in pairs)


def fit(
    policy: Policy,
    demonstrations: Sequence[Row],
    *,
    environments: Environments | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> list[float]:
    """Fine-tune a policy on demonstrations.

    Args:
        policy: the policy to train, in place.
        demonstrations: rows of `prompt` and `completion`.
        environments: where the demonstrations come from, as in `encode_demonstrations`.
        forward: how the policy is computed; None for its own model in the precision of its weights, a batch in
            one pass.
        **options: `max_steps`, `batch_size` and `learning_rate`, and further settings of `tokenrl sft` about
            the optimiser, such as `seed`.

    Returns:
        The loss of each update in nats per token.

    Raises:
        Refused: there are no demonstrations, or one cannot be used.
        Stopped: the loss or its gradient became NaN or infinite.
    """
    args = DescentArguments(**options)
    usual = Forward(policy=policy, model=policy.model, tokens_per_pass=MAX_COUNT)
    pairs = encode_demonstrations(policy, demonstrations, environments)
    training = SupervisedTraining(policy, pairs, args, forward or usual)
    return [training.update()["loss"] for _ in range(args.max_steps)]
