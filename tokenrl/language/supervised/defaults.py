"""Lays the settings of a user over those that a task recommends and over the defaults, by model and LoRA.

What a toy task recommends holds for its own tiny model. Any other model gets its learning rate from its size
and from whether it has learnt anything yet, and its completion length from the task's demonstrations as its
own tokenizer writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from tokenrl.errors import Refused, nearest, with_places
from tokenrl.language.policy.arguments import TINY
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.prompts import formed
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.supervised.arguments import RECOMMENDED, SftArguments
from tokenrl.language.supervised.fit import Pair, encode_demonstrations
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.sources import as_prompt
from tokenrl.language.tasks.task import PromptTask
from tokenrl.settings import arguments, lay

T = TypeVar("T")

ANY = {
    "max_steps": 200,
    "prompts_per_step": 16,
    "num_generations": 8,
    "lr_scheduler_type": "linear",
}
TOY = {"max_steps": 60, "prompts_per_step": 8, "num_generations": 8}
"""A toy task with another model than its own, which is far slower: 3 minutes on a CPU at 135 M parameters."""
SFT_ANY = {"max_steps": 200, "batch_size": 64}
SFT_TOY = {"max_steps": 250, "batch_size": 16}
WARM = {"max_steps": "steps", "batch_size": "batch_size", "learning_rate": "learning_rate"}
"""By setting of `tokenrl sft`, the field of a toy task's warm start that recommends it."""
RATES = ((5e4, 1e-3), (1.35e8, 1e-5), (1e9, 1e-6))
"""Parameters and learning rate: the toy tasks' tiny models; GPT-2 and its like (Ziegler et al. 2019 took
1.4e-5 for 124 M); TRL's default, which is made for 1e9 and more (GRPO, DAPO and others take the same)."""
LEAST_SUPERVISED = 2e-5
LARGEST_RATE = 1e-3
LARGEST_TRAINED = 1e-4
"""Largest rate for rewards, without an adapter, of weights that have learnt before: higher ones make a tiny
model forget more than it learns (recipes/pages/explain/comparing.md has the runs)."""


def default_rate(
    parameters: int, *, lora: bool = False, supervised: bool = False, trained: bool = True
) -> float:
    """Return the peak learning rate for a model of this size, to one significant figure.

    It lies on the power laws between the points of `RATES`, and is constant beyond the first and the last.
    Rewards teach weights that have learnt before at 1e-4 at most, as they have something to lose. Supervised
    training takes ten times that, at least 2e-5 (TRL's default). An adapter takes ten times the
    rate of full weights (Schulman et al. 2025, "LoRA Without Regret"). No rate is above 1e-3.

    Args:
        parameters: number of the model's parameters, without an adapter.
        lora: whether only a LoRA adapter is trained.
        supervised: whether demonstrations are learnt from, not rewards.
        trained: whether the weights have learnt before, from texts, demonstrations or rewards.
    """
    sizes, rates = np.log(np.array(RATES)).T
    rate = math.exp(np.interp(math.log(max(1, parameters)), sizes, rates))
    if supervised:
        rate = max(10 * rate, LEAST_SUPERVISED)
    elif trained:
        rate = min(rate, LARGEST_TRAINED)
    return min(LARGEST_RATE, float(f"{10 * rate if lora else rate:.0e}"))


def parameter_count(policy: Policy) -> int:
    """Return the number of the model's parameters, those of a LoRA adapter left out."""
    return sum(p.numel() for name, p in policy.model.named_parameters() if "lora_" not in name)


def demonstrations(task: PromptTask, column: str = "completion") -> Rows:
    """Return a task's demonstrations, or else those of its training rows that have a completion.

    Args:
        task: the task.
        column: column of the training rows that holds the completions.

    Returns:
        Rows with a `prompt` and a `completion`.

    Raises:
        Refused: there are none.
    """
    rows: Rows = task.demonstrations or with_completions(task.train_prompts, column)
    if not rows:
        columns = task.train_prompts.columns
        raise Refused(
            f"The task {task.name!r} has no demonstrations, and its rows have no column {column!r}: name one of "
            f"{', '.join(columns)} by completion_column (--completion-column).{nearest(column, columns)}"
        )
    return rows


def with_completions(rows: Rows, column: str) -> Rows:
    """Return the rows that have a value in this column, as `completion`."""
    values = rows.column(column)
    rows = replace(rows, columns={**rows.columns, "completion": [*map(as_prompt, values)]})
    return rows.take(number for number, value in enumerate(values) if value is not None)


