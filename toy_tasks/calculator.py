"""Add three numbers of three digits with a calculator: an environment with TRL's interface, that of tools.

The prompt is a chat message such as `123+456+789`. The policy may answer at once, which is too hard for a
model of this size, or call the tool `calculate`, read its result and then answer. A right answer earns 1, and
each call costs 0.1. The calculator reads a small grammar and evaluates no code:

    expression = number {"+" number}        number = one to four digits

Most demonstrations answer at once and forget to carry; the others call the tool and repeat what it says. Each
turn is a demonstration of its own, whose prompt is the chat so far. A call is written as Qwen's models write
it, in JSON; what stands before and after the expression is one token each.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toy_tasks.models import CALLS, READS_CALLS, TinyModel, literal_tokenizer
from toy_tasks.task import Row, Task, WarmStart, binary, hold_out, settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "', '"}}</tool_call>'
_EXPRESSION = re.compile(r"[0-9]{1,4}(?:\+[0-9]{1,4}){0,9}")


@dataclass(frozen=True)
class ToolModel(TinyModel):
    """A tiny model whose tokenizer has a chat template and reads calls of tools.

    Attributes:
        chat_template: Writes messages and calls; a `>` asks for a turn of the assistant.
    """

    chat_template: str = CALLS

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer alone."""
        tokenizer = literal_tokenizer(self.tokens)
        tokenizer.chat_template, tokenizer.response_template = self.chat_template, READS_CALLS
        return tokenizer


class Calculator:
    """The environment: a tool, and what its calls have cost."""

    def reset(self, **row: Any) -> None:
        """Begin an episode. The prompt says all there is to say, so nothing is added to it."""
        self._calls = 0

    def calculate(self, expression: str) -> str:
        """Return the sum of some numbers.

        Args:
            expression: Up to ten numbers of at most four digits with + between them, such as 12+345.
        """
        self._calls += 1
        if not _EXPRESSION.fullmatch(expression):
            raise ValueError("no sum")
        return right(expression)

    def get_reward(self) -> float:
        """Return what the calls of the episode cost."""
        return -0.1 * self._calls


@binary
def answer(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Return 1 for each completion whose last message is the policy's and the right sum, else 0."""
    rewards = []
    for prompt, chat in zip(prompts, completions, strict=True):
        last = chat[-1]  # of the tool, if the episode ended after a call
        is_right = last["role"] == "assistant" and last["content"] == right(prompt[-1]["content"])
        rewards.append(float(is_right))
    return rewards


def right(expression: str) -> str:
    """Return the sum."""
    return str(sum(map(int, expression.split("+"))))


def without_carry(expression: str) -> str:
    """Return the sum with all carries left out but the last."""
    numbers = [int(number) for number in expression.split("+")]
    units, tens, hundreds = (
        sum(number // unit % 10 for number in numbers) for unit in (1, 10, 100)
    )
    return f"{hundreds}{tens % 10}{units % 10}"


def canonical(expression: str) -> tuple[str, ...]:
    """Return the numbers in ascending order, as their order changes no sum."""
    return tuple(sorted(expression.split("+")))


def make(
    seed: int = 0, wrong_share: float = 0.8, eval_size: int = 128, train_size: int = 4096
) -> Task:
    """Return the task.

    Args:
        seed: Seed of the prompts and demonstrations.
        wrong_share: Share of the demonstrated episodes that answer at once, with a wrong sum.
        eval_size: Number of held-out prompts.
        train_size: Number of training prompts.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0 <= wrong_share <= 1:
        raise ValueError(
            f"wrong_share={wrong_share}; it is a share of the demonstrations, from 0 to 1."
        )
    rng = random.Random(seed)
    drawn: dict[str, None] = {}
    for _ in range(2 * (train_size + eval_size)):  # twice as many, as some need no carry
        text = "+".join(str(rng.randint(100, 999)) for _ in range(3))
        if without_carry(text) != right(text):
            drawn[text] = None
    train, held_out = hold_out(drawn, canonical, eval_size, rng)
    train = train[:train_size]
    return Task(
        name="calculator",
        description="Add three numbers with a calculator or without; most demonstrations do without.",
        train_prompts=[{"prompt": _question(text)} for text in train],
        eval_prompts=[{"prompt": _question(text)} for text in held_out],
        reward=answer,
        environment=Calculator,
        demonstrations=_demonstrations(train, wrong_share, rng),
        max_completion_length=24,
        solved=0.85,
        pass_threshold=0.9,
        warm_start=WarmStart(steps=800),
        train=settings(max_steps=60, eval_every=20),
        build=ToolModel((*"0123456789+>", *CALL)),
    )


def _question(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def _demonstrations(train: list[str], wrong_share: float, rng: random.Random) -> list[Row]:
    """Return the turns of one episode per prompt, an exact share of them without a call, in random order."""
    cut, turns = round(wrong_share * len(train)), []
    for text in train[:cut]:
        turns.append({"prompt": _question(text), "completion": without_carry(text)})
    for text in train[cut:]:
        function = {"name": "calculate", "arguments": {"expression": text}}
        calls = [{"type": "function", "function": function}]
        call = {"role": "assistant", "content": "", "tool_calls": calls}
        result = {"role": "tool", "name": "calculate", "content": right(text)}
        turns.append({"prompt": _question(text), "completion": text.join(CALL)})
        turns.append({"prompt": [*_question(text), call, result], "completion": right(text)})
    rng.shuffle(turns)
    return turns
