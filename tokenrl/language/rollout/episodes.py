"""Plays episodes of several turns: the policy writes, an environment answers, and the policy writes on.

A turn is one call of a generator, whose prompts are the tokens that the rows have so far. What was sampled is
never tokenised again: the tokens of an answer are appended to those of the row. Rows whose episode is over
drop out. The random numbers of a row are those of its completion, counted in the tokens that the policy has
chosen, so an episode depends neither on the other rows of its batch nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.language.rewards.environments import Answer, Environments, Episode
from tokenrl.language.rewards.tools import assistant_message
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.rollout import Rollout, pad_left
from tokenrl.language.rollout.sampling import Sampling, key_of, uniforms

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy

CUT = ("max_tokens", "context_overflow")
"""The endings of episodes that were cut off by length."""
CHARACTERS = 32
"""Characters that a token has at most, in text that a model can make sense of."""
SAMPLED = (
    "sampling_logprobs",
    "logprobs",
    "entropy",
    "score_norms",
    "hidden",
    "sampling_distribution",
)
"""Columns of tokens that a generator may fill."""


def play(
    policy: Policy,
    generator: Generator,
    environments: Environments,
    prompts: Sequence[tuple[int, Mapping[str, Any]]],
    sampling: Sampling,
    stream: str,
) -> Rollout:
    """Play `sampling.group_size` episodes of each prompt.

    Args:
        policy: encodes prompts and answers, and decodes turns.
        generator: samples each turn, with the weights of the policy.
        environments: the environments of the rows.
        prompts: number and row of the data of each of B prompts; the number decides the random numbers.
        sampling: how tokens are sampled. `max_completion_length` bounds the tokens that the policy chooses in
            all turns of a row; those of the environment do not count.
        stream: the stream of random numbers, a name in `STREAMS`.

    Returns:
        A `Rollout` of N = B * G rows with the columns of turns. The mask has gaps where the environment
        wrote. `turn_rewards` are the environment's own.
    """
    draws = uniforms(stream, sampling, [number for number, _ in prompts])
    data = [row for _, row in prompts for _ in range(sampling.group_size)]
    episodes = environments.reset(data, _seeds(environments, prompts, sampling, stream))
    rows = [_Row.begun(policy, episode, sampling.max_completion_length) for episode in episodes]
    parts, once = list[_Part](), replace(sampling, num_generations=min(1, sampling.num_generations))
    for turn in range(environments.max_turns):
        if not (active := [i for i, row in enumerate(rows) if not row.ending]):
            break
        for index, length in _calls(policy, rows, active):
            of_turn = replace(once, max_completion_length=length)
            parts.append(_sampled(policy, generator, rows, index, draws, of_turn, turn))
        waiting = [rows[i] for i in active if not rows[i].ending]
        answers = environments.step(
            [row.episode for row in waiting], [row.messages[-1] for row in waiting]
        )
        for row, answer in zip(waiting, answers, strict=True):
            row.take(answer)
            if not row.ending:
                row.ending = (
                    "max_turns" if turn + 1 == environments.max_turns else row.read(policy, answer)
                )
    ended = [row for row in rows if not row.episode.failure]
    for row, answer in zip(ended, environments.finish([row.episode for row in ended]), strict=True):
        row.take(answer)
    return _rollout(policy, rows, parts, sampling.group_size).of(prompts)


@dataclass
class _Row:
    """A row whose episode is played.

    Attributes:
        episode: the episode.
        prompt: token ids of the prompt with the first observation.
        chat: whether the policy reads chat messages.
        left: number of tokens that the policy may still choose.
        tokens: token ids after the prompt, those of the policy and those of the environment.
        rewards: position and value of each reward.
        messages: what the policy and the environment wrote, after the prompt.
        ending: how the episode ended; empty while it goes on.
        failure: what failed, in words.
    """

    episode: Episode
    prompt: list[int]
    chat: bool
    left: int
    ending: str
    failure: str
    tokens: list[int] = field(default_factory=list)
    rewards: list[tuple[int, float]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begun(cls, policy: Policy, episode: Episode, limit: int) -> _Row:
        """Return the row of an episode that was reset, and that may have failed in that."""
        opening, ending, failure = episode.opening, episode.ending, episode.failure
        encoded = partial(policy.encode, tools=episode.tools)
        ids = [policy.pad_id] if ending else _encoded(policy, encoded, opening)
        if policy.context is not None and len(ids) >= policy.context:
            more = " or more" if len(ids) > 2 * policy.context else ""
            size = f"has {len(ids)} tokens{more}, and the model's context {policy.context}"
            ids, ending = [policy.pad_id], "context_overflow"
            failure = f"The prompt with its first observation {size}."
        chat = bool(policy.form.chat) or not isinstance(opening, str)
        return cls(episode, ids, chat, limit, ending, failure)

    def room(self, policy: Policy, limit: int) -> int:
        """Return how many of `limit` further tokens fit into the model's context."""
        if policy.context is None:
            return limit
        return min(limit, policy.context - len(self.prompt) - len(self.tokens))

    def write(self, message: dict[str, Any], ids: list[int]) -> None:
        """Add a turn of the policy."""
        self.messages.append(message)
        self.tokens += ids
        self.left -= len(ids)

    def take(self, answer: Answer) -> None:
        """Add what the environment answers to the last turn: messages, reward and ending."""
        self.messages += answer.messages
        self.rewards.append((len(self.tokens) - 1, answer.reward))
        self.ending, self.failure = answer.ending or self.ending, answer.failure or self.failure

    def read(self, policy: Policy, answer: Answer) -> str:
        """Append the tokens of an answer, if the policy can write on after them; else return the ending."""
        if not self.left:
            return "max_tokens"
        ended = self.tokens[-1] in policy.eos_ids
        before = self.prompt + self.tokens
        tools = self.episode.tools
        encoded = partial(policy.reply_ids, ended=ended, chat=self.chat, tools=tools, before=before)
        ids = _encoded(policy, encoded, answer.messages)
        if self.room(policy, len(ids) + 1) <= len(ids):
            return "context_overflow"
        self.tokens += ids
        return ""


