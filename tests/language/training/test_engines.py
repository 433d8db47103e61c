"""What an engine of one's own returns is checked: a wrong rollout is refused, and a right one is read."""

from __future__ import annotations

import dataclasses
import math
from itertools import count
from typing import ClassVar

import pytest
import torch
from folders import read_json
from refusals import refused, stopped
from tiny_models import ENDS, PROMPTS, Engine, letter_task, letters_trained, make_policy

from tokenrl import Estimator
from tokenrl.errors import Refused, Stopped, describe
from tokenrl.language.policy.stops import StopStrings
from tokenrl.language.rollout.generator import Abilities, TransformersGenerator
from tokenrl.language.rollout.rollout import COLUMNS, listed, tokens_of
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


WHOLE = {"keep_tokens": 96}
LISTED = {"keep_tokens": 5}


def sampled(spoil, *, kind=Spoilt, generations=GROUP, stops=(), **options):
    """What a spoilt engine returns once it is checked, and what it returned."""
    policy = make_policy(initializer_range=0.1)
    policy.eos_ids, seen = ENDS, []
    if stops:
        policy.stops = StopStrings(policy.tokenizer, stops)
    engine = start_engine(
        lambda policy, _: kind(policy, lambda r: seen.append(spoil(r)) or seen[0]),
        policy,
        Regime(),
        None,
    )
    sampling = Sampling(LENGTH, generations, step=1, **options)
    ids = [policy.encode(prompt) for prompt in PROMPTS]
    rollout = engine.generate(ids, sampling, uniforms("training", sampling, range(4)))
    if generations:
        scored = with_missing_fields(policy, rollout, USUAL, sampling)
        engine.check(scored, sampling)
    return rollout, seen[0]


def as_it_is(rollout):
    return rollout


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


def of_another_kind(x):
    return x.long() * 2 if x.dtype == torch.bool or x.is_floating_point() else x.double()


FAULTS = {
    "None": lambda x: None,
    "a list": torch.Tensor.tolist,
    "a row missing": lambda x: x[:-1],
    "another axis": lambda x: x[..., None],
    "another kind of numbers": of_another_kind,
}


def column_faults():
    """A wrong change of each column that an engine fills, as its declaration says."""
    for name, column in COLUMNS.items():
        faults = dict(FAULTS)
        if name == "sampling_distribution":  # an engine need not return it
            del faults["None"]
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
        sampled(spoil, **LISTED)


def longer(rollout):
    """All completions go on for as long again."""
    ids, logprobs = (
        torch.cat([x, x], 1) for x in (rollout.completion_ids, rollout.sampling_logprobs)
    )
    mask = torch.ones_like(ids, dtype=torch.bool)
    return dataclasses.replace(rollout, mask=mask, completion_ids=ids, sampling_logprobs=logprobs)


def without_ends(rollout):
    """Leave the ends out, as engines do that return a text without its last token."""
    last = rollout.mask.sum(1) - 1
    ended = (~rollout.truncated & (last > 0))[:, None]
    off = ended & (torch.arange(rollout.mask.shape[1]) == last[:, None])
    return dataclasses.replace(rollout, mask=rollout.mask & ~off)


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


def beside_the_sampled(rollout, others):
    """Other log-probabilities [N, T, V] than the sampler's for all tokens but the sampled ones."""
    sampled = rollout.sampling_logprobs[..., None]
    whole = others.scatter(2, rollout.completion_ids[..., None], sampled)
    ids = rollout.sampling_distribution[..., 0]
    return dataclasses.replace(rollout, sampling_distribution=listed(ids, whole))


def unnormalised(rollout):
    return beside_the_sampled(rollout, rollout.sampling_distribution[..., 1] - 3)


def uniform(rollout):
    """The sampled token has its probability, and all others share the rest."""
    shape = rollout.sampling_distribution.shape[:3]
    rest = torch.log1p(-rollout.sampling_logprobs.exp()) - math.log(shape[2] - 1)
    return beside_the_sampled(rollout, rest[..., None].expand(shape))


MASK = r"mask must be True on 1 to 6 tokens, up to the first end; in row "
CUT = "truncated must be True where 6 tokens have no end, and False elsewhere; in row "
SUM = "sampling_distribution must be of log-probabilities that add up to 1 and agree"
TOKENS = "sampling_distribution must be of different tokens, from 0 to 95"


def tokens(change):
    """Change the ids of the tokens that are listed."""
    name = "sampling_distribution"
    return changed(name, lambda x: listed(change(tokens_of(x)[0]), x[..., 1]))


