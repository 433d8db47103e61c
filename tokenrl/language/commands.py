"""What `tokenrl sft`, `evaluate` and `sample` do, as functions of the fields of their arguments."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenrl.core.rules import Refused, TokenrlError, check_number
from tokenrl.language.arguments import EvaluateArguments, SampleArguments, SftArguments, TaskArguments
from tokenrl.language.evaluation import Evaluation, evaluate_policy
from tokenrl.language.evaluation_metrics import check_sizes
from tokenrl.language.experience import reward_rows
from tokenrl.language.policy import Policy, load_policy
from tokenrl.language.rewards import Rewards
from tokenrl.language.sampling import sample as draw_completions
from tokenrl.language.sampling import uniforms
from tokenrl.language.saving import model_card, refuse_foreign_directory, save_policy
from tokenrl.language.setup import arguments, find_task, make_policy
from tokenrl.language.supervised import fit
from tokenrl.language.task_sources import read_splits, with_prompts
from tokenrl.runs.checkpoint import replace_directory
from tokenrl.runs.console import Console
from tokenrl.runs.directory import write_json

SFT_DEFAULTS = {"max_steps": 200, "batch_size": 64, "learning_rate": 2e-5}


def sft(args: SftArguments | None = None, **options: Any) -> Path:
    """Fine-tune a model on a task's demonstrations and save it.

    Returns:
        The directory of the model.

    Raises:
        Refused: no demonstrations, no model, or an output directory that holds something else.
    """
    args = args or arguments(SftArguments, options)
    directory = Path(args.output_dir)
    refuse_foreign_directory(directory, overwrite=args.overwrite)
    task, rows = _demonstrations(args)
    console = Console(quiet=args.quiet)
    policy = make_policy(args, task, console.note)
    warm = getattr(task, "warm_start", None)
    recommended = {} if warm is None else {"batch_size": warm.batch_size, "max_steps": warm.steps}
    if warm is not None and args.model is None:  # a rate for tiny models, not for pretrained ones
        recommended["learning_rate"] = warm.learning_rate
    chosen = {name: getattr(args, name) for name in SFT_DEFAULTS if getattr(args, name) is not None}
    settings = SFT_DEFAULTS | recommended | chosen
    facts = {
        "model": policy.source,
        "demonstrations": f"{len(rows):,}",
        "updates": f"{settings['max_steps']} of {settings['batch_size']}, "
        f"learning rate {settings['learning_rate']:g}",
    }
    console.start(
        f"tokenrl sft: {args.task}", facts, note="The loss is the negative log-likelihood, nats a token."
    )
    with console.progress(int(settings["max_steps"])) as progress:
        losses = fit(policy, rows, seed=args.seed, progress=progress.update, **settings)  # type: ignore[arg-type]
    card = model_card(
        f"{args.task}, supervised",
        facts | {"final loss": losses[-1]},
        command=f"tokenrl sft --task {args.task}",
    )
    replace_directory(directory, lambda path: save_policy(policy, path, card=card))
    console.note(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}\nmodel {directory}")
    return directory


def _demonstrations(args: SftArguments) -> tuple[Any, list[dict[str, Any]]]:
    """The task, if there is one, and rows of prompt and completion."""
    if not isinstance(args.task, str) or ":" in args.task or _is_toy(args.task):
        task, _ = find_task(args)
        rows = list(getattr(task, "demonstrations", None) or [])
        if not rows:
            raise Refused(
                f"The task {task.name!r} has no demonstrations; give a task that has, or a data set with a "
                "prompt and a completion column."
            )
        return task, rows
    if args.model is None:
        raise Refused(
            "A data set brings no model: say which to fine-tune with --model DIRECTORY_OR_HUB_NAME."
        )
    splits = read_splits(args.task)
    if args.split not in splits:
        raise Refused(f"{args.task!r} has no split {args.split!r}; it has {', '.join(splits)}.")
    rows = with_prompts(splits[args.split], args.task, args.prompt_column, args.prompt_template)
    if args.completion_column not in rows[0]:
        raise Refused(
            f"{args.task!r} has no column {args.completion_column!r}; it has {', '.join(rows[0])}. Name the "
            "one that holds the completions with --completion-column."
        )
    return None, [row | {"completion": row[args.completion_column]} for row in rows]


def _is_toy(name: str) -> bool:
    try:
        from importlib import import_module

        return name in import_module("toy_tasks").NAMES
    except ImportError:
        return False


def evaluate(args: EvaluateArguments | None = None, **options: Any) -> Evaluation:
    """Evaluate a model on a task's held-out prompts; see `evaluate_policy` and `details` for the numbers.

    Raises:
        Refused: no such model, reference or task, a reward that cannot be used, or a number out of range.
    """
    args = args or arguments(EvaluateArguments, options)
    if not args.model:
        raise Refused("Say which model to evaluate: --model DIRECTORY_OR_HUB_NAME.")
    check_number("temperature", args.temperature, above=0)
    k = (args.k,) if isinstance(args.k, int) else tuple(args.k)
    generations = max((4, *k)) if args.num_generations is None else args.num_generations
    check_number("num_generations", generations, at_least=0)
    check_sizes(k, generations)  # before the model is loaded
    task, rewards = find_task(args)
    policy = _loaded(args.model, args)
    evaluation = evaluate_policy(
        policy,
        task.eval_prompts,
        rewards,
        max_completion_length=args.max_completion_length or task.max_completion_length or 256,
        num_generations=generations,
        temperature=args.temperature,
        seed=args.seed,
        truncate_prompts=args.truncate_prompts,
        detailed=True,
        k=k or ((1, generations) if generations else ()),
        reference=None if args.reference is None else _loaded(args.reference, args),
    )
    if args.json:
        write_json(Path(args.json), evaluation.metrics)
    return evaluation


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
            task, rewards = find_task(TaskArguments(args.task, args.reward, args.reward_weights))
        elif args.reward:
            rewards = Rewards(args.reward, args.reward_weights or None)
        every = [] if task is None else [*task.train_prompts, *task.eval_prompts]
        length = None if task is None else task.max_completion_length
        policy = _loaded(args.model, args)
        return cls(policy, rewards, {_typed(row["prompt"]): row for row in every}, length or 64)

    def __call__(self, texts: Sequence[str], args: SampleArguments) -> list[list[Completion]]:
        """Completions of each prompt.

        Raises:
            Refused: a prompt that cannot be completed, or that lacks a column a reward asks for.
            Stopped: a reward failed.
        """
        policy, rewards = self.policy, self.rewards
        check_number("temperature", args.temperature, above=0)
        check_number("num_generations", args.num_generations, at_least=0)
        prompts = [[{"role": "user", "content": text}] if args.chat else text for text in texts]
        rows = [{**self.rows.get(t, {}), "prompt": prompt} for t, prompt in zip(texts, prompts, strict=True)]
        if rewards is not None:
            for row in rows:
                rewards.check_columns(row)
        length = args.max_completion_length
        if length is None:
            longest = max(len(policy.encode(prompt)) for prompt in prompts)
            length = max(1, min(self.length, (policy.context or longest + self.length) - longest))
        generations = max(1, args.num_generations)
        shape: dict[str, Any] = {"num_generations": generations, "max_completion_length": length}
        ids = policy.encode_all(prompts, max_completion_length=length)
        places = range(self.asked, self.asked + len(prompts))
        self.asked += len(prompts)
        draws = uniforms(args.seed, 0, places, **shape) if args.num_generations else None
        rollout = draw_completions(policy, ids, temperature=args.temperature, draws=draws, **shape)
        found: list[float | None] = [None] * len(rollout.mask)
        if rewards is not None:
            result = reward_rows(policy, rewards, rows, rollout, step=0)
            found = np.where(result.valid, result.total, np.nan).tolist()
        every = list(map(Completion, policy.decode(rollout.completion_ids, rollout.mask), found))
        return [every[i : i + generations] for i in range(0, len(every), generations)]


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
        check_number("num_generations", number, at_least=0)
        return replace(args, num_generations=int(number))
    check_number("temperature", number, above=0)
    return replace(args, temperature=number)


def _loaded(name: str, args: EvaluateArguments | SampleArguments) -> Policy:
    from accelerate import PartialState

    policy = load_policy(name, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    policy.model.to(PartialState().device)
    return policy