def _encoded(policy: Policy, encode: Callable[[Any], list[int]], observation: Any) -> list[int]:
    """Return the tokens of what an environment says, a text or messages.

    Of what is far longer than the context only the beginning is read, if that alone is too long.
    """
    if policy.context is not None:
        most = CHARACTERS * policy.context
        is_text = isinstance(observation, str)
        short = observation[:most] if is_text else [_shortened(turn, most) for turn in observation]
        if short != observation and len(ids := encode(short)) > 2 * policy.context:
            return ids
    return encode(observation)


def _shortened(message: dict[str, Any], most: int) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": content[:most]} if isinstance(content, str) else message


class _Part(NamedTuple):
    """What one call of a generator sampled for n rows.

    Attributes:
        rollout: what the generator returned.
        kept: True on the tokens that became part of the rows [n, t].
        rows: number of each row [n].
        starts: position of the first of these tokens in each row [n].
        turn: number of the turn, from 0.
    """

    rollout: Rollout
    kept: Tensor
    rows: Tensor
    starts: Tensor
    turn: int

    @property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Row and position of each token that was kept, in the table of all rows."""
        positions = self.starts[:, None] + torch.arange(self.kept.shape[1])
        return self.rows[:, None].expand_as(self.kept)[self.kept], positions[self.kept]


def _seeds(
    environments: Environments, prompts: Sequence[tuple[int, Any]], sampling: Sampling, stream: str
) -> list[int]:
    """Return the seed of each episode; those of one prompt share it unless each is to have its own."""
    key = key_of(stream, sampling).tolist()
    own = [0 if environments.share_seed else g + 1 for g in range(sampling.group_size)]
    sequences = [np.random.SeedSequence([*key, number, g]) for number, _ in prompts for g in own]
    return [int(sequence.generate_state(1)[0]) >> 1 for sequence in sequences]


def _calls(
    policy: Policy, rows: Sequence[_Row], active: Sequence[int]
) -> Iterator[tuple[list[int], int]]:
    """Yield the rows that one call can sample, and its length.

    A row that may choose fewer tokens is cut afterwards; but no row is sampled beyond the model's context.
    """
    most = max((rows[i].left for i in active), default=0)
    room = {i: rows[i].room(policy, most) for i in active}
    for length in sorted(set(room.values())):
        yield [i for i in active if room[i] == length], length


def _sampled(
    policy: Policy,
    generator: Generator,
    rows: Sequence[_Row],
    index: Sequence[int],
    draws: Tensor | None,
    sampling: Sampling,
    turn: int,
) -> _Part:
    """Sample a turn of the rows `index` and add it to them; a turn that reaches a limit ends its episode."""
    length = sampling.max_completion_length
    if draws is not None:
        later = pad(draws, (0, length))  # beyond a row's own limit, where tokens are cut off
        chosen = [draws.shape[1] - rows[i].left for i in index]
        draws = torch.stack([later[i, n : n + length] for i, n in zip(index, chosen, strict=True)])
    histories = [rows[i].prompt + rows[i].tokens for i in index]
    rollout = generator.generate(histories, sampling, draws).on_host()
    room = torch.tensor([rows[i].room(policy, rows[i].left) for i in index])
    kept = rollout.mask & (torch.arange(rollout.mask.shape[1]) < room[:, None])
    cut = rollout.truncated | (rollout.mask.sum(dim=1) > room)
    starts = torch.tensor([len(rows[i].tokens) for i in index])
    texts = policy.decode(rollout.completion_ids, kept)
    for j, i in enumerate(index):
        row, ids = rows[i], rollout.completion_ids[j][kept[j]].tolist()
        tools = () if cut[j] else row.episode.tools  # an unfinished turn is never acted on
        before = row.prompt + row.tokens  # the engine may have changed the list that it was given
        row.write(assistant_message(policy.tokenizer, ids, before, texts[j], tools), ids)
        if cut[j]:
            row.ending = "context_overflow" if row.left else "max_tokens"
    return _Part(rollout, kept, torch.tensor(index), starts, turn)


def _rollout(policy: Policy, rows: Sequence[_Row], parts: Sequence[_Part], size: int) -> Rollout:
    """Put the rows into a table."""
    shape = len(rows), max(1, *(len(row.tokens) for row in rows))
    prompt_ids, prompt_mask = pad_left([row.prompt for row in rows], policy.pad_id)
    whole = [row.tokens + [policy.pad_id] * (shape[1] - len(row.tokens)) for row in rows]
    columns: dict[str, Any] = {
        name: torch.zeros(*shape, *x.shape[2:], dtype=x.dtype, device=x.device)
        for name in SAMPLED
        if (x := getattr(parts[0].rollout, name) if parts else None) is not None
    }
    mask = torch.zeros(shape, dtype=torch.bool)
    turns = torch.zeros(shape, dtype=torch.int64)
    for part in parts:
        cells = part.cells
        mask[cells], turns[cells] = True, part.turn
        inside = part.kept.nonzero(as_tuple=True)  # the same tokens in the table of the part
        for name, column in columns.items():
            of_part = getattr(part.rollout, name)
            target = tuple(index.to(column.device) for index in cells)
            source = tuple(index.to(column.device) for index in inside)
            column[target] = of_part[source]
    turn_rewards = torch.zeros(shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        for position, value in row.rewards:
            turn_rewards[i, max(0, position)] += value
    columns.setdefault("sampling_logprobs", torch.zeros(shape))
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=torch.arange(len(rows)) // size,
        completion_ids=torch.tensor(whole),
        mask=mask,
        truncated=torch.tensor([row.ending in CUT for row in rows]),
        turns=turns,
        turn_rewards=turn_rewards,
        messages=[row.messages for row in rows],
        endings=[row.ending for row in rows],
        failures=[row.failure for row in rows],
        environments=[row.episode.environment for row in rows],
        **columns,
    )
