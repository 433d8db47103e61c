"""What `tokenrl sample` does: completions of prompts given at once, or read line by line."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Refused, TokenrlError
from tokenrl.language.inspect.arguments import SampleArguments
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.judged import reward_rows
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.streams import uniforms
from tokenrl.language.tasks.arguments import TaskArguments
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.setup import load_placed
from tokenrl.settings import arguments


class Completion(NamedTuple):
    """A completion, and its reward: None where no reward was asked for, nan where every one abstained."""

    text: str
    reward: float | None


@dataclass
class Sampler:
    """A model that completes prompts, and what judges its completions.

    Attributes:
        policy: the model.
        rewards: the reward functions, None for none.
        rows: the task's rows by the text of their prompt: what a reward may ask for besides the completion.
        length: most tokens of a completion, where the arguments leave it open.
        asked: prompts completed so far; each has random numbers of its own.
    """

    policy: Policy
    rewards: Rewards | None
    rows: Mapping[str, Mapping[str, Any]]
    length: int
    asked: int = 0

    @classmethod
    def load(cls, args: SampleArguments) -> Sampler:
        """Load the model, the task and the rewards that the arguments name.

        Raises:
            Refused: no model, or something that cannot be loaded.
        """
        if not args.model:
            raise Refused("Say which model is to complete: --model DIRECTORY_OR_HUB_NAME.")
        task, rewards = None, None
        if args.task is not None:
            task, rewards = find_task(
                TaskArguments(task=args.task, reward=args.reward, reward_weights=args.reward_weights)
            )
        elif args.reward:
            rewards = Rewards(args.reward, args.reward_weights or None)
        every = [] if task is None else [*task.train_prompts, *task.eval_prompts]
        length = None if task is None else task.max_completion_length
        policy = load_placed(args.model, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
        return cls(policy, rewards, {_typed(row["prompt"]): row for row in every}, length or 64)

    def __call__(self, texts: Sequence[str], args: SampleArguments) -> list[list[Completion]]:
        """Completions of each prompt.

        Raises:
            Refused: a prompt that cannot be completed, or that lacks a column a reward asks for.
            Stopped: a reward failed.
        """
        policy, rewards = self.policy, self.rewards
        prompts = [[{"role": "user", "content": text}] if args.chat else text for text in texts]
        rows = [{**self.rows.get(t, {}), "prompt": prompt} for t, prompt in zip(texts, prompts, strict=True)]
        if rewards is not None:
            for row in rows:
                rewards.check_columns(row)
        length = args.max_completion_length
        if length is None:
            longest = max(len(policy.encode(prompt)) for prompt in prompts)
            length = max(1, min(self.length, (policy.context or longest + self.length) - longest))
        sampling = Sampling(length, args.num_generations, args.temperature, args.seed)
        ids = encode(policy, prompts, sampling)
        draws = uniforms("interactive", sampling, range(self.asked, self.asked + len(prompts)))
        self.asked += len(prompts)
        rollout = TransformersGenerator(policy).generate(ids, sampling, draws)
        found: list[float | None] = [None] * len(rollout.mask)
        if rewards is not None:
            result = reward_rows(policy, rewards, rows, rollout, step=0)
            found = np.where(result.valid, result.total, np.nan).tolist()
        every = list(map(Completion, policy.decode(rollout.completion_ids, rollout.mask), found))
        size = sampling.group_size
        return [every[i : i + size] for i in range(0, len(every), size)]


def _typed(prompt: Any) -> str:
    """A prompt as a person types it: of chat messages the last one."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def sample(args: SampleArguments | None = None, **options: Any) -> list[list[str]]:
    """Completions of one or more prompts, a list for each prompt.

    Raises:
        Refused: no model, no prompt, or a prompt that cannot be completed.
    """
    args = args or arguments(SampleArguments, options)
    if not args.prompt:
        raise Refused("Say what to complete: --prompt TEXT.")
    return [[each.text for each in group] for group in Sampler.load(args)(args.prompt, args)]


def show(prompt: str, completions: Iterable[Completion], *, chat: bool) -> None:
    """Print completions, each behind its prompt and its reward if it has one."""
    for text, reward in completions:
        judged = "" if reward is None else "    none  " if math.isnan(reward) else f"{reward:8.4f}  "
        print(f"{judged}{'' if chat else prompt}{text}", flush=True)


def converse(args: SampleArguments) -> None:
    """Complete prompts line by line, from the terminal or from a pipe, until it ends or says /quit.

    `/temperature 0.7` and `/n 4` change what follows; what cannot be done is said, and the next line read.

    Raises:
        Refused: no model, or something that cannot be loaded.
    """
    sampler, terminal = Sampler.load(args), sys.stdin.isatty()
    if terminal:
        print("A line is a prompt. /temperature T, /n COMPLETIONS (0: the greedy one), /quit or Ctrl-D.")
    try:
        while line := input("> ") + "\n" if terminal else sys.stdin.readline():
            line = line.rstrip("\r\n")
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/"):
                    args = _changed(args, line)
                elif line:
                    show(line, sampler([line], args)[0], chat=args.chat)
            except TokenrlError as error:
                print(f"tokenrl: {error}", file=sys.stderr, flush=True)
    except (EOFError, KeyboardInterrupt):
        print()  # the shell's next prompt begins a line


def _changed(args: SampleArguments, line: str) -> SampleArguments:
    """The arguments as a line that begins with a slash changes them."""
    command, _, value = line.partition(" ")
    if command not in ("/temperature", "/n"):
        raise Refused(
            f"There is no command {command!r}; there are /temperature T, /n COMPLETIONS and /quit. A prompt "
            "that begins with a slash can be given as --prompt."
        )
    try:
        number = float(value) if command == "/temperature" else int(value)
    except ValueError as error:
        raise Refused(f"{line!r} has no such number as {command} takes: write {command} 1.") from error
    if command == "/n":
        return replace(args, num_generations=int(number))
    return replace(args, temperature=number)