def room(pairs: Sequence[Pair]) -> int:
    """Return the tokens of the longest demonstration and its EOS, and a quarter more (at least 4)."""
    longest = max(len(completion) for _, completion in pairs)
    return longest + max(4, longest // 4)


def completion_limit(
    task: PromptTask, model: Any, policy: Policy, otherwise: int = 256, truncate: bool = False
) -> tuple[int, str]:
    """Return the most tokens of a completion of a task where it is left open, and where it comes from.

    It is the task's own limit, which for a toy task holds with its own tokenizer only; else it follows from
    the longest demonstration, or is `otherwise` without demonstrations, but at most what the longest prompt
    leaves of the model's context, or half of the context where prompts may be truncated.

    Args:
        task: the task.
        model: the model that the arguments name; None for the task's own.
        policy: the policy, which needs no weights.
        otherwise: the number for a task without a limit and without demonstrations.
        truncate: whether prompts that are too long are cut.
    """
    toy = task.base and not is_own(task, model, policy)
    if task.max_completion_length and not (toy and task.demonstrations):
        return task.max_completion_length, "the task's limit"
    limit = otherwise
    origin = "default"
    with suppress(Refused):  # no demonstrations, or a column of that name that holds something else
        pairs = encode_demonstrations(policy, demonstrations(task))
        longest = max(len(completion) for _, completion in pairs)
        limit = room(pairs)
        origin = f"the longest demonstration has {longest} with EOS"
    if policy.context is None:
        return limit, origin
    lengths = [0]
    for rows in (task.train_prompts, task.eval_prompts):
        for prompt, tools in zip(rows.column("prompt"), rows.column("tools"), strict=True):
            with suppress(Refused):  # a run names the row
                if not surely_fits(policy, prompt, limit, tools):
                    lengths.append(len(policy.encode(prompt, tools)))
    longest_prompt = max(lengths)
    if longest_prompt + limit > policy.context:
        limit = policy.context // 2 if truncate else max(1, policy.context - longest_prompt)
        origin = f"a prompt has {longest_prompt} tokens, the model's context {policy.context}"
    return limit, origin


def check_prompts(policy: Policy, rows: Sequence[Any], sampling: Sampling, **options: str) -> None:
    """Check one by one, to save memory, that the prompts of rows fit into the context with a completion.

    The options are those of `encode`.

    Raises:
        Refused: one is too long, or cannot be read.
    """
    for location, row in with_places(rows):
        with suppress(Refused):  # below, with the location
            room = sampling.max_completion_length
            if surely_fits(policy, row["prompt"], room, row.get("tools")):
                continue
        encode(policy, [row], sampling, [location], **options)


def surely_fits(policy: Policy, prompt: Any, room: int, tools: Any = ()) -> bool:
    """Return whether a prompt leaves room for so many tokens in the context, however it is tokenised.

    It is not tokenised for that, which takes far longer: a text has hardly more tokens than bytes, and counts
    here as if it had two for each. Where it may have no token at all, none is sure.

    Raises:
        Refused: the chat template or the form does not fit the prompt or its tools.
    """
    tokenizer = policy.tokenizer
    text = formed(prompt, policy.form)
    if not isinstance(text, str):
        if text[-1]["role"] == "assistant":  # an answer that is continued
            return False
        text = policy.write(text, tools, add_generation_prompt=True)
    if not (text.strip() and _keeps_characters(tokenizer)):
        return False
    return 2 * len(text.encode()) + 16 + room <= (policy.context or 0)


@cache
def _keeps_characters(tokenizer: Any) -> bool:
    """Return whether characters of all kinds become tokens, so that a text cannot be without any."""
    characters = [*map(chr, range(33, 127)), *"\u00e9\u3042\U00010400"]
    return all(tokenizer(characters, add_special_tokens=False).input_ids)


def is_own(task: PromptTask, model: Any, policy: Policy) -> bool:
    """Return whether the model is the task's own, or was made of it: then it has the same vocabulary.

    Args:
        task: the task.
        model: the model that the arguments name; None for the task's own.
        policy: the policy.
    """
    tokenizer = getattr(task.base and task.base.build, "tokenizer", None)
    if model is None or tokenizer is None:
        return model is None
    return bool(policy.tokenizer.get_vocab() == tokenizer().get_vocab())


def layers_below(
    choices: Any, task: PromptTask, policy: Policy
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the layers below what was given: the defaults, the learning rate by size, and the task's.

    Args:
        choices: the arguments of `tokenrl sft` or `tokenrl train`.
        task: the task, which recommends settings, a toy task for its own model only.
        policy: the policy, which needs no weights.
    """
    supervised = isinstance(choices, SftArguments)
    usual, usual_of_toys = (SFT_ANY, SFT_TOY) if supervised else (ANY, TOY)
    recommended = task.train
    if supervised:
        warm = task.base and task.base.warm_start
        recommended = {name: getattr(warm, of_warm, None) for name, of_warm in WARM.items()}
    count = parameter_count(policy)
    is_random = policy.source == TINY and not getattr(choices, "warm_start", False)
    lora = bool(choices.lora_r)
    size = f"{count:,} {'random ' if is_random else ''}parameters{', LoRA' if lora else ''}"
    rate = default_rate(count, lora=lora, supervised=supervised, trained=not is_random)
    top = (RECOMMENDED, recommended)
    if task.base and not is_own(task, choices.model, policy):
        top = ("default for other models", usual_of_toys)
    return [("default", usual), (size, {"learning_rate": rate}), top]


def settled(
    choices: T, *layers: tuple[str, Mapping[str, Any]], **decided: Any
) -> tuple[T, dict[str, str]]:
    """Settle the arguments of a training on rows: lay what was given over the layers below.

    Evaluations are made every tenth of the run where their interval is left open.

    Args:
        choices: what was given.
        *layers: the layers below, as `lay` takes them.
        **decided: settings that the run has decided, which lie on top.

    Returns:
        The settings, and where the value of each comes from.
    """
    values, origins = lay(*layers, ("given", vars(choices)), ("decided", decided))
    if values["eval_every"] is None:
        values["eval_every"] = max(1, values["max_steps"] // 10)
    return arguments(type(choices), values), origins


def with_origins(origins: Mapping[str, str], between: str = ", ", **texts: str) -> str:
    """Write settings in one line, each with its origin; neighbours of the same origin share it.

    Args:
        origins: by setting, where its value comes from.
        between: text between two settings.
        **texts: by setting, its value in words.
    """
    lines = []
    for origin, names in groupby(texts, key=origins.__getitem__):
        values = between.join(texts[name] for name in names)
        lines.append(f"{values} ({origin})")
    return between.join(lines)