WRONG = {
    "no rollout": (lambda r: None, "it is None, not a Rollout"),
    "a column of later": (lambda r: dataclasses.replace(r, turns=torch.zeros(12)), "turns is"),
    "rows exchanged": (changed("prompt_index", lambda x: x.flip(0)), "must be the prompts in order"),
    "prompts on the left": (padded_on_the_right, "prompt_mask must be .* padded on the left"),
    "a prompt cut": (changed("prompt_mask", lambda x: x.roll(1, 1)), "prompt_mask must be True on"),
    "another prompt": (changed("prompt_ids", lambda x: x + 1), "prompt_ids must be those of"),
    "empty": (changed("mask", lambda x: x & (torch.arange(12) != 5)[:, None]), MASK + "5 of 12 it is"),
    "too long": (longer, MASK),
    "a gap": (changed("mask", lambda x: x & (torch.arange(6) != 1)), MASK),
    "behind the end": (changed("mask", torch.ones_like), MASK),
    "without ends": (without_ends, CUT),
    "nothing truncated": (changed("truncated", torch.zeros_like), CUT),
    "all truncated": (changed("truncated", torch.ones_like), CUT),
    "cut early": (cut_after(3), CUT + r"\d+ of 12 it is True"),
    "zeros": (changed("sampling_logprobs", torch.zeros_like), "differ from the trainer's by"),
    "of a row": (
        changed("sampling_logprobs", lambda x: x - 9 * (torch.arange(12) == 7)[:, None]),
        "row 7 of 12, so these tokens are of other weights, another distribution or another prompt",
    ),
}  # fmt: skip
WRONG_WHOLE = {
    "logits": (unnormalised, SUM),
    "other tokens": (tokens(lambda x: x.roll(1, 2)), SUM),
    "uniform": (uniform, "of the probability on other tokens than the trainer's"),
}
WRONG_LISTED = {
    "one token": (tokens(lambda x: x[..., :1].expand(x.shape)), TOKENS),
    "no such token": (tokens(lambda x: x + 91), TOKENS),
    "other tokens": (tokens(lambda x: x.roll(1, 2)), SUM),
    "too probable": (
        changed("sampling_distribution", lambda x: x + torch.tensor([0, 1.5])),
        SUM,
    ),
}


@pytest.mark.parametrize(
    ("spoil", "words", "options"),
    [
        pytest.param(*case, options, id=name)
        for cases, options in ((WRONG, {}), (WRONG_WHOLE, WHOLE), (WRONG_LISTED, LISTED))
        for name, case in cases.items()
    ],
)
def test_a_wrong_rollout_is_told_in_words(spoil, words, options):
    with stopped(rf"^Spoilt.generate returned a rollout .*{words}"):
        sampled(spoil, **options)


def behind(name, value):
    """Put a number behind the end of each completion, where nothing counts."""
    return lambda r: changed(name, lambda x: x.masked_fill(~r.mask, value))(r)


RIGHT = {
    "as it is": as_it_is,
    "log-probabilities of 64 bits": changed("sampling_logprobs", torch.Tensor.double),
    "rounding above 0": changed("sampling_logprobs", lambda x: x + 1e-7),
    "anything behind the end": behind("sampling_logprobs", math.nan),
    "any id behind the end": behind("completion_ids", -100),
    "a wider table": lambda r: r.cut(r.prompt_ids.shape[1], LENGTH + 4),
    "with a graph": changed("sampling_logprobs", lambda x: x.requires_grad_()),
}


@pytest.mark.parametrize("options", [{}, WHOLE, LISTED])
@pytest.mark.parametrize("spoil", RIGHT.values(), ids=RIGHT)
def test_a_right_rollout_is_read_as_training_reads_it(spoil, options):
    expected = sampled(as_it_is, **options)[0]
    rollout, returned = sampled(spoil, **options)
    assert rollout.columns().keys() == expected.columns().keys()
    for name, x in rollout.columns().items():
        torch.testing.assert_close(x, getattr(expected, name), check_dtype=False, atol=1e-6, rtol=0)
        # a buffer of its own
        assert not x.requires_grad and x.data_ptr() != getattr(returned, name).data_ptr()


def test_greedy_completions_are_of_one_row_each():
    assert len(sampled(as_it_is, generations=0)[0]) == 4


def test_a_completion_that_goes_on_behind_a_stop_string_is_wrong():
    sampled(as_it_is, stops=["e"])

    def deaf(policy, spoil):
        return Spoilt(dataclasses.replace(policy, stops=None), spoil)

    with stopped("mask must be True"):
        sampled(as_it_is, kind=deaf, stops=["e"])


