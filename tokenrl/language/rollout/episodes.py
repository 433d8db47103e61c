"""Plays episodes of several turns: the policy writes, an environment answers, and the policy writes on.

A turn is one call of a generator, whose prompts are the tokens that the rows have so far; the default generator
does not read them again. What was sampled is never tokenised again: the tokens of an answer are appended to
those of the row. Rows whose episode is over drop out. The random numbers of a row are those of its completion,
counted in the tokens that the policy has chosen, so an episode depends neither on the other rows of its batch
nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.errors import Refused
from tokenrl.language.rewards.tools import assistant_message, response_template
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.rollout import Rollout, pad_left
from tokenrl.language.rollout.sampling import Sampling, key_of, uniforms

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.rewards.environments import Answer, Environments, Episode

ENDINGS = [
    "completed",
    "max_turns",
    "max_tokens",
    "context_overflow",
    "parse_error",
    "error",
    "timeout",
]
"""Why an episode ended. `completed`: the environment ended it, or the policy called no tool."""
CUT = ("max_tokens", "context_overflow")
"""The endings of episodes that were cut off by length."""


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
    generator = generator.over_turns()
    draws = uniforms(stream, sampling, [number for number, _ in prompts])
    data = [row for _, row in prompts for _ in range(sampling.group_size)]
    episodes = environments.reset(data, _seeds(environments, prompts, sampling, stream))
    rows = [
        _Row.begin(policy, episode, sampling.max_completion_length, row.get("tools"))
        for episode, row in zip(episodes, data, strict=True)
    ]
    parts = list[_Part]()
    one_each = replace(sampling, num_generations=min(1, sampling.num_generations))
    rules: Any = sampling.allowed
    needed = rules.needed[rules.states_of(data)].tolist() if rules else [1] * len(rows)
    for turn in range(environments.max_turns):
        active = [i for i, row in enumerate(rows) if row.goes_on(policy, needed[i])]
        if not active:
            break
        for length, index in _calls(policy, rows, active, exactly=bool(rules)).items():
            of_turn = replace(one_each, max_completion_length=length)
            of_turn = of_turn.beginning([data[i] for i in index])
            parts.append(_sampled(policy, generator, rows, index, draws, of_turn, turn))
        waiting = [rows[i] for i in active if not rows[i].ending]
        messages = [row.messages[-1] for row in waiting]
        answers = environments.step([row.episode for row in waiting], messages)
        for row, answer in zip(waiting, answers, strict=True):
            row.take(answer)
            if not row.ending:
                is_last = turn + 1 == environments.max_turns
                row.ending = "max_turns" if is_last else row.read(policy, answer)
    over = [row for row in rows if not row.episode.failure]
    answers = environments.finish([row.episode for row in over])
    for row, answer in zip(over, answers, strict=True):
        row.take(answer)
    return _rollout(policy, rows, parts, sampling.group_size)


@dataclass
class _Row:
    """A row whose episode is played.

    Attributes:
        episode: the episode.
        prompt: token ids of the prompt with the first observation.
        chat: whether the policy reads chat messages.
        tools: what the chat template describes: the tools of the environment, which alone can be called, or
            else those of the row of the data.
        budget: number of tokens that the policy may still choose.
        tokens: token ids after the prompt, those of the policy and those of the environment.
        rewards: position and value of each reward.
        messages: what the policy and the environment wrote, after the prompt.
        ending: how the episode ended; empty while it goes on.
        failure: what failed, in words.
    """

    episode: Episode
    prompt: list[int]
    chat: bool
    tools: Any
    budget: int
    ending: str
    failure: str
    tokens: list[int] = field(default_factory=list)
    rewards: list[tuple[int, float]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, policy: Policy, episode: Episode, budget: int, tools: Any) -> _Row:
        """Return the row of an episode after its reset, which may have failed."""
        is_text = isinstance(episode.opening, str)
        chat = bool(policy.form.chat) or not is_text
        tools = episode.tools or tools
        row = cls(episode, [policy.pad_id], chat, tools, budget, episode.ending, episode.failure)
        if row.ending:
            return row
        encode = partial(policy.encode, tools=tools)
        other = policy.tokenizer.decode([policy.pad_id])
        if not is_text:
            other = [{"role": "user", "content": other}]
        ids = row.encoded(encode, episode.opening, other)
        if episode.tools:
            response_template(policy.tokenizer, episode.tools)  # refused before a turn is sampled
        if row.ending:
            return row
        if policy.context is None or len(ids) < policy.context:
            row.prompt = ids
            return row
        size = f"{len(ids)} tokens, and the model's context {policy.context}"
        row.ending = "context_overflow"
        row.failure = f"The prompt with its first observation has {size}."
        return row

    def encoded(self, encode: Callable[[Any], list[int]], text: Any, other: Any) -> list[int]:
        """Return the ids of what the policy reads next; the episode fails if there are none for this alone.

        Args:
            encode: returns the ids of a prompt or an answer.
            text: what is read.
            other: what any policy can read in its place.

        Raises:
            Refused: nor can the other be encoded, so no episode can go on here.
        """
        try:
            return encode(text)
        except Refused as error:
            try:
                encode(other)
            except Refused:
                raise error from None
            self.ending = "error"
            self.failure = f"An observation of {type(self.episode.environment).__name__}: {error}"
            return []

    def room(self, policy: Policy, limit: int) -> int:
        """Return how many of `limit` further tokens fit into the model's context."""
        if policy.context is None:
            return limit
        return min(limit, policy.context - len(self.prompt) - len(self.tokens))

    def goes_on(self, policy: Policy, needed: int) -> bool:
        """Return whether the policy writes another turn; without `needed` tokens left for it the episode ends."""
        if not self.ending and self.room(policy, self.budget) < needed:
            self.ending = "max_tokens" if self.budget < needed else "context_overflow"
        return not self.ending

    def write(self, message: dict[str, Any], ids: list[int]) -> None:
        """Add a turn of the policy."""
        self.messages.append(message)
        self.tokens += ids
        self.budget -= len(ids)

    def take(self, answer: Answer) -> None:
        """Add what the environment answers to the last turn: messages, reward and ending."""
        self.messages += answer.messages
        self.rewards.append((len(self.tokens) - 1, answer.reward))
        self.ending = answer.ending or self.ending
        self.failure = answer.failure or self.failure

    def read(self, policy: Policy, answer: Answer) -> str:
        """Append the tokens of an answer, if the policy can write on after them; else return the ending."""
        if not self.budget:
            return "max_tokens"
        encode = partial(
            policy.reply_ids,
            ended=self.tokens[-1] in policy.ends,
            chat=self.chat,
            tools=self.tools,
            before=self.prompt + self.tokens,
        )
        ids = self.encoded(encode, answer.messages, [{**answer.messages[0], "content": "?"}])
        if self.room(policy, len(ids) + 1) <= len(ids):
            return "context_overflow"
        self.tokens += ids
        return self.ending


