"""Completes prompts for people (`tokenrl sample`): prompts given as arguments, or read line by line."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from tokenrl.configuration import read_config
from tokenrl.errors import Refused, TokenrlError
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.language.commands.arguments import SampleArguments
from tokenrl.language.commands.opening import as_in_runs, load_saved, place, remark, state_of
from tokenrl.language.evaluation.evaluation import transcript
from tokenrl.language.policy.arguments import fill_form, run_of
from tokenrl.language.policy.characters import prompt_warnings
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import checked_generator
from tokenrl.language.rollout.allowed import with_allowed
from tokenrl.language.rollout.distribution import distribution_of
from tokenrl.language.rollout.rewarded import (
    prompt_text,
    prompts_of,
    reward_rows,
    sample_rows,
    texts_of,
)
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import with_missing_fields
from tokenrl.language.tasks.rows import Row
from tokenrl.language.tasks.sources import fault_of_prompt
from tokenrl.language.tasks.task import PromptTask, find_task
from tokenrl.language.training.tokens import token_lists
from tokenrl.runs.output import harmless, number, rich_console, rich_table, visible
from tokenrl.runs.threads import choose_threads, using_threads


class Completion(NamedTuple):
    """A completion of a prompt, or an episode with the words of the environment.

    Attributes:
        text: the text.
        reward: None if it is not rewarded, nan if every reward function abstained.
        tokens: lists with an entry for each token, as `token_lists` returns them; empty unless they were asked for.
    """

    text: str
    reward: float | None
    tokens: dict[str, Any]


class Sampler:
    """A model that completes prompts one after the other, and the rewards of its completions.

    Attributes:
        policy: the model.
        rewards: the reward functions; there may be none.
        rows: the rows of the task, by what a person would type as their prompt.
        environments: what it plays episodes in; None for completions of one turn.
    """

    def __init__(self, args: SampleArguments) -> None:
        """Load the model, the task and the rewards that the arguments name.

        Raises:
            Refused: no model is named, or something cannot be loaded.
        """
        if not args.model:
            raise Refused(
                "Name the model that completes prompts: model (--model), a directory or hub name."
            )
        run = run_of(args.model)
        config = {} if run is None else read_config(run)
        if args.chat is None and config.get("chat_prompts"):
            args = replace(args, chat=True)
        task, self.rewards, args = self._task(args, config.get("max_completion_length") or 64)
        self.rewards.state = state_of(args.model)
        self.environments = self.rewards.environments
        self.policy = load_saved(args, args.model)
        self._length = place(args, self.policy, args.model, task, length=64)
        self._generator = checked_generator(self.policy, self.environments)
        self._args = args
        rows = [*task.train_prompts, *task.eval_prompts]
        is_text = args.chat is False  # a chat of the task is not what is asked then
        self.rows = {
            prompt_text(row["prompt"]): row
            for row in rows
            if not is_text or isinstance(row["prompt"], str)
        }
        self._is_chat = self.policy.form.chat
        if self.rows:
            first = next(iter(self.rows.values()))
            self._is_chat = not isinstance(first["prompt"], str)
        self._completed = 0
        self._warned = set[str]()

    def _task(self, args: SampleArguments, length: int) -> tuple[PromptTask, Rewards, Any]:
        """Return the task, the rewards, and the arguments with which both were made.

        Where nothing names a task, or that of the run cannot be used, a task without rows has the limit of a
        completion, and the rewards are those that the user named.
        """
        try:
            settled = fill_form(as_in_runs(args))
            if settled.task is not None:
                return *find_task(settled, may_lack_rewards=True), settled
        except Refused as error:
            if args.task is not None or args.reward:
                raise
            remark(f"completions are shown without rewards. {error}")
        rewards = Rewards(args.reward or (), args.reward_weights or None, optional=True)
        return PromptTask("", (), (), max_completion_length=length), rewards, fill_form(args)

    def __call__(self, text: str) -> list[Completion]:
        """Complete a prompt; each one gets random numbers of its own.

        A prompt that is none of the task's is answered without a reward if a reward function needs a column of
        the task or fails on it.

        Raises:
            Refused: the prompt cannot be completed.
            Stopped: a reward function failed on a prompt of the task.
        """
        args = self._args
        policy = self.policy
        text = self.asked(text)
        if fault := fault_of_prompt(text):
            raise Refused(f"It cannot be completed, since {fault}.")
        prompt = [{"role": "user", "content": text}] if self._is_chat else text
        row = self.rows.get(text, {"prompt": prompt})
        for warning in prompt_warnings(policy.tokenizer, [row]):
            self._warn(warning, warning)
        length = self._length
        if policy.context is not None and self.environments is None:
            room = policy.context - len(policy.encode(row["prompt"], row.get("tools")))
            length = max(1, min(length, room))
        length = args.max_completion_length or length
        sampling = Sampling(length, args.num_generations, args.seed, **distribution_of(args))
        sampling = with_allowed(policy, [row], sampling)
        prompts = [(self._completed, row)]
        self._completed += 1
        options = "interactive", self.environments
        with using_threads(choose_threads(policy.size)[0]):
            rollout = sample_rows(policy, self._generator, prompts, sampling, *options)
        texts = texts_of(policy, rollout)
        if self.environments is not None:
            columns = rollout.messages, rollout.endings, rollout.failures
            texts = list(map(transcript, prompts_of(policy, rollout, []), *columns))
        tokens: list[dict[str, Any]] = [{}] * len(texts)
        if args.tokens:
            scored = with_missing_fields(policy, rollout, self._generator.regime, sampling)
            numbers = {"logprob": scored.logprobs, "entropy": scored.entropy}
            tokens = token_lists(policy, rollout, numbers, range(len(texts)))
        return [*map(Completion, texts, self._rewarded(text, row, rollout), tokens)]

    def asked(self, text: str) -> str:
        """Return a text as a prompt: the empty one where an environment begins all its episodes itself."""
        if text and self.environments is not None and {*self.rows} == {""}:
            name = self.environments.__name__
            self._warn(
                "prompt",
                f"{name} begins its episodes itself, so they are played without that prompt.",
            )
            return ""
        return text

    def target(self, text: str) -> str:
        """Return what the row of a prompt of the task holds beside it, such as the answer."""
        texts: dict[str, str] = {}  # the first column of each text
        for name, value in self.rows[text].items():
            if name not in ("prompt", "messages") and value is not None:
                texts.setdefault(str(value), name)
        texts.pop(text, None)
        return ", ".join(f"{name} {value}" for value, name in texts.items())

    def _rewarded(self, text: str, row: Row, rollout: Rollout) -> list[float | None]:
        """Reward completions of one prompt; None for each if it is none of the task's and cannot be."""
        if self.rewards.functions:
            try:
                self.rewards.check_columns(row)
                rows = reward_rows(self.policy, self.rewards, rollout, [row])
                return [*rows.reward_list()]
            except TokenrlError as error:
                if text in self.rows or not self.rows:
                    raise
                reason = str(error).partition(". ")[0].rstrip(".")
                self._warn(
                    "reward", f"no reward for this prompt, which is none of the task's. {reason}."
                )
        return [None] * len(rollout.mask)

    def _warn(self, kind: str, words: str) -> None:
        """Print a warning on the standard error, once of each kind."""
        if kind not in self._warned:
            remark(words)
        self._warned.add(kind)


