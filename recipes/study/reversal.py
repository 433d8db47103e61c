"""The token reversal of arXiv 2604.06159 (table 3): a text of 0 and 1 is written backwards, without an end token.

Every text of a length is a training prompt and a held-out prompt too, as they draw texts at random for both. The rule
leaves the end of a completion no choice, which is the same as none. Their model has learnt positions; this one rotates.
"""

from itertools import product

from toy_tasks import reverse_text
from toy_tasks.models import TinyModel
from toy_tasks.task import Task, binary, rows


@binary
def exact(prompts, completions, **columns):
    """Return 1 where the whole text is right, else 0."""
    return [float(share == 1) for share in reverse_text.reward(prompts, completions)]


def rule(row):
    """Return the completions that a prompt allows: as many characters as it has before its last, as a pattern."""
    return f"[01]{{{len(row['prompt']) - 1}}}"


def task(length):
    """Return the task of texts of a length; with `--reward toy_tasks.reverse_text:reward` each token counts."""
    texts = ["".join(x) for x in product("01", repeat=length)]
    prompts = rows(f"{text}>" for text in texts)
    return Task(
        name=f"reversal of {length}",
        description=f"Write {length} characters backwards.",
        train_prompts=prompts,
        eval_prompts=prompts,
        reward=exact,
        demonstrations=[],
        max_completion_length=length + 1,
        solved=0.99,
        warm_start=None,
        train={},
        build=TinyModel(("0", "1", ">"), hidden=64, heads=2),
    )


seven, eight = task(7), task(8)