class Limited(Engine):
    """An engine that says what it can do."""

    abilities = Abilities(
        exact=False, agrees=True, distributed=False, min_p_last=False, temperatures=(0.5, 1.5)
    )

    def __init__(self, policy, _):
        super().__init__(policy)


class Rough(Limited):
    gap = -0.04


class Wordy(Limited):
    abilities: ClassVar = {"exact": False}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 2}, r"temperature was given as 2; Limited samples from 0\.5 to 1\.5"),
        ({"top_p": 0.9, "min_p": 0.1}, "Limited applies min_p before top_p"),
        ({"generator": Wordy}, "An engine has abilities {'exact': False}"),
        ({"generator": Rough}, r"differ from the trainer's by 0\.04 nats per token"),
    ],
)
def test_an_engine_is_held_to_its_abilities(tmp_path, options, words):
    options = {"generator": Limited, "max_steps": 2, "quiet": False} | options
    with refused(words):
        letters_trained(tmp_path, letter_task(ends), **options)


def test_a_run_with_an_inexact_engine_says_so_and_needs_one_process(tmp_path, said):
    options = {"generator": Limited, "quiet": False, "max_completion_length": 6}
    for steps, resume in ((1, None), (2, "auto")):
        letters_trained(tmp_path, letter_task(ends), max_steps=steps, resume=resume, **options)
    printed = said()
    assert "by Limited, with random numbers of its own: the run is not bit-exact" in printed
    assert "Limited has random numbers of its own" in printed
    with refused("Limited samples in a run of one process, and this run has 3"):
        task_of(TrainArguments(task=letter_task(ends), generator=Limited), 3)


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
    ("method", "call", "error", "kind"),
    [
        ("generate", 1, SystemExit(0), Refused),
        ("generate", 3, SystemExit(0), Stopped),  # after both evaluations before the first step
        ("generate", 4, Refused("not ready"), Stopped),
        ("sync", 3, ValueError("no such thing"), Stopped),
        ("close", 1, SystemExit(1), None),
    ],
)
def test_an_engine_that_fails_is_told_in_words(tmp_path, method, call, error, kind):
    def train():
        return letters_trained(
            tmp_path,
            letter_task(ends),
            generator=lambda p, _: Failing(p, method, call, error),
            quiet=False,
        )

    words = f"Failing.{method} failed: it raised {describe(error)}".removesuffix(": ")
    if kind is None:  # an engine that cannot be closed does not fail the run
        with pytest.warns(UserWarning, match=words):
            assert (result := train()).exit_code == 0 and result.exit_reason == "finished"
        return
    with pytest.raises(kind) as caught:
        train()
    assert (str(error) if isinstance(error, Refused) else words) in str(caught.value)
    assert caught.value.exit_code == (2 if kind is Refused else 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p, _: None, "'NoneType' object has no attribute 'sync'"),
        (lambda p, _: TransformersGenerator, "missing 1 required positional argument"),
        (lambda p: None, "could not be made: it raised TypeError"),
        (lambda p, _: 1 / 0, "could not be made: it raised ZeroDivisionError"),
        (lambda p, _: TransformersGenerator(dataclasses.replace(p, eos_ids=())), "cannot be used"),
    ],
)
def test_what_is_no_engine_is_refused_before_the_first_step(tmp_path, make, words):
    with pytest.raises(Refused) as caught:
        letters_trained(tmp_path, letter_task(ends), generator=make)
    assert words in str(caught.value)


class Lying(TransformersGenerator):
    """Fills every column as the default generator does, and lies of samples from some call on."""

    abilities = Abilities()
    since = 0

    def __init__(self, policy, _):
        super().__init__(policy)
        object.__setattr__(self, "calls", count(1))

    def generate(self, prompt_ids, sampling, draws):
        rollout = super().generate(prompt_ids, sampling, draws)
        if draws is None or next(self.calls) <= self.since:
            return rollout
        return self.lie(rollout)


class Ignored(Lying):
    def lie(self, rollout):
        names = ("logprobs", "entropy", "score_norms", "hidden")
        lies = {name: 3 * x for name, x in rollout.columns().items() if name in names}
        return dataclasses.replace(rollout, **lies)


class Honest(Lying):
    def lie(self, rollout):
        return rollout


@pytest.mark.parametrize("baseline", [{}, {"baseline": "optimal"}])
def test_what_the_trainer_computes_itself_is_its_own_whatever_an_engine_says(tmp_path, baseline):
    estimator = Estimator.preset("a2c", beta=0.1, kl_placement="reward")
    if baseline:
        estimator = Estimator(beta=0.1, **baseline)
    rows = []
    for kind in (Honest, Ignored):
        folder = tmp_path / kind.__name__
        letters_trained(folder, letter_task(ends), generator=kind, estimator=estimator)
        rows.append((folder / "metrics.jsonl").read_bytes())
    assert rows[0] == rows[1]


