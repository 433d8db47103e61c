"""Makes the prompt that the teacher of a run reads in place of the policy's, such as one with the right answer.

It comes from a template, from a column of the data, or from a user's function of the group's other completions.
Completions are scored behind it, token by token as they were sampled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenrl.errors import Placed, Refused, with_places
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.prompts import Prompt
from tokenrl.language.rewards.calls import accepted_arguments
from tokenrl.language.rollout.rewarded import Rewarded, Row, texts_of
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.supervised.defaults import check_prompts
from tokenrl.language.tasks.sources import as_prompt, fault_of_prompt
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.tasks.templates import filled
from tokenrl.language.training.arguments import KlArguments
from tokenrl.names import NamedFunction
from tokenrl.user_code import copied, guarded

COLUMN = "teacher_prompt"
"""Column of the data that holds what the teacher reads."""
SHORTER = "the teacher less to read, as its prompts are never cut"
"""What helps against a prompt of the teacher that is too long: cut on the left, it would lose what it adds."""
OF_OTHERS = ("prompt", "row", "completions", "rewards")
OF_ITSELF = ("completion", "reward")
"""The keywords of a user's function: about the prompt and the other rows of its group, and about the row itself."""


@dataclass(frozen=True)
class TeacherPrompts:
    """How the prompts of a teacher are made.

    Attributes:
        name: the template, the column or the function in words.
        template: makes a text from the columns of a row; None for a function or the column.
        function: the user's function; None for a template or the column.
        keywords: the keywords that it takes.
    """

    name: str
    template: str | None = None
    function: Any = None
    keywords: Sequence[str] = ()

    def of_row(self, row: Row, prompt: Prompt, location: str = "a row") -> Prompt:
        """Return what a template or the column gives in place of the prompt of a row.

        Raises:
            Refused: the template cannot be filled, or the column holds no prompt.
        """
        source = f"{self.name}: the prompt of {location}"
        if self.template is None:
            return in_place(prompt, row.get(COLUMN), source)
        text = prompt if isinstance(prompt, str) else prompt[last_of_user(prompt)]["content"]
        return in_place(prompt, filled(self.template, {**row, "prompt": text}, source)[0], source)

    def check(self, policy: Policy, rows: Sequence[Row], sampling: Sampling) -> None:
        """Check the prompts of rows of the data, which must leave room for a completion; a function has none yet.

        Raises:
            Refused: one cannot be made or read, or is too long; the message says of which row.
        """
        if self.function is not None:
            return
        read = [
            Placed(
                {**row, "prompt": self.of_row(row, row["prompt"], location)},
                f"{location}, for the teacher",
            )
            for location, row in with_places(rows)
        ]
        sampling = replace(sampling, truncate_prompts=False)
        check_prompts(policy, read, sampling, remedy=SHORTER)

    def of(self, policy: Policy, rows: Rewarded, sampling: Sampling) -> list[list[int]]:
        """Return the ids of what the teacher reads before each of N completions, which have their rewards.

        Args:
            policy: encodes the prompts, and knows the context of both models.
            rows: the rows; the G of a prompt stand together.
            sampling: how they were sampled.

        Raises:
            Refused: a prompt cannot be made or read, or is too long.
            Stopped: the user's function failed.
        """
        openings = rows.openings or [(row["prompt"], row.get("tools")) for row in rows.data]
        prompts, tools = zip(*openings, strict=True)
        contents: Iterable[Prompt] = map(self.of_row, rows.data, prompts)
        if self.function is not None:
            contents = self._called(policy, rows, sampling.group_size, prompts)
        read = zip(contents, tools, strict=True)
        data = [{"prompt": content, "tools": described} for content, described in read]
        length = sampling.max_completion_length
        if rows.openings is not None:  # what the environment wrote counts too
            length = rows.mask.shape[1]
        whole = replace(sampling, max_completion_length=length, truncate_prompts=False)
        return encode(policy, data, whole, [self.name] * len(data), remedy=SHORTER)

    def _called(
        self, policy: Policy, rows: Rewarded, size: int, prompts: Sequence[Prompt]
    ) -> list[Prompt]:
        """Return what the user's function gives in place of each row's prompt."""
        texts = texts_of(policy, rows)
        rewards = rows.reward_list()
        contents = []
        with guarded(f"{self.name} failed"):
            for i, prompt in enumerate(prompts):
                first = i - i % size
                siblings = [j for j in range(first, first + size) if j != i]
                columns = {
                    "prompt": prompt,
                    "row": rows.data[i],
                    "completions": [texts[j] for j in siblings],
                    "rewards": [rewards[j] for j in siblings],
                    "completion": texts[i],
                    "reward": rewards[i],
                }
                allowed = {name: columns[name] for name in self.keywords}
                content = self.function(**copied(allowed))
                contents.append(in_place(prompt, copied(content), self.name))
        return contents


