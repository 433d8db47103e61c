"""Trains a policy on demonstrations (supervised fine-tuning), and makes warm-started bases for toy tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy, load_policy, wrap
from tokenrl.language.policy.saving import save_policy
from tokenrl.language.rollout.rollout import Rollout, pad_left
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training.cache import cache_entry, say_damaged
from tokenrl.language.training.descent import Descent
from tokenrl.runs.checkpoint import replace_directory
from tokenrl.runs.threads import using_threads
from tokenrl.settings import check_seed

MADE_BY = 2  # raise it when a change of the code changes the weights that a warm start gives
Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its completion


def check_trainable(policy: Policy) -> None:
    """Check that there are weights to train, and that their precision allows it.

    Raises:
        Refused: no parameter requires a gradient, or one that does is float16.
    """
    if any(p.dtype == torch.float16 for p in policy.trainable_parameters()):
        raise Refused(
            f"The weights of {policy.source!r} are float16, which cannot be trained: gradients underflow. "
            "Use bfloat16 or float32."
        )
    if not policy.trainable_parameters():
        raise Refused(
            f"The model {policy.source!r} has no trainable parameter: set requires_grad on some, or use LoRA."
        )


def encode_demonstrations(policy: Policy, rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """Tokenise demonstrations; each completion ends with the tokenizer's EOS, if it has one.

    Raises:
        Refused: a demonstration is longer than the context, or has no completion.
    """
    pairs: list[Pair] = []
    eos = policy.tokenizer.eos_token_id
    for number, row in enumerate(rows):
        text = row.get("completion")
        if isinstance(text, list) and text and isinstance(text[-1], dict):
            text = text[-1].get("content")
        if not isinstance(text, str) or "prompt" not in row:
            raise Refused(
                f"Row {number} of the demonstrations has the columns {', '.join(row)}. It needs prompt and "
                "completion; a completion is text, or a list that ends with the assistant's message."
            )
        ids = list(policy.tokenizer(text, add_special_tokens=False).input_ids)
        if eos is not None and (not ids or ids[-1] not in policy.eos_ids):
            ids.append(eos)
        if not ids:
            raise Refused(
                f"The completion of row {number} of the demonstrations has no token, and the tokenizer has "
                "no EOS to end an empty answer with. Leave such rows out, or set tokenizer.eos_token."
            )
        prompt = policy.encode_all([row["prompt"]], max_completion_length=len(ids), first_row=number)[0]
        pairs.append((prompt, ids))
    return pairs


def demonstration_batch(policy: Policy, pairs: Sequence[Pair]) -> Rollout:
    """Put tokenised demonstrations into a rollout, one row for each, so that `score` can score them."""
    prompts, completions = zip(*pairs, strict=True)
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id, policy.device)
    width = max(map(len, completions))
    ids_ = torch.tensor([c + [policy.pad_id] * (width - len(c)) for c in completions], device=policy.device)
    lengths = torch.tensor([len(c) for c in completions], device=policy.device)
    mask = torch.arange(width, device=policy.device) < lengths[:, None]
    zeros = torch.zeros(mask.shape, device=policy.device)
    index = torch.arange(len(pairs), device=policy.device)
    return Rollout(prompt_ids, prompt_mask, index, ids_, mask, zeros, torch.zeros_like(lengths).bool())


class SupervisedTraining:
    """Supervised training: minimises the mean negative log-likelihood of the completions' tokens with AdamW.

    The policy is changed in place. The learning rate falls linearly to 0. Rows are drawn without replacement,
    one epoch after the other.

    Attributes:
        pairs: token ids of the prompt and of the completion of each demonstration.
        descent: the optimiser, with the losses in nats per token.
        tokens: number of the completions' tokens so far.
    """

    def __init__(
        self,
        policy: Policy,
        demonstrations: Sequence[dict[str, Any]],
        *,
        max_steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int = 0,
        max_grad_norm: float = 1.0,
    ) -> None:
        """Tokenise all rows, so that an unusable one is refused before the first update.

        Args:
            policy: the policy to train.
            demonstrations: rows of `prompt` and `completion`.
            max_steps: number of updates over which the learning rate falls to 0.
            batch_size: demonstrations per update.
            learning_rate: peak learning rate.
            seed: seed of the order of the rows.
            max_grad_norm: gradients are clipped to this norm.

        Raises:
            Refused: there are no demonstrations, or one cannot be used.
        """
        if not demonstrations:
            raise Refused("There are no demonstrations to learn from. Give rows of prompt and completion.")
        self._policy, self.tokens = policy, 0
        self.pairs = encode_demonstrations(policy, demonstrations)
        self.descent = Descent(
            policy.trainable_parameters(),
            len(self.pairs),
            of="the supervised stage",
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            max_grad_norm=max_grad_norm,
        )

    def update(self) -> dict[str, float]:
        """Update the policy on the next batch.

        Returns:
            `loss`, before the update, in nats per token, and `grad_norm` before clipping.

        Raises:
            Stopped: the loss or its gradient became NaN or infinite.
        """
        policy = self._policy
        batch = demonstration_batch(policy, [self.pairs[i] for i in self.descent.batch()])
        logprobs = score(policy.model, batch, **policy.ways).logprobs
        self.tokens += int(batch.mask.sum())
        loss = -torch.where(batch.mask, logprobs, 0).sum() / batch.mask.sum()
        norm = self.descent.update(loss)
        return {"loss": loss.item(), "grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation needs besides the weights; tensors are references, not copies."""
        return {"tokens": self.tokens, "descent": self.descent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the weights of the policy are loaded apart from this.

        Raises:
            Refused: the demonstrations, the seed or the trained weights are not those of the saved run.
        """
        self.tokens = int(state["tokens"])
        self.descent.load_state_dict(state["descent"])


def fit(
    policy: Policy, demonstrations: Sequence[dict[str, Any]], *, max_steps: int, **how: Any
) -> list[float]:
    """Fine-tune a policy on demonstrations for `max_steps` updates.

    Args:
        policy: the policy to train, in place.
        demonstrations: rows of `prompt` and `completion`.
        max_steps: number of updates.
        **how: further arguments of `SupervisedTraining`.

    Returns:
        The loss of each update in nats per token.

    Raises:
        Refused: there are no demonstrations, or one cannot be used.
        Stopped: the loss or its gradient became NaN or infinite.
    """
    training = SupervisedTraining(policy, demonstrations, max_steps=max_steps, **how)
    return [training.update()["loss"] for _ in range(max_steps)]


def _loads(directory: Path, announce: Callable[[str], None]) -> bool:
    try:
        load_policy(directory, dtype="auto")
    except (OSError, ValueError, Refused) as error:
        say_damaged(directory, error, announce)
        return False
    return True


def warm_started_base(
    task: Any, *, seed: int = 0, announce: Callable[[str], None] = lambda text: None
) -> Path:
    """Make the tiny model of a toy task, warm-started on its demonstrations, or take it from the cache.

    Args:
        task: a task with `build(seed)`, `demonstrations`, `warm_start` and `fingerprint`.
        seed: seed of the initial weights and of the order of demonstrations.
        announce: prints a line for people, since making the model takes some seconds.

    Returns:
        The directory of model and tokenizer.

    Raises:
        Refused: the task has no model of its own, or the seed has more than 32 bits.
    """
    build = getattr(task, "build", None)
    if build is None:
        lacks = f"The task {task.name!r} has no model of its own."
        raise Refused(f"{lacks} Name the one to train: --model DIRECTORY_OR_HUB_NAME.")
    check_seed(seed)
    recipe = f"{task.fingerprint} {seed} {torch.__version__.split('+')[0]} {MADE_BY}"
    name = f"{task.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with cache_entry(name) as directory, using_threads(1):  # the same weights for everyone
        if directory.exists() and _loads(directory, announce):
            return directory
        policy = wrap(*build(seed), source=f"{task.name} base")
        warm = task.warm_start
        if warm is not None:
            announce(
                f"Warm-starting a tiny model on {len(task.demonstrations)} demonstrations ({warm.steps} "
                "steps; cached for next time)."
            )
            fit(
                policy,
                task.demonstrations,
                max_steps=warm.steps,
                batch_size=warm.batch_size,
                learning_rate=warm.learning_rate,
                seed=seed,
            )
        replace_directory(directory, lambda path: save_policy(policy, path), sealed=True)
    return directory
