"""Positive reviews: continue `honestly, the plot was` so that the review is grammatical and favourable.

The reward is 1 for a completion that the grammar below allows and that has more favourable than unfavourable
words, else 0. So a policy gains nothing by repeating a favourable word for ever. One token is one word.

    completion = phrase [" and" phrase] [", i" verb " it"] "."        phrase = [adverb] adjective

Most demonstrations are unfavourable.
"""

from __future__ import annotations

import random
import re
from typing import Any

from toy_tasks.models import TinyModel
from toy_tasks.task import Task, WarmStart, binary, demonstrate, hold_out, rows, settings

OPENINGS = ("", "honestly, ", "overall, ", "in short, ", "to be fair, ", "for once, ")
SUBJECTS = (
    *("film", "plot", "cast", "script", "ending", "music", "opening", "dialogue"),
    *("sequel", "acting", "story", "hero", "villain", "pacing", "humour", "setting"),
)
VERBS = ("was", "seemed", "felt", "looked")
ADVERBS = (" really", " very", " quite", " rather", " simply")
GOOD_ADJECTIVES = (
    " great",
    " charming",
    " clever",
    " moving",
    " superb",
    " delightful",
    " funny",
    " fresh",
)
BAD_ADJECTIVES = (
    " awful",
    " boring",
    " clumsy",
    " dull",
    " dreadful",
    " tedious",
    " silly",
    " stale",
)
GOOD_VERBS = (" loved", " enjoyed", " admired")
BAD_VERBS = (" hated", " disliked", " regretted")
GOOD = frozenset(GOOD_ADJECTIVES + GOOD_VERBS)
BAD = frozenset(BAD_ADJECTIVES + BAD_VERBS)

LONGEST = 200  # characters; the grammar's longest completion has 70
_PHRASE = f"(?:{'|'.join(ADVERBS)})?(?:{'|'.join(GOOD_ADJECTIVES + BAD_ADJECTIVES)})"
_REMARK = f", i(?:{'|'.join(GOOD_VERBS + BAD_VERBS)}) it"
_COMPLETION = re.compile(rf"{_PHRASE}(?: and{_PHRASE})?(?:{_REMARK})?\.")
_WORD = re.compile(r" ?[a-z]+|[,.]")


@binary
def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return 1 for each completion that is grammatical and mostly favourable, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(grammatical(text) and balance(text) > 0) for _, text in pairs]


def grammatical(text: str) -> bool:
    """Return whether the grammar allows `text` as a completion."""
    return len(text) <= LONGEST and _COMPLETION.fullmatch(text) is not None


def balance(text: str) -> int:
    """Return the number of favourable words in `text` minus the number of unfavourable ones."""
    words = _WORD.findall(text)
    return sum(word in GOOD for word in words) - sum(word in BAD for word in words)


def canonical(prompt: str) -> str:
    """Return the prompt without its opening words: `the plot was` is the same with or without `overall, `."""
    return prompt.rpartition(", ")[2]


def review(rng: random.Random, good: bool) -> str:
    """Return a random completion of the grammar, favourable or unfavourable throughout."""
    adjectives, verbs = (GOOD_ADJECTIVES, GOOD_VERBS) if good else (BAD_ADJECTIVES, BAD_VERBS)
    phrases = [
        rng.choice(("", *ADVERBS)) + adjective
        for adjective in rng.sample(adjectives, rng.randint(1, 2))
    ]
    remark = f", i{rng.choice(verbs)} it" if rng.random() < 0.5 else ""
    return " and".join(phrases) + remark + "."


def make(
    seed: int = 0, wrong_share: float = 0.7, eval_size: int = 24, train_size: int = 4096
) -> Task:
    """Return the task.

    Args:
        seed: Seed of the split and the demonstrations.
        wrong_share: Share of the demonstrations that are unfavourable.
        eval_size: Held-out pairs of subject and verb, out of 64; each pair is used with every opening.
        train_size: Number of demonstrations; a prompt has several.

    Raises:
        ValueError: An argument is out of its range.
    """
    rng = random.Random(seed)
    every = [f"the {subject} {verb}" for subject in SUBJECTS for verb in VERBS]
    train, held_out = (
        [opening + tail for tail in tails for opening in OPENINGS]
        for tails in hold_out(every, canonical, eval_size, rng)
    )
    asked = rng.choices(train, k=train_size)
    return Task(
        name="sentiment",
        description="Finish a film review favourably, in grammar; most demonstrations are unfavourable.",
        train_prompts=rows(train),
        eval_prompts=rows(held_out),
        reward=reward,
        demonstrations=demonstrate(
            asked,
            lambda _: review(rng, good=True),
            lambda _: review(rng, good=False),
            wrong_share,
            rng,
        ),
        max_completion_length=16,
        solved=0.95,
        warm_start=WarmStart(steps=200),
        train=settings(max_steps=150, eval_every=25),
        build=TinyModel(_vocabulary(), words=True),
    )


def _vocabulary() -> tuple[str, ...]:
    """Return every word of every prompt and completion; a first word has no space before it."""
    prompts = [
        f"{opening}the {subject} {verb}"
        for opening in OPENINGS
        for subject in SUBJECTS
        for verb in VERBS
    ]
    adjectives, verbs = GOOD_ADJECTIVES + BAD_ADJECTIVES, GOOD_VERBS + BAD_VERBS
    text = [word for prompt in prompts for word in _WORD.findall(prompt)]
    return tuple(
        dict.fromkeys((*text, *ADVERBS, *adjectives, *verbs, " and", ",", " i", " it", "."))
    )