def teacher_prompts(args: KlArguments, task: PromptTask) -> TeacherPrompts | None:
    """Return how the teacher's prompts are made; None if it reads those of the policy.

    Raises:
        Refused: several ways are given, the first prompt cannot be made, or a function takes what it must not see.
    """
    if args.teacher is None:
        return None
    rows = task.train_prompts
    function: Any = args.teacher_context
    sources = {
        f"teacher_template {args.teacher_template!r}": args.teacher_template,
        f"teacher_context {getattr(function, '__name__', function)}": function,
        f"the column {COLUMN}": COLUMN if COLUMN in rows.columns else None,
    }
    names = [name for name, source in sources.items() if source is not None]
    if len(names) > 1:
        raise Refused(f"The teacher reads one prompt: leave out all but one of {', '.join(names)}.")
    if not names:
        return None
    if function is not None:
        function = NamedFunction(function).load() if isinstance(function, str) else function
        keywords = keywords_of(function, args.allow_own_feedback)
        return TeacherPrompts(names[0], None, function, keywords)
    prompts = TeacherPrompts(names[0], args.teacher_template)
    prompts.of_row(rows[0], rows[0]["prompt"])
    return prompts


def keywords_of(function: Callable[..., Any], of_own: bool) -> list[str]:
    """Return the keywords that a user's function takes; with **kwargs those about other rows.

    Args:
        function: the function.
        of_own: whether it may take those about the row itself.

    Raises:
        Refused: a parameter is none of them.
    """
    of_itself = [name for name in OF_ITSELF if name in inspect.signature(function).parameters]
    if of_itself and not of_own:
        raise Refused(
            f"The teacher_context takes {' and '.join(of_itself)} of the row itself. The sampled and the closed form "
            "of distillation then compute different things, and neither is the gradient of a KL between two policies, "
            "as what such a teacher says of the first token depends on the last. Leave them out, or give "
            "allow_own_feedback (--allow-own-feedback) all the same."
        )
    available = dict.fromkeys([*OF_OTHERS, *of_itself])
    return accepted_arguments(function, "The teacher_context", available)


def in_place(prompt: Prompt, content: Any, source: str) -> Prompt:
    """Return what is read in place of a prompt; a text takes the place of that of a chat's last message of the user.

    Raises:
        Refused: it is neither text nor chat messages; `source` says where it is from.
    """
    content = as_prompt(content)
    if fault := fault_of_prompt(content):
        raise Refused(f"{source}: {fault}; a teacher reads text, or a list of chat messages.")
    if isinstance(prompt, str) or not isinstance(content, str):
        return content
    turns = [*prompt]
    last = last_of_user(prompt)
    turns[last] = {**turns[last], "content": content}
    return turns


def last_of_user(prompt: Sequence[Row]) -> int:
    """Return the place of the last message of the user in chat messages; of the last one where there is none."""
    return max((i for i, turn in enumerate(prompt) if turn["role"] == "user"), default=-1)