_Part = tuple[tuple[Tensor, Tensor], dict[str, Tensor]]
"""The tokens that one call of a generator added to some rows: the row and the position of each in the table of all
rows, and their columns."""


def _seeds(
    environments: Environments, prompts: Sequence[tuple[int, Any]], sampling: Sampling, stream: str
) -> list[int]:
    """Return the seed of each episode; the episodes of a prompt share it if `share_seed` says so."""
    key = key_of(stream, sampling).tolist()
    seeds = []
    for number, _ in prompts:
        for g in range(sampling.group_size):
            branch = 0 if environments.share_seed else g + 1
            sequence = np.random.SeedSequence([*key, number, branch])
            seeds.append(int(sequence.generate_state(1)[0]) >> 1)
    return seeds


def _calls(
    policy: Policy, rows: Sequence[_Row], active: Sequence[int], *, exactly: bool
) -> dict[int, list[int]]:
    """Return the rows that a call samples, by the length of the call.

    A row that may choose fewer tokens is cut afterwards, but not where `exactly` so many are sampled as it may
    choose; and no row is sampled beyond the model's context.
    """
    budget = max(rows[i].budget for i in active)
    calls: dict[int, list[int]] = {}
    for i in active:
        limit = rows[i].budget if exactly else budget
        calls.setdefault(rows[i].room(policy, limit), []).append(i)
    return calls


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
        chosen = [draws.shape[1] - rows[i].budget for i in index]
        draws = torch.stack([later[i, n : n + length] for i, n in zip(index, chosen, strict=True)])
    active = [rows[i] for i in index]
    histories = [row.prompt + row.tokens for row in active]
    rollout = generator.turn(index, histories, sampling, draws).on_host()
    room = torch.tensor([row.room(policy, row.budget) for row in active])
    mask = rollout.mask & (torch.arange(rollout.mask.shape[1]) < room[:, None])
    cut = rollout.truncated | (rollout.mask.sum(dim=1) > room)
    starts = torch.tensor([len(row.tokens) for row in active])
    texts = policy.decode(rollout.completion_ids, mask)
    for j, row in enumerate(active):
        ids = rollout.completion_ids[j][mask[j]].tolist()
        tools = () if cut[j] else row.episode.tools  # an unfinished turn is never acted on
        row.write(assistant_message(policy.tokenizer, ids, histories[j], texts[j], tools), ids)
        if cut[j]:
            row.ending = "context_overflow" if row.budget else "max_tokens"
    numbers, positions = mask.nonzero(as_tuple=True)
    columns = {name: x[numbers, positions] for name, x in rollout.of_tokens().items()}
    columns["turns"] = torch.full_like(numbers, turn)
    return (torch.tensor(index)[numbers], starts[numbers] + positions), columns


def _rollout(policy: Policy, rows: Sequence[_Row], parts: Sequence[_Part], size: int) -> Rollout:
    """Put the rows into a table."""
    shape = len(rows), max(1, *(len(row.tokens) for row in rows))
    prompt_ids, prompt_mask = pad_left([row.prompt for row in rows], policy.pad_id)
    ids = torch.full(shape, policy.pad_id)
    turn_rewards = torch.zeros(shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        for position, value in row.rewards:
            turn_rewards[i, max(0, position)] += value
    columns: dict[str, Any] = {
        "completion_ids": ids,
        "mask": torch.zeros(shape, dtype=torch.bool),
        "turns": torch.zeros(shape, dtype=torch.int64),
    }
    for cells, of_tokens in parts:
        for name, x in of_tokens.items():
            columns.setdefault(name, x.new_zeros(*shape, *x.shape[1:]))[cells] = x
    columns.setdefault("sampling_logprobs", torch.zeros(shape))
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=torch.arange(len(rows)) // size,
        truncated=torch.tensor([row.ending in CUT for row in rows]),
        turn_rewards=turn_rewards,
        messages=[row.messages for row in rows],
        endings=[row.ending for row in rows],
        failures=[row.failure for row in rows],
        environments=[row.episode.environment for row in rows],
        openings=[(row.episode.opening, row.tools) for row in rows],
        **columns,
    )