@takes(SampleArguments)
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
    args = arguments_of_call(SampleArguments, args, options)
    if not args.prompt:
        raise Refused("Give a prompt to complete: prompt (--prompt), a text.")
    sampler = Sampler(args)
    return [[completion.text for completion in sampler(prompt)] for prompt in args.prompt]


def print_samples(args: SampleArguments) -> int:
    """Print completions of the prompts that were given, or else of lines that are typed or come by a pipe.

    Each prompt has a line, and of a prompt of the task its target has one. Then come the completions, each
    after its reward, if there is one. Control characters that could change the terminal are written as
    escapes. A typed line that cannot be completed is answered with the reason, and the next one is read.

    Raises:
        Refused: no model is named, something cannot be loaded, or a prompt that was given cannot be
            completed.
    """
    sampler = Sampler(args)
    kind = "completion " if sampler.environments is None else "episode\n"
    for prompt in args.prompt or _lines(sampler.rows):
        prompt = sampler.asked(prompt)
        try:
            completions = sampler(prompt)
            print(f"prompt     {visible(prompt)}")
            if prompt in sampler.rows:
                print(f"target     {visible(sampler.target(prompt))}")
            for text, reward, tokens in completions:
                label = ""
                if sampler.rewards.functions:
                    is_missing = reward is None or math.isnan(reward)
                    label = "reward none  " if is_missing else f"reward {reward:.4f}  "
                print(harmless(f"{label}{kind}{text}"), flush=True)
                if tokens:
                    print_tokens(tokens)
        except TokenrlError as error:
            if args.prompt:
                raise
            print(harmless(f"tokenrl: {error}"), file=sys.stderr, flush=True)
    return 0


def print_tokens(tokens: dict[str, Any]) -> None:
    """Print a table with a line for each token; what the environment wrote is dim, and has no numbers."""
    names = [name for name in tokens if name not in ("tokens/text", "tokens/special")]
    table = rich_table("", ("token",), [name.removeprefix("tokens/") for name in names])
    rows = zip(tokens["tokens/text"], *(tokens[name].tolist() for name in names), strict=True)
    for text, *values in rows:
        is_given = all(map(math.isnan, values))
        cells = [*map(number, values)]
        table.add_row(visible(text), *cells, style="dim" if is_given else None)
    rich_console().print(table)


def _lines(rows: Collection[str]) -> Iterator[str]:
    """Yield the lines that are typed or come by a pipe; empty ones too if a row has an empty prompt."""
    lines: Iterable[str] = sys.stdin
    if sys.stdin.isatty():
        example = visible(next(iter(rows), ""), 200)
        such_as = f", such as {example}" if example else ""
        or_empty = ", or empty" if "" in rows else ""
        print(f"Each line is a prompt{such_as}{or_empty}. Ctrl-D ends.")
        lines = iter(partial(input, "> "), None)
    try:
        for line in lines:
            if (line := line.rstrip("\r\n")) or "" in rows:
                yield line
    except (EOFError, KeyboardInterrupt):
        print()  # so that the shell's prompt begins on a new line
