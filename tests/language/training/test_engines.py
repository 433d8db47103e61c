"""What an engine of one's own returns is checked: a wrong rollout is refused, and a right one is read."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import count
from typing import ClassVar

import pytest
import torch
from folders import read_json
from refusals import refused, stopped
from tiny_models import ENDS, PROMPTS, Engine, letter_task, letters_trained, make_policy, stepped

from tokenrl import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.language.policy.stops import StopStrings
from tokenrl.language.rollout.generator import Abilities, TransformersGenerator
from tokenrl.language.rollout.rollout import COLUMNS
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.language.rollout.scoring import USUAL, Regime, with_missing_fields
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.engines import start_engine
from tokenrl.language.training.settings import task_of

LENGTH, GROUP = 6, 3


class Spoilt(Engine):
    """Returns the most probable tokens where it is asked for them, and spoils what it returns."""

    def __init__(self, policy, spoil):
        super().__init__(policy)
        self.spoil = spoil

    def generate(self, prompt_ids, sampling, draws):
        return self.spoil(super().generate(prompt_ids, sampling, draws))


def sampled(spoil, *, kind=Spoilt, stops=(), **options):
    """What a spoilt engine returns once it is checked, and what it returned."""
    policy = make_policy(initializer_range=0.1)
    policy.eos_ids, seen = ENDS, []
    if stops:
        policy.stops = StopStrings(policy.tokenizer, stops)

    def make(policy, _):
        return kind(policy, lambda rollout: seen.append(spoil(rollout)) or seen[0])

    engine = start_engine(make, policy, Regime(), None)
    sampling = Sampling(LENGTH, GROUP, step=1, **options)
    ids = [policy.encode(prompt) for prompt in PROMPTS]
    rollout = engine.generate(ids, sampling, uniforms("training", sampling, range(4)))
    engine.check(with_missing_fields(policy, rollout, USUAL, sampling), sampling)
    return rollout, seen[0]


def changed(name, change):
    """Change one column of a rollout."""
    return lambda r: dataclasses.replace(r, **{name: change(getattr(r, name))})


def at_a_token(value):
    """Put a number at the first token of row 4."""

    def change(x):
        x = x.clone()
        x[4].view(-1)[0] = value
        return x

    return change


def as_it_is(rollout):
    return rollout


def column_faults():
    """A wrong change of each column that an engine fills, as its declaration says."""
    for name, column in COLUMNS.items():
        of_another_kind = torch.Tensor.bool if column.dtype == torch.long else torch.Tensor.long
        faults = {
            "short": lambda x: x[:-1],
            "flat": lambda x: x[..., None],
            "kind": of_another_kind,
            "None": lambda x: None,
        }
        if column.low is not None:
            faults["too large"] = at_a_token(min(column.high, 1000) + 1)
        if column.low is not None and math.isfinite(column.low):
            faults["too small"] = at_a_token(column.low - 1)
        if column.dtype.is_floating_point:
            faults["not finite"] = at_a_token(math.nan)
        for fault, change in faults.items():
            yield pytest.param(name, changed(name, change), id=f"{name} {fault}")


@pytest.mark.parametrize(("name", "spoil"), [*column_faults()])
def test_each_column_is_what_it_is_declared_to_be(name, spoil):
    words = rf"^Spoilt.generate returned a rollout that cannot be used.*\b{name}\b"
    with stopped(words):
        sampled(spoil)


def cut_after(tokens):
    """Completions that are cut, told as if they had reached the limit."""

    def cut(rollout):
        mask = rollout.mask & (torch.arange(rollout.mask.shape[1]) < tokens)
        truncated = rollout.truncated | (rollout.mask.sum(1) > tokens)
        return dataclasses.replace(rollout, mask=mask, truncated=truncated)

    return cut


def padded_on_the_right(rollout):
    mask = rollout.prompt_mask
    return dataclasses.replace(
        rollout, prompt_mask=mask.flip(1), prompt_ids=rollout.prompt_ids.flip(1)
    )


MASK = r"mask must be True on 1 to 6 tokens, up to the first end; in row "
CUT = "truncated must be True where 6 tokens have no end, and False elsewhere; in row "

WRONG = {
    "no rollout": (lambda r: None, "it is None, not a Rollout"),
    "a column of later": (lambda r: dataclasses.replace(r, turns=torch.zeros(12)), "turns is"),
    "rows exchanged": (changed("prompt_index", lambda x: x.flip(0)), "must be the prompts in order"),
    "prompts on the left": (padded_on_the_right, "prompt_mask must be .* padded on the left"),
    "a prompt cut": (changed("prompt_mask", lambda x: x.roll(1, 1)), "prompt_mask must be True on"),
    "another prompt": (changed("prompt_ids", lambda x: x + 1), "prompt_ids must be those of"),
    "empty": (changed("mask", lambda x: x & (torch.arange(12) != 5)[:, None]), MASK + "5 of 12 it is"),
    "too long": (lambda r: changed("mask", torch.ones_like)(r.cut(r.prompt_ids.shape[1], 12)), MASK),
    "a gap": (changed("mask", lambda x: x & (torch.arange(6) != 1)), MASK),
    "behind the end": (changed("mask", torch.ones_like), MASK),
    "all truncated": (changed("truncated", torch.ones_like), CUT),
    "cut early": (cut_after(3), CUT + r"\d+ of 12 it is True"),
    "zeros": (changed("sampling_logprobs", torch.zeros_like), "differ from the trainer's by"),
    "of a row": (
        changed("sampling_logprobs", lambda x: x - 9 * (torch.arange(12) == 7)[:, None]),
        "row 7 of 12, so these tokens are of other weights, another distribution or another prompt",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_rollout_is_told_in_words(spoil, words):
    with stopped(rf"^Spoilt.generate returned a rollout .*{words}"):
        sampled(spoil)


def behind(name, value):
    """Put a number behind the end of each completion, where nothing counts."""
    return lambda r: changed(name, lambda x: x.masked_fill(~r.mask, value))(r)


RIGHT = {
    "log-probabilities of 64 bits": changed("sampling_logprobs", torch.Tensor.double),
    "rounding above 0": changed("sampling_logprobs", lambda x: x + 1e-7),
    "anything behind the end": behind("sampling_logprobs", math.nan),
    "any id behind the end": behind("completion_ids", -100),
    "a wider table": lambda r: r.cut(r.prompt_ids.shape[1], LENGTH + 4),
    "with a graph": changed("sampling_logprobs", lambda x: x.requires_grad_()),
}


@pytest.mark.parametrize("spoil", RIGHT)
def test_a_right_rollout_is_read_as_training_reads_it(spoil):
    expected = sampled(as_it_is)[0]
    rollout, returned = sampled(RIGHT[spoil])
    assert rollout.columns().keys() == expected.columns().keys()
    for name, x in rollout.columns().items():
        torch.testing.assert_close(x, getattr(expected, name), check_dtype=False, atol=1e-6, rtol=0)
        # a buffer of its own
        assert not x.requires_grad and x.data_ptr() != getattr(returned, name).data_ptr()


def test_a_completion_that_goes_on_behind_a_stop_string_is_wrong():
    sampled(as_it_is, stops=["e"])

    def deaf(policy, spoil):
        return Spoilt(dataclasses.replace(policy, stops=None), spoil)

    with stopped("mask must be True"):
        sampled(as_it_is, kind=deaf, stops=["e"])


class Limited(Engine):
    """An engine that says what it can do."""

    abilities = Abilities(
        exact=False,
        agrees=True,
        distributed=False,
        min_p_last=False,
        temperatures=(0.5, 1.5),
        options=("temperature", "top_p", "min_p"),
    )

    def __init__(self, policy, _):
        super().__init__(policy)


class Rough(Limited):
    gap = -0.04


class Wordy(Limited):
    abilities: ClassVar = {"exact": False}


def ends(completions, **_):
    return [text.count("a") - len(text) / 9 for text in completions]


class Failing(Engine):
    """Fails at one call of a method."""

    def __init__(self, policy, method, call, error):
        super().__init__(policy)
        works, calls = getattr(self, method), count(1)

        def fails(*arguments):
            if next(calls) == call:
                raise error
            return works(*arguments)

        setattr(self, method, fails)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 2}, r"temperature was given as 2; Limited samples from 0\.5 to 1\.5"),
        ({"top_p": 0.9, "min_p": 0.1}, "Limited applies min_p before top_p"),
        ({"top_k": 5}, "top_k was given as 5; Limited does not sample with it"),
        (
            {"estimator": Estimator(importance_centre=True)},
            "probabilities of all tokens, which only the generator transformers returns",
        ),
        ({"generator": Wordy}, "An engine has abilities {'exact': False}"),
        ({"generator": Rough}, r"differ from the trainer's by 0\.04 nats per token"),
        ({"generator": lambda policy, _: None}, "'NoneType' object has no attribute 'sync'"),
        ({"generator": lambda policy: None}, "could not be made: it raised TypeError"),
        (
            {"generator": lambda p, _: Engine(dataclasses.replace(p, eos_ids=()))},
            "mask must be True",
        ),
    ],
)
def test_an_engine_is_held_to_its_abilities_before_the_first_step(tmp_path, options, words):
    with refused(words):
        letters_trained(tmp_path, letter_task(ends), **{"generator": Limited} | options)


def test_a_run_with_an_inexact_engine_says_so_and_needs_one_process(tmp_path, said):
    options = {"generator": Limited, "quiet": False, "max_completion_length": 6}
    letters_trained(tmp_path, letter_task(ends), max_steps=1, **options)
    assert "by Limited, with random numbers of its own: the run is not bit-exact" in said()
    letters_trained(tmp_path, letter_task(ends), max_steps=2, resume="auto", **options)
    assert "Limited has random numbers of its own" in said()
    with refused("Limited samples in a run of one process, and this run has 3"):
        task_of(TrainArguments(task=letter_task(ends), generator=Limited), 3)


@pytest.mark.parametrize(
    ("method", "call", "kind"),
    [
        ("generate", 1, Refused),
        ("generate", 3, Stopped),  # after both evaluations before the first step
        ("sync", 3, Stopped),
    ],
)
def test_an_engine_that_fails_is_told_in_words(tmp_path, method, call, kind):
    def make(policy, _):
        return Failing(policy, method, call, SystemExit(0))

    with pytest.raises(kind, match=f"Failing.{method} failed: it raised SystemExit: 0") as caught:
        letters_trained(tmp_path, letter_task(ends), generator=make)
    assert caught.value.exit_code == (2 if kind is Refused else 1)


def test_an_engine_that_cannot_be_closed_does_not_fail_the_run(tmp_path):
    def make(policy, _):
        return Failing(policy, "close", 1, SystemExit(1))

    options = {"generator": make, "quiet": False, "max_steps": 1, "eval_generations": 0}
    with pytest.warns(UserWarning, match="Failing.close failed"):
        result = letters_trained(tmp_path, letter_task(ends), **options)
    assert (result.exit_code, result.exit_reason) == (0, "finished")


class Lying(TransformersGenerator):
    """Fills every column as the default generator does, and changes its samples from some call on."""

    abilities = Abilities()
    since = 3

    def __init__(self, policy, _):
        super().__init__(policy)
        object.__setattr__(self, "calls", count(1))

    def generate(self, prompt_ids, sampling, draws):
        if draws is None:
            return super().generate(prompt_ids, sampling, self.greedy(len(prompt_ids), sampling))
        rollout = super().generate(prompt_ids, sampling, draws)
        return rollout if next(self.calls) <= self.since else self.lie(rollout)

    def greedy(self, prompts, sampling):
        return None

    def lie(self, rollout):
        return rollout


class Ignored(Lying):
    since = 0

    def lie(self, rollout):
        names = ("logprobs", "entropy", "score_norms", "hidden")
        lies = {name: 3 * x for name, x in rollout.columns().items() if name in names}
        return dataclasses.replace(rollout, **lies)


@pytest.mark.parametrize(
    "estimator",
    [
        Estimator.preset("a2c", beta=0.1, kl_placement="reward"),
        Estimator(beta=0.1, baseline="optimal"),
    ],
    ids=["a2c", "optimal"],
)
def test_what_the_trainer_computes_itself_is_its_own_whatever_an_engine_says(estimator):
    results = []
    for kind in (Lying, Ignored):
        engine = partial(start_engine, kind, regime=Regime(), rows_at_once=None)
        slope, record, _ = stepped(estimator, engine=engine)
        results.append((slope.tolist(), record.metrics))
    assert results[0] == results[1]


class Rounded(Lying):
    """Agrees in its first calls."""

    abilities = Abilities(agrees=True)
    lie = staticmethod(changed("sampling_logprobs", lambda x: x - 0.2))


class Early(Lying):
    lie = staticmethod(cut_after(1))


class Improbable(Lying):
    """Its greedy completions are samples, and improbable ones, after the evaluation before training."""

    def greedy(self, prompts, sampling):
        if next(self.calls) > 2:
            return torch.full((prompts, sampling.max_completion_length), 0.999)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Rounded, r"by 0\.2 nats per token"),
        (Early, "truncated must be True where 4 tokens have no end"),
        (Improbable, r"\d+% of its greedy tokens are not the most probable"),
    ],
)
def test_an_engine_that_lies_after_its_first_rollouts_is_stopped(tmp_path, kind, words):
    options = {"learning_rate": 0.5, "max_steps": 8, "eval_generations": 2, "eval_every": 3}
    with stopped(rf"^At step [1-8]: \w+.generate returned .*{words}"):
        letters_trained(tmp_path, letter_task(ends), generator=kind, **options)


class Later(Lying):
    def lie(self, rollout):
        row = torch.arange(len(rollout)) == 1
        return dataclasses.replace(
            rollout, sampling_logprobs=rollout.sampling_logprobs - 0.8 * row[:, None]
        )


def test_an_engine_whose_numbers_become_others_is_told(tmp_path):
    """Old weights may be as far away, so a run goes on."""
    options = {"estimator": Estimator(importance="token"), "learning_rate": 0.5, "max_steps": 8}
    letters_trained(tmp_path, letter_task(ends), generator=Later, eval_generations=2, **options)
    warnings = " ".join(read_json(tmp_path / "summary.json")["warnings"])
    assert "and by 0.4 in row 1 of" in " ".join(warnings.split())


class Ahead(Engine):
    """Notes what it is told of the next step, and does to it and to torch what it should not."""

    announced: ClassVar[list] = []

    def __init__(self, policy, _):
        super().__init__(policy)
        self.told, self.due = None, None

    def announce(self, prompts):
        self.told = [self.policy.encode(row["prompt"]) for _, row in prompts]
        for _, row in prompts:
            row["prompt"] = "bad"
        torch.set_grad_enabled(False)

    def generate(self, prompt_ids, sampling, draws):
        if sampling.step and draws is not None:
            self.announced.extend([] if self.due is None else [self.due == prompt_ids])
            self.told, self.due = None, self.told
        return super().generate(prompt_ids, sampling, draws)


class Quiet(Ahead):
    def announce(self, prompts):
        """Take no notice."""


@pytest.mark.parametrize("zero_spread", ["keep", "refill"])
def test_what_is_announced_is_a_copy_of_what_is_sampled_next(tmp_path, zero_spread):
    rows = []
    Ahead.announced.clear()
    for kind in (Ahead, Quiet)[: 1 + (zero_spread == "keep")]:
        folder = tmp_path / kind.__name__
        estimator = Estimator(zero_spread=zero_spread)
        options = {"generator": kind, "estimator": estimator, "sync_every": 2}
        letters_trained(folder, letter_task(ends), **options)
        rows.append((folder / "metrics.jsonl").read_bytes())
    # the prompts of a step that may be refilled are not known before it
    expected = [True, True] if zero_spread == "keep" else []
    assert rows[0] == rows[-1] and Ahead.announced == expected


class Ending(Ahead):
    def announce(self, prompts):
        next(iter(()))


def test_an_iterator_that_ends_in_an_engine_is_its_failure(tmp_path):
    with stopped(r"Ending\.announce failed: it raised StopIteration"):
        letters_trained(tmp_path, letter_task(ends), generator=Ending, sync_every=2)
