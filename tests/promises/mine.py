"""The user's code of the matrix: a function for each capability that calls one, as a user would write it.

Where a file `rude` lies in the folder, each call also spoils what it was given and changes switches of its libraries.
Where a file `fails` lies there, each call raises an error.
"""

from __future__ import annotations

import functools
import os
import random

import numpy as np
import torch

from tokenrl.language import Automaton


def usual(function):
    """Let a function behave as badly as code can, where a file asks for it."""

    @functools.wraps(function)
    def call(*args, **options):
        if os.path.exists("fails"):
            raise ValueError("told why")
        result = function(*args, **options)
        if os.path.exists("rude"):
            for value in (*args, *options.values()):
                spoil(value)
            torch.set_num_threads(2)
            torch.set_grad_enabled(False)
            np.seterr(all="raise")
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(1)
        return result

    return call


def spoil(value):
    if isinstance(value, np.ndarray | torch.Tensor):
        value[...] = 1
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            spoil(part)
        value.clear()


@usual
def reward(completions, **columns):
    return scores_of(completions)


def scores_of(completions):
    return [(len({*text}) + 2 * text.count("a")) / 15 for text in completions]


@usual
def shorter(completions, **columns):
    return [1 / (1 + len(text)) for text in completions]


@usual
def silent(completions, **columns):
    """Abstains from texts with a t."""
    scores = scores_of(completions)
    return [None if "t" in c else x for c, x in zip(completions, scores, strict=True)]


@usual
def broken(completions, **columns):
    """Raises an error where a text has two t."""
    for text in completions:
        if text.count("t") > 1:
            raise ValueError("no text with two t")
    return scores_of(completions)


class Counting:
    """Scores a text the lower, the more often it was scored before."""

    __name__ = "counting"

    def __init__(self):
        self.times = {}

    @usual
    def __call__(self, completions, **columns):
        scores = []
        for text, score in zip(completions, scores_of(completions), strict=True):
            self.times[text] = self.times.get(text, 0) + 1
            scores.append(score / self.times[text])
        return scores

    def state_dict(self):
        return {"times": self.times}

    def load_state_dict(self, state):
        self.times = dict(state["times"])


counting = Counting()


@usual
def baseline(totals, group_size, mask, valid):
    return 0.5 * totals.view(-1, group_size).mean(1).repeat_interleave(group_size)


@usual
def advantage(
    totals, group_size, components, logprobs, sampling_logprobs, entropy, lengths, turns, prompt=()
):
    """The totals less an advantage which each number of the row changes a little, and the text of its prompt."""
    middle = totals.view(-1, group_size).mean(1).repeat_interleave(group_size)
    first = components.nan_to_num()[:, 0] - sampling_logprobs.sum(1) / 50
    seen = logprobs.sum(1) / 40 + entropy.sum(1) / 30 + lengths / 20 + turns / 10 + first / 5
    letters = torch.tensor([len(text) / 60 for text in prompt] or 0.0)
    return middle + 0.3 * (seen + letters)


@usual
def weights(completions, means, variances):
    return 1 + means + variances


@usual
def context(prompt, completions, rewards):
    return f"{prompt} {completions[0]}"


@usual
def rule(row):
    """Texts in which letters of two halves of the alphabet alternate, with an even length for some rows."""
    halves = [letters(0), letters(1)]
    edges = [dict.fromkeys(halves[0], 1), dict.fromkeys(halves[1], 0)]
    return Automaton(edges, [0] if "t" in row["prompt"] else [0, 1])


def letters(half):
    every = sorted("acdeghilmnostuvwx ")
    return every[half::2]


class Turns:
    """An environment of two turns whose text depends on the seed."""

    @usual
    def reset(self, seed=None):
        self.letter = random.Random(seed).choice("abcdet")
        self.turn = 0
        return self.letter, {}

    @usual
    def step(self, text):
        self.turn += 1
        return f" {self.letter}", float(self.letter in text), self.turn == 2, False, {}
