"""Completes prompts for people (`tokenrl sample`): prompts given as arguments, or read line by line."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenrl.errors import Refused, TokenrlError
from tokenrl.language.inspect.arguments import EvaluateArguments, SampleArguments
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.prompts import form_of, say_form, settled_form, special_texts
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import reward_rows
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.streams import uniforms
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.defaults import length_of
from tokenrl.language.training.records import prompt_text
from tokenrl.language.training.setup import load_placed
from tokenrl.runs.console import harmless, visible
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import called


class Completion(NamedTuple):
    """A completion and its reward: None if it is not rewarded, nan if every reward function abstained."""

    text: str
    reward: float | None


@dataclass
class Sampler:
    """A model that completes prompts, and the rewards of its completions.

    Attributes:
        policy: the model.
        rewards: the reward functions; None if there are none.
        rows: the task's rows by the text of their prompt; their columns are passed to the rewards.
        length: maximum number of tokens in a completion, if the arguments leave it open.
        completed: number of prompts completed so far; each prompt gets random numbers of its own.
        told: whether a message has said why a prompt has no reward; it is said once.
        warned: whether a message has said that a prompt contains a special token; it is said once.
        threads: with how many threads torch samples on a CPU; None for as many as it uses anyway.
    """

    policy: Policy
    rewards: Rewards | None
    rows: Mapping[str, Mapping[str, Any]]
    length: int
    completed: int = 0
    told: bool = False
    warned: bool = False
    threads: int | None = None

    @classmethod
    def load(cls, args: SampleArguments) -> Sampler:
        """Load the model, the task and the rewards that the arguments name.

        Raises:
            Refused: no model is named, or something cannot be loaded.
        """
        if not args.model:
            raise Refused("Name the model that completes prompts: --model DIRECTORY_OR_HUB_NAME.")
        args = settled_form(args)
        task, rewards = None, None
        if args.task is not None:
            chosen: dict[str, Any] = {"reward": args.reward, "reward_weights": args.reward_weights}
            task, rewards = find_task(EvaluateArguments(task=args.task, chat=args.chat, **chosen))
        elif args.reward:
            rewards = Rewards(args.reward, args.reward_weights or None)
        every = [] if task is None else [*task.train_prompts, *task.eval_prompts]
        policy = load_placed(args.model, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
        policy.ask(form_of(args))
        say_form(policy.form, args.model)
        rows = {prompt_text(row["prompt"]): row for row in every}
        length = length_of(task, args.model, policy, otherwise=64)
        threads = choose_threads(policy.size)[0]
        return cls(policy, rewards, rows, length, threads=threads)

    @property
    def chat(self) -> bool:
        """Whether prompts are sent as chat messages."""
        return bool(self.policy.form.chat)

    def __call__(self, texts: Sequence[str], args: SampleArguments) -> list[list[Completion]]:
        """Complete prompts.

        Args:
            texts: the prompts.
            args: how completions are sampled.

        Returns:
            For each prompt, its completions with their rewards. A prompt that is none of the task's is
            answered without a reward if a reward function needs a column of the task or fails on it.

        Raises:
            Refused: a prompt cannot be completed.
            Stopped: a reward function failed on a prompt of the task.
        """
        policy = self.policy
        rows = [self._row(text) for text in texts]
        prompts = [row["prompt"] for row in rows]
        self._warn_of(prompts)
        length = args.max_completion_length
        if length is None:
            longest = max(len(policy.encode(prompt)) for prompt in prompts)
            length = max(1, min(self.length, (policy.context or longest + self.length) - longest))
        sampling = Sampling(length, args.num_generations, args.temperature, args.seed)
        ids = encode(policy, prompts, sampling)
        draws = uniforms("interactive", sampling, range(self.completed, self.completed + len(prompts)))
        self.completed += len(prompts)
        with using_threads(self.threads):
            rollout = TransformersGenerator(policy).generate(ids, sampling, draws)
        decoded, size = policy.decode(rollout.completion_ids, rollout.mask), sampling.group_size
        groups = []
        for place, row in enumerate(rows):
            mine = slice(place * size, (place + 1) * size)
            index = torch.arange(mine.start, mine.stop, device=rollout.mask.device)
            found = self._rewarded(texts[place], row, rollout.rows(index))
            groups.append(list(map(Completion, decoded[mine], found)))
        return groups

    def _warn_of(self, prompts: Sequence[Any]) -> None:
        """Say once that a prompt contains the text of a special token."""
        for warning in () if self.warned else special_texts(self.policy.tokenizer, prompts):
            self.warned = True
            print(f"tokenrl: {visible(warning)}", file=sys.stderr)

    def _row(self, text: str) -> Mapping[str, Any]:
        """Return the task's row of this prompt, else a row of the prompt alone, of the kind that it has."""
        like = next((row["prompt"] for row in self.rows.values()), [] if self.policy.form.chat else "")
        alone = text if isinstance(like, str) else [{"role": "user", "content": text}]
        return self.rows.get(text, {"prompt": alone})

    def _rewarded(self, text: str, row: Mapping[str, Any], rollout: Rollout) -> list[float | None]:
        """Reward completions of one prompt; None for each if it is none of the task's and cannot be."""
        silent: list[float | None] = [None] * len(rollout.mask)
        if self.rewards is None:
            return silent
        try:
            self.rewards.check_columns(row)
            result = reward_rows(self.policy, self.rewards, [row], rollout, step=0)
        except TokenrlError as error:
            if text in self.rows or not self.rows:
                raise
            if not self.told:
                reason = str(error).partition(". ")[0].rstrip(".")
                print(
                    f"tokenrl: no reward, for this prompt is none of the task's. {reason}.", file=sys.stderr
                )
            self.told = True
            return silent
        return np.where(result.valid, result.total, np.nan).tolist()