class Rounded(Lying):
    """Agrees in its first calls."""

    abilities, since = Abilities(agrees=True), 3
    lie = staticmethod(changed("sampling_logprobs", lambda x: x - 0.2))


class Early(Lying):
    since = 3
    lie = staticmethod(cut_after(1))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Rounded, r"by 0\.2 nats per token"),
        (Early, "truncated must be True where 4 tokens have no end"),
    ],
)
def test_an_engine_that_lies_after_its_first_rollouts_is_stopped(tmp_path, kind, words):
    options = {"learning_rate": 0.5, "max_steps": 8, "eval_generations": 2}
    with stopped(rf"^At step [1-8]: \w+.generate returned .*{words}"):
        letters_trained(tmp_path, letter_task(ends), generator=kind, **options)


def in_a_row(x):
    return x - 0.8 * (torch.arange(len(x)) == 1)[:, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda x: x - 3, "by 3 nats per token"), (in_a_row, "and by 0.4 in row 1 of")],
)
def test_an_engine_whose_numbers_become_others_is_told(tmp_path, change, words):
    """Old weights may be as far away, so a run goes on."""
    fields = {"lie": staticmethod(changed("sampling_logprobs", change)), "since": 3}
    kind = type("Later", (Lying,), fields)
    options = {"estimator": Estimator(importance="token"), "learning_rate": 0.5, "max_steps": 8}
    letters_trained(tmp_path, letter_task(ends), generator=kind, eval_generations=2, **options)
    warnings = read_json(tmp_path / "summary.json")["warnings"]
    assert any(words in " ".join(text.split()) for text in warnings), warnings


class LaterSampled(Engine):
    """Its greedy completions are samples, and improbable ones, from the third call on."""

    def __init__(self, policy, _):
        super().__init__(policy)
        self.greedy = 0

    def generate(self, prompt_ids, sampling, draws):
        self.greedy += draws is None
        if draws is None and self.greedy > 2:
            draws = torch.full((len(prompt_ids), sampling.max_completion_length), 0.999)
        return super().generate(prompt_ids, sampling, draws)


def test_greedy_completions_are_compared_in_each_evaluation(tmp_path):
    options = {"learning_rate": 0.02, "max_steps": 12, "eval_every": 3, "eval_generations": 0}
    words = r"^At step \d+: LaterSampled.generate returned .* \d+% of its greedy tokens are not the most probable"
    with stopped(words):
        letters_trained(tmp_path, letter_task(ends), generator=LaterSampled, **options)


class Ahead(Engine):
    """Notes what it is told of the next step, and does to it and to torch what it should not."""

    def __init__(self, policy, _):
        super().__init__(policy)
        self.told, self.due, Ahead.wrong, Ahead.right = None, None, 0, 0

    def announce(self, prompts):
        self.told = [self.policy.encode(row["prompt"]) for _, row in prompts]
        for _, row in prompts:
            row["prompt"] = "bad"
        torch.set_grad_enabled(False)

    def generate(self, prompt_ids, sampling, draws):
        if sampling.step and draws is not None:
            Ahead.right += self.due == prompt_ids
            Ahead.wrong += self.due not in (None, prompt_ids)
            self.told, self.due = None, self.told
        return super().generate(prompt_ids, sampling, draws)


def test_what_is_announced_is_a_copy_of_what_is_sampled_next(tmp_path):
    rows = []
    for kind in (Ahead, type("Quiet", (Ahead,), {"announce": lambda self, prompts: None})):
        letters_trained(tmp_path / kind.__name__, letter_task(ends), generator=kind, sync_every=2)
        rows.append((tmp_path / kind.__name__ / "metrics.jsonl").read_bytes())
        assert (Ahead.wrong, Ahead.right) == (0, 2 * (kind is Ahead))
    assert rows[0] == rows[1]
    refill = {"estimator": "rloo,zero_spread=refill", "generator": Ahead, "sync_every": 2}
    letters_trained(
        tmp_path / "refill",
        letter_task(lambda completions, **_: [0.0] * len(completions)),
        **refill,
    )
    assert not Ahead.wrong


class Ending(Ahead):
    def announce(self, prompts):
        next(iter(()))


def test_an_iterator_that_ends_in_an_engine_is_its_failure(tmp_path):
    with stopped(r"Ending\.announce failed: it raised StopIteration"):
        letters_trained(tmp_path, letter_task(ends), generator=Ending, sync_every=2)
