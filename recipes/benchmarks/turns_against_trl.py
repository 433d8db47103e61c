"""Measures seconds, tokens read and memory of a step of episodes against TRL, by the number of turns.

Both train with GRPO, without a KL, in the same environment: a class with TRL's interface, whose tool answers
each text with a text. Each turn of the policy and each answer has 30 tokens. A step has 8 x 8 episodes in
float32 and one update. TRL is asked for no more tokens than the episodes have, and has the attention
`sdpa`, the faster here.

The model has the shape of Qwen3 and random weights, which write calls as Qwen does all the same: the
vocabulary is a chain of groups of tokens, and the token that was read decides which group is next. One
coordinate of its embedding marks its group, and the head's weights of that coordinate are large for the
tokens of the next group. Within a group the random weights choose. So `?` is followed by a call of exactly
30 tokens with its end, and `!` by 30 tokens without a call. The environment ends its answers with `?`, or
with `!` before the last turn, and decides how many turns there are. Neither trainer is patched; each episode
is checked.

Tokens read are the positions that the embedding looks up, padding included: without a gradient they count
as sampling, with one as the update. With `--wait 0.05` the tool is async, and answers after 50 ms.

    pip install -c constraints.txt -e '.[benchmarks]'
    python recipes/benchmarks/turns_against_trl.py
    python recipes/benchmarks/turns_against_trl.py --tokenrl '{"generator_cache": 1e-9}'
    python recipes/benchmarks/turns_against_trl.py --turns 4 --wait 0 --rounds 1

Rounds alternate as in `step_against_trl.py`. Without TRL, only tokenrl is measured.

Look for: tokens that are read in sampling. tokenrl keeps keys and values from turn to turn, and reads each
token once, unless `generator_cache` has no room for them. TRL reads the whole history in each turn. Answers
that take long are awaited one by one in TRL, async or not, and together in tokenrl.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import asyncio
import json
import math
import string
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import tyro
from one_trainer import Clock, Policy, Shape, device, make_model, print_measurement, train
from step_against_trl import (
    SETTINGS,
    TRAINER,
    alternate,
    peaks,
    print_heading,
    print_row,
    run,
    times,
    versions,
)

ASK, TELL = "?", "!"
CALL = '<tool_call>{"name": "ask", "arguments": {"text": "', '"}}</tool_call>'
ALTERNATIVES = 8  # tokens of a group among which the policy chooses
MARK, CERTAIN = 10.0, 20.0  # weights of embedding and head beside which the random ones are small
QWEN = Shape(architecture="qwen3", context=4096, length=30, kv_heads=2)
COLUMNS = (
    *("turns", "answers in, ms", "TRL, s", "tokenrl, s", "ratio (range)", "tokens sampled"),
    *("read in sampling: TRL / tokenrl", "in the update", "peak MB: TRL", "tokenrl"),
)


class Oracle:
    """The environment: its tool answers a text with a text, until the last turn."""

    def reset(self, turns: int, wait: float, **row: Any) -> str:
        """Begin an episode; the text ends the prompt."""
        self._left, self._wait, self._asked = turns - 1, wait, ""
        return self._mark()

    def ask(self, text: str) -> str:
        """Return an answer of as many tokens as the turn that asks.

        Args:
            text: The question.
        """
        self._asked += text
        self._left -= 1
        return (text + text)[: len(text) + 2] + self._mark()

    def get_reward(self) -> float:
        return sum(map(ord, self._asked)) % 5 / 5

    def _mark(self) -> str:
        return ASK if self._left else TELL


class SlowOracle(Oracle):
    """The environment whose tool takes its time."""

    async def ask(self, text: str) -> str:
        """Return an answer, later.

        Args:
            text: The question.
        """
        await asyncio.sleep(self._wait)
        return super().ask(text)


class Counter(Clock):
    """The clock that is the reward function; it also counts the tokens that the model reads.

    `read` has the tokens read so far, without and with a gradient, at each of its calls. `episodes` has the
    lengths of the turns of all episodes.
    """

    def __init__(self, shape: Shape, steps: int, kind: str) -> None:
        super().__init__(shape, steps, kind)
        self.positions = [0, 0]
        self.read: list[list[int]] = []
        self.episodes = set[tuple[int, ...]]()

    def count(self, embedding: Any, inputs: tuple[Any, ...]) -> None:
        """Count what is looked up; a hook."""
        import torch

        self.positions[torch.is_grad_enabled()] += inputs[0].numel()

    def __call__(
        self, completions: list[Any], completion_ids: list[Any], **columns: Any
    ) -> list[float]:
        self.episodes |= {
            tuple(turn_length(message) for message in episode if message["role"] == "assistant")
            for episode in completions
        }
        self.read.append([*self.positions])
        last = [episode[-1]["content"] for episode in completions]
        rewards = super().__call__(last, completion_ids)
        # Hardly one is the mean of its group: tokenrl leaves rows without an advantage out of the update.
        return [math.sin(reward) for reward in rewards]


def turn_length(message: dict[str, Any]) -> int:
    """The tokens of a turn of the policy, with its end."""
    calls = message.get("tool_calls")
    if calls:
        return len(calls[0]["function"]["arguments"]["text"]) + len(CALL) + 1
    return len(message["content"]) + 1


def chained_model(shape: Shape, attention: str | None, kind: str) -> tuple[Any, Any]:
    """A model that writes calls of `shape.length` tokens after `ASK`, and other turns after `TELL`."""
    import torch

    from toy_tasks.models import CALLS, EOS, READS_CALLS, literal_tokenizer

    letters = map(chr, range(0x4E00, 0xA000))

    def free(count: int) -> list[list[str]]:
        return [[next(letters) for _ in range(ALTERNATIVES)] for _ in range(count)]

    asking = [[ASK], [CALL[0]], *free(shape.length - 3), [CALL[1]], [EOS]]
    chain = [*asking, [TELL], *free(shape.length - 1), [EOS]]
    tokens = dict.fromkeys(token for group in chain for token in group if token != EOS)
    tokenizer = literal_tokenizer([*tokens, *string.digits])
    tokenizer.chat_template = CALLS.replace("}}> ", "}}")  # ASK and TELL take the place of `>`
    anchor = {"start_anchor_pattern": f"[{ASK}{TELL}]"}
    fields = {key: READS_CALLS[key] for key in ("defaults", "fields")}
    tokenizer.response_template = anchor | fields
    shape = replace(shape, vocabulary=max(shape.vocabulary, len(tokenizer)))
    model, _ = make_model(shape, attention, kind, tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(group) for group in chain]
    with torch.no_grad():
        for number, (group, following) in enumerate(pairwise(ids)):
            model.get_input_embeddings().weight[group, number] = MARK
            model.get_output_embeddings().weight[following, number] = CERTAIN
    return model, tokenizer


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure what a dict of JSON asks for; a step more than asked, because steps lie between calls."""
    if spec["who"] == "tokenrl":
        import tokenrl  # noqa: F401  # before torch
    turns, wait, shape = spec["turns"], spec["wait"], Shape(**spec["shape"])
    clock = Counter(shape, spec["steps"] + 1, device(spec))
    environment = SlowOracle if wait else Oracle
    model, tokenizer = chained_model(shape, spec.get("attention"), clock.kind)
    model.get_input_embeddings().register_forward_pre_hook(clock.count)
    texts = [f"{i:0{shape.prompt - 1}}" for i in range(shape.prompts * (clock.steps + 1))]
    rows = [
        {"prompt": [{"role": "user", "content": text}], "turns": turns, "wait": wait}
        for text in texts
    ]
    settings = {"learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    if spec["who"] == "tokenrl":
        settings["max_completion_length"] = turns * shape.length
        settings["max_turns"] = turns + 1  # the environment decides, not this limit
    else:  # which counts answers too
        settings["max_completion_length"] = (2 * turns - 1) * shape.length
    train(spec, clock, Policy(model, tokenizer, rows, environment), **settings)
    if clock.episodes != {(shape.length,) * turns}:
        raise SystemExit(f"The turns of episodes had these numbers of tokens: {clock.episodes}.")
    before, after = clock.read[-2:]
    read = [last - first for first, last in zip(before, after, strict=True)]
    return clock.measurement() | {"read": read}


def row(turns: int, wait: float, args: Namespace, settings: list[dict[str, Any]]) -> list[str]:
    """Measure tokenrl and, where it has settings, TRL in turn; returns a row of the table."""
    spec = {"turns": turns, "wait": wait, "steps": args.steps, "shape": asdict(QWEN)}
    _, *both = alternate(Path(__file__), spec, settings, args)
    sampled = turns * QWEN.length * QWEN.prompts * QWEN.group
    read = [result["read"] for result in (both[0][-1], both[1][-1]) if "read" in result]
    beside = [
        " / ".join(f"{number:,}" for number in numbers) for numbers in zip(*read, strict=True)
    ]
    cells = [str(turns), f"{1000 * wait:.0f}", *times(*both), f"{sampled:,}"]
    return [*cells, *(beside or ["", ""]), *peaks(*both)]


def main(
    turns: tuple[int, ...] = (1, 4, 12),
    wait: tuple[float, ...] = (0, 0.05),
    rounds: int = 3,
    steps: int = 6,
    tokenrl: str = "{}",
) -> None:
    """Measure both trainers on episodes.

    Args:
        turns: Numbers of turns of an episode.
        wait: Seconds until the tool answers; 0: a tool that is not async.
        rounds: Rounds, each of both trainers.
        steps: Steps of each measurement, 2 or more.
        tokenrl: Further settings of tokenrl, in JSON.
    """
    args = Namespace(rounds=rounds, steps=steps, tokenrl=json.loads(tokenrl))
    print_heading(COLUMNS, versions(run(TRAINER, {"part": "device"})))
    for seconds, count in product(wait, turns):
        if count > 1 or not seconds:  # an episode of one turn has no answers
            print_row(row(count, seconds, args, SETTINGS[:1]))


if __name__ == "__main__":
    if "--measure" in sys.argv:  # in a process of its own
        print_measurement(measure)
    else:
        tyro.cli(main, description=__doc__)