def sample(args: SampleArguments | None = None, **options: Any) -> list[list[str]]:
    """Complete prompts with a model; the keywords are the fields of `SampleArguments`.

    Args:
        args: all arguments at once, instead of keywords.
        **options: the fields of `SampleArguments`.

    Returns:
        For each prompt, the list of its completions.

    Raises:
        Refused: no model or no prompt is named, or a prompt cannot be completed.
    """
    args = called(SampleArguments, args, options)
    if not args.prompt:
        raise Refused("Give a prompt to complete: --prompt TEXT.")
    return [[each.text for each in group] for group in Sampler.load(args)(args.prompt, args)]


def show(prompt: str, completions: Iterable[Completion], *, chat: bool) -> None:
    """Print completions, each after its reward (if there is one) and, unless it is a chat, its prompt.

    Control characters that could change the terminal are written as escapes.
    """
    for text, reward in completions:
        judged = "" if reward is None else "    none  " if math.isnan(reward) else f"{reward:8.4f}  "
        print(harmless(f"{judged}{'' if chat else prompt}{text}"), flush=True)


def converse(args: SampleArguments) -> None:
    """Complete prompts line by line, from the terminal or from a pipe, until the input ends or says /quit.

    The lines `/temperature 0.7` and `/n 4` change the sampling of later prompts. An error is printed, and the
    next line is read.

    Raises:
        Refused: no model is named, or something cannot be loaded.
    """
    sampler, terminal = Sampler.load(args), sys.stdin.isatty()
    if terminal:
        print("Each line is a prompt. Commands: /temperature T, /n COMPLETIONS (0: greedy), /quit or Ctrl-D.")
    try:
        while line := input("> ") + "\n" if terminal else sys.stdin.readline():
            line = line.rstrip("\r\n")
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/"):
                    args = _changed(args, line)
                elif line:
                    show(line, sampler([line], args)[0], chat=sampler.chat)
            except TokenrlError as error:
                print(f"tokenrl: {error}", file=sys.stderr, flush=True)
    except (EOFError, KeyboardInterrupt):
        print()  # so that the shell's prompt begins on a new line


def _changed(args: SampleArguments, line: str) -> SampleArguments:
    """Return the arguments as changed by a line that begins with a slash."""
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
