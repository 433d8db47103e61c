"""Environments of each interface for tests, and a generator that keeps a record or writes a script."""

from __future__ import annotations

import random
import string
import time

import numpy as np
import torch

from tokenrl.language.policy.model import Policy, wrap
from tokenrl.language.rollout.generator import Generator, TransformersGenerator
from tokenrl.language.rollout.rollout import Rollout, pad_left


class Safe:
    """Opens with one digit; written as TRL's documentation writes environments, whose methods are tools."""

    def reset(self, secret: int = 3, answer_length: int = 1, **row) -> str:
        self.secret, self.length, self.tries, self.open = secret, answer_length, 0, False
        return " There is a safe."

    def turn(self, digit: int) -> str:
        """Turn the dial of the safe.

        Args:
            digit: The digit to turn it to.

        Returns:
            Whether the safe is open.
        """
        self.tries += 1
        self.open = self.open or digit == self.secret
        return ("open" if self.open else "shut") * self.length

    def get_reward(self) -> float:
        return 1.0 - 0.25 * self.tries if self.open else 0.0


class Guess:
    """Guess the length of a text, in GEM's interface: draws from the global streams, in each step too.

    At the limit of turns an episode is terminated and truncated together.
    """

    limit = 3

    def reset(self, seed=None):
        self.turn, self.over, self.number = 0, False, random.randint(1, 6)
        return f"{self.number}{np.random.randint(10)}", {"prefix": "the ", "suffix": " cat"}

    def step(self, text):
        assert not self.over, "a turn after the end"
        self.turn += 1
        last = self.turn == self.limit
        self.over = last or len(text) == self.number
        reward = random.random() - abs(len(text) - self.number)
        words = {"prefix": "on ", "suffix": " dog" * np.random.randint(3)}
        return f"{random.randint(10, 99)} mat", reward, self.over, last, words


class Faulty(Guess):
    """Fails, hangs, or returns NaN or nothing, at random."""

    def fate(self) -> str:
        fates = ("", "fail", "nan", "nothing", "hang")
        (fate,) = random.choices(fates, [0.845, 0.05, 0.05, 0.05, 0.005])
        if fate == "hang":
            time.sleep(60)
        if fate == "fail":
            raise OSError("the disk is full")
        return fate

    def reset(self, seed=None):
        return None if self.fate() in ("nan", "nothing") else super().reset(seed)

    def step(self, text):
        fate = self.fate()
        observation, reward, *rest = super().step(text)
        if fate == "nothing":
            return None
        return observation, np.nan if fate == "nan" else reward, *rest


CHAT = (
    "{% if tools %}{{ tools | length }} tool.{% endif %}{% for m in messages %}{{ m.role + ':' + m.content }}"
    "{% for call in m.tool_calls %}{{ '<tool_call>' + call.function.name + '</tool_call>' }}{% endfor %}"
    "{{ '<eos>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CALLS = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant:",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<eos>|$", "content": "text"},
    },
}


def call(digit: int) -> str:
    """A turn that calls the tool of a safe."""
    return f'<tool_call>{{"name": "turn", "arguments": {{"digit": {digit}}}}}</tool_call>'


def chat_policy(context: int = 512) -> Policy:
    """A tiny policy of characters that reads chats and is told of tools."""
    from toy_tasks.models import TinyModel

    model, tokenizer = TinyModel(
        tuple(string.printable), layers=1, hidden=16, heads=2, context=context
    )(0)
    tokenizer.chat_template, tokenizer.response_template = CHAT, CALLS
    return wrap(model, tokenizer, source="tiny chat")


class Recorded(Generator):
    """The usual generator, keeping its prompts, or one that writes a script: a text per row in each call."""

    def __init__(self, policy: Policy, *script: list[str]) -> None:
        self.policy, self.script, self.histories, self.draws = policy, iter(script), [], []
        self.usual = None if script else TransformersGenerator(policy)

    def generate(self, prompt_ids, sampling, draws) -> Rollout:
        self.histories.append([list(ids) for ids in prompt_ids])
        if self.usual:
            self.draws.append(draws)
            return self.usual.generate(prompt_ids, sampling, draws)
        texts, length = next(self.script), sampling.max_completion_length
        rows = [
            self.policy.tokenizer(text, add_special_tokens=False).input_ids[:length]
            for text in texts
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.policy.pad_id] * (width - len(row)) for row in rows])
        mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        prompts = pad_left(prompt_ids, self.policy.pad_id)
        return Rollout(
            *prompts,
            prompt_index=torch.arange(len(rows)),
            completion_ids=ids,
            mask=mask,
            sampling_logprobs=torch.zeros(ids.shape),
            truncated=torch.tensor([row[-1] not in self.policy.eos_ids for row in rows]),
        )
