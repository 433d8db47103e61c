"""What an engine of one's own returns is checked: a wrong rollout is refused, and a right one is read."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ENDS, PROMPTS, Engine, letter_task, letters_trained, make_policy

from tokenrl import Estimator
from tokenrl.errors import Refused, Stopped, describe
from tokenrl.language.policy.stops import StopStrings
from tokenrl.language.rollout.generator import Abilities, TransformersGenerator
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.language.rollout.scoring import USUAL, with_missing_fields
from tokenrl.language.training.engines import start_engine
from tokenrl.language.training.settings import check_shares

LENGTH, GROUP = 6, 3
NAN, INF = math.nan, math.inf


class Spoilt(Engine):
    """Spoils what an engine returns; the rest of the columns may be filled too."""

    def __init__(self, policy, spoil):
        super().__init__(policy)
        self.spoil = spoil

    def generate(self, prompt_ids, sampling, draws):
        return self.spoil(super().generate(prompt_ids, sampling, draws))


class Filled(Spoilt):
    """Fills all the columns that it can."""

    def generate(self, prompt_ids, sampling, draws):
        keep = {"keep_score_norms": True, "keep_hidden": True, "keep_distribution": True}
        sampling = dataclasses.replace(sampling, **keep)
        return self.spoil(TransformersGenerator(self.policy).generate(prompt_ids, sampling, draws))


def sampled(
    spoil, kind=Spoilt, *, generations=GROUP, stops=(), **options
) -> tuple[Rollout, Rollout]:
    """What a spoilt engine returns once it is checked, and what it returned."""
    policy = make_policy(initializer_range=0.1)
    policy.eos_ids, seen = ENDS, []
    if stops:
        policy.stops = StopStrings(policy.tokenizer, stops)
    engine = start_engine(
        lambda policy, _: kind(policy, lambda r: seen.append(spoil(r)) or seen[0]),
        policy,
        USUAL,
        None,
    )
    sampling = Sampling(LENGTH, generations, step=1, **options)
    ids = [policy.encode(prompt) for prompt in PROMPTS]
    rollout = engine.generate(ids, sampling, uniforms("training", sampling, range(4)))
    if generations:
        scored = with_missing_fields(policy, rollout, USUAL, distribution=sampling, logprobs=True)
        engine.check(scored, sampling)
    return rollout, seen[0]


def changed(name, change):
    """Change one column of a rollout."""
    return lambda r: dataclasses.replace(r, **{name: change(getattr(r, name))})


def set_at(name, value, row=4, column=0):
    """Change one number of a column."""

    def change(x):
        x = x.clone()
        x[(row, column) if x.ndim > 1 else row] = value
        return x

    return changed(name, change)


def longer(rollout):
    """All completions go on for as long again."""
    twice = {
        name: torch.cat([getattr(rollout, name)] * 2, 1)
        for name in ("completion_ids", "sampling_logprobs")
    }
    return dataclasses.replace(
        rollout, mask=torch.ones_like(twice["completion_ids"]).bool(), **twice
    )


def behind(name, value):
    """Put a number behind the end of each completion, where nothing counts."""
    return lambda r: changed(name, lambda x: x.masked_fill(~r.mask, value))(r)


def without_ends(rollout):
    """Leave the ends out, as engines do that return a text without its last token."""
    last = rollout.mask.sum(1) - 1
    ended = (~rollout.truncated & (last > 0))[:, None]
    off = ended & (torch.arange(rollout.mask.shape[1]) == last[:, None])
    return dataclasses.replace(rollout, mask=rollout.mask & ~off)


def cut_to_three(rollout):
    """Completions that are cut after three of six tokens, told as if they had reached the limit."""
    mask = rollout.mask & (torch.arange(rollout.mask.shape[1]) < 3)
    return dataclasses.replace(
        rollout, mask=mask, truncated=rollout.truncated | (rollout.mask.sum(1) > 3)
    )


def uniform(rollout):
    """The sampled token has its probability, and all others share the rest."""
    x = rollout.sampling_distribution
    sampled = rollout.sampling_logprobs[..., None]
    rest = torch.log1p(-sampled.exp()) - math.log(x.shape[2] - 1)
    return rest.expand(x.shape).scatter(2, rollout.completion_ids[..., None], sampled)


WRONG = {
    # what it is
    "None": (lambda r: None, "it is None"),
    "no log-probabilities": (changed("sampling_logprobs", lambda x: None), "it has the columns"),
    "a column of later": (lambda r: dataclasses.replace(r, rewards=torch.zeros(12)), "it has the columns"),
    "lists": (changed("completion_ids", lambda x: x.tolist()), "completion_ids is [["),
    # shapes
    "rows too few": (lambda r: r.take(torch.arange(11)), "[N = 12, P"),
    "shifted log-probabilities": (changed("sampling_logprobs", lambda x: x[:, 1:]), "[N = 12, T = 6]"),
    "truncated of tokens": (lambda r: dataclasses.replace(r, truncated=r.mask), "[N = 12]"),
    # kinds
    "real ids": (changed("completion_ids", torch.Tensor.float), "has numbers of type torch.float32"),
    "whole log-probabilities": (changed("sampling_logprobs", torch.Tensor.long), "must be finite numbers"),
    "a mask of twos": (changed("mask", lambda x: x.long() * 2), "mask has numbers"),
    "on no device": (changed("completion_ids", lambda x: x.to("meta")), "NotImplementedError"),
    # prompts
    "rows exchanged": (changed("prompt_index", lambda x: x.flip(0)), "prompt_index does not count"),
    "prompts padded on the right": (
        lambda r: changed("prompt_mask", lambda x: x.flip(1))(changed("prompt_ids", lambda x: x.flip(1))(r)),
        "padded on the left",
    ),
    "a prompt cut": (set_at("prompt_mask", False, row=0, column=-2), "the prompt is not the one"),
    # completions
    "empty": (changed("mask", lambda x: x & (torch.arange(12) != 5)[:, None]), "no token, first in row 5"),
    "too long": (longer, "more than 6 tokens"),
    "a gap": (changed("mask", lambda x: x & (torch.arange(6) != 1)), "mask is not True"),
    "goes on behind the end": (changed("mask", torch.ones_like), "mask is not True up to the first end"),
    "ids below 0": (set_at("completion_ids", -1), "other numbers than 0 to 95, first in row 4"),
    "without ends": (without_ends, "neither an end nor"),
    "nothing truncated": (changed("truncated", torch.zeros_like), "neither an end nor"),
    "all truncated": (changed("truncated", torch.ones_like), "or both"),
    # numbers
    "nan": (set_at("sampling_logprobs", NAN), "must be finite numbers, at most 0, first in row 4"),
    "positive": (changed("sampling_logprobs", torch.neg), "at most 0"),
    # other numbers than the policy's
    "zeros": (changed("sampling_logprobs", torch.zeros_like), "differ from the trainer's by"),
    "of one row": (changed("sampling_logprobs", lambda x: x - 9 * (torch.arange(12) == 7)[:, None]), "row 7 of 12"),
    "cut early": (cut_to_three, "is truncated although it has fewer than 6 tokens, first in row"),
}  # fmt: skip
WRONG_FILLED = {
    "a distribution of fewer tokens": (
        changed("sampling_distribution", lambda x: x[..., :-1]),
        "V = 96]",
    ),
    "logits as a distribution": (changed("sampling_distribution", lambda x: x + 3), "add up to 1"),
    "the distribution of other tokens": (
        changed("sampling_distribution", lambda x: x.roll(1, 2)),
        "agree with",
    ),
    "a uniform distribution beside the sampled tokens": (
        lambda r: dataclasses.replace(r, sampling_distribution=uniform(r)),
        "of the probability on other tokens than the trainer's",
    ),
}


@pytest.mark.parametrize(
    ("spoil", "words", "kind"),
    [
        pytest.param(*case, kind, id=name)
        for cases, kind in ((WRONG, Spoilt), (WRONG_FILLED, Filled))
        for name, case in cases.items()
    ],
)
def test_a_wrong_rollout_is_told_in_words(spoil, words, kind):
    with pytest.raises(Stopped) as caught:
        sampled(spoil, kind)
    assert words in str(caught.value)
    assert str(caught.value).startswith(
        f"{kind.__name__}.generate returned a rollout that cannot be used: "
    )


RIGHT = {
    "as it is": lambda r: r,
    "a mask of numbers": changed("mask", torch.Tensor.float),
    "log-probabilities of 64 bits": changed("sampling_logprobs", torch.Tensor.double),
    "rounding above 0": changed("sampling_logprobs", lambda x: x + 1e-7),
    "anything behind the end": behind("sampling_logprobs", NAN),
    "any id behind the end": behind("completion_ids", -100),
    "a wider table": lambda r: r.cut(r.prompt_ids.shape[1] + 3, LENGTH + 4),
    "with a graph": changed("sampling_logprobs", lambda x: x.requires_grad_()),
}


@pytest.mark.parametrize("kind", [Spoilt, Filled])
@pytest.mark.parametrize("spoil", RIGHT.values(), ids=RIGHT)
def test_a_right_rollout_is_read_as_training_reads_it(spoil, kind):
    expected = sampled(lambda r: r, kind)[0]
    rollout, returned = sampled(spoil, kind)
    assert rollout.columns().keys() == expected.columns().keys()
    for name, x in rollout.columns().items():
        torch.testing.assert_close(x, getattr(expected, name), check_dtype=False, atol=1e-6, rtol=0)
        # a buffer of its own
        assert not x.requires_grad and x.data_ptr() != getattr(returned, name).data_ptr()


class Listed(Spoilt):
    """Returns the distribution of the tokens that it is asked for."""

    def generate(self, prompt_ids, sampling, draws):
        return self.spoil(TransformersGenerator(self.policy).generate(prompt_ids, sampling, draws))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r, ""),
        (lambda r: r.cut(r.prompt_ids.shape[1], LENGTH + 2), ""),
        (changed("top_ids", lambda x: x[..., :-1]), "top_ids has the shape [12, 6, 4] instead"),
        (changed("top_ids", lambda x: x + 96), "top_ids holds a number twice, or others than 0 to"),
        (changed("top_ids", lambda x: x[..., :1].expand(x.shape)), "top_ids holds a number twice"),
        (changed("top_ids", torch.Tensor.float), "must be whole numbers"),
        (changed("top_ids", lambda x: x.roll(1, 2)), "agree with sampling_logprobs"),
        (changed("sampling_distribution", lambda x: x + 3), "add up to 1"),
    ],
)
def test_the_most_probable_tokens_that_an_engine_returns_are_checked(spoil, words):
    options = {"keep_distribution": True, "keep_top": 5}
    if not words:
        rollout = sampled(spoil, Listed, **options)[0]
        assert rollout.top_ids.shape == rollout.sampling_distribution.shape == (12, LENGTH, 5)
        return
    with pytest.raises(Stopped) as caught:
        sampled(spoil, Listed, **options)
    assert words in str(caught.value)


def test_greedy_completions_are_the_most_probable_and_of_one_row_each():
    assert len(sampled(lambda r: r, generations=0)[0]) == 4

    class Sampled(Engine):
        def generate(self, prompt_ids, sampling, draws):
            return super().generate(prompt_ids, sampling, torch.rand(4, LENGTH))

    with pytest.raises(Stopped, match=r"\d\d% of its greedy tokens are not the most probable"):
        sampled(lambda r: r, lambda policy, _: Sampled(policy), generations=0)


def test_a_completion_that_goes_on_behind_a_stop_string_is_wrong():
    sampled(lambda r: r, stops=["e"])
    with pytest.raises(Stopped, match="goes on behind a stop string"):
        sampled(
            lambda r: r,
            lambda policy, spoil: Spoilt(dataclasses.replace(policy, stops=None), spoil),
            stops=["e"],
        )


class Limited(Engine):
    """An engine that says what it can do."""

    abilities = Abilities(
        exact=False, agrees=True, distributed=False, min_p_last=False, temperatures=(0.5, 1.5)
    )

    def __init__(self, policy, _):
        super().__init__(policy)


class Rough(Limited):
    gap = -0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 2}, r"temperature was given as 2; Limited samples from 0\.5 to 1\.5"),
        ({"top_p": 0.9, "min_p": 0.1}, "Limited applies min_p before top_p"),
        ({"generator": Rough}, r"trainer's model, gives log-probabilities that are off by 0\.\d+"),
    ],
)
def test_an_engine_is_held_to_its_abilities(tmp_path, options, words):
    options = {"generator": Limited, "max_steps": 2, "quiet": False} | options
    with pytest.raises(Refused, match=words):
        letters_trained(tmp_path, letter_task(ends), **options)


def test_a_run_with_an_inexact_engine_says_so_and_needs_one_process(tmp_path, capsys):
    options = {"generator": Limited, "quiet": False, "max_completion_length": 6}
    for steps, resume in ((1, None), (2, "auto")):
        letters_trained(tmp_path, letter_task(ends), max_steps=steps, resume=resume, **options)
    printed = " ".join(capsys.readouterr().out.split())
    assert "by Limited, with random numbers of its own: the run is not bit-exact" in printed
    assert "Limited has random numbers of its own" in printed
    with pytest.raises(
        Refused, match="Limited samples in a run of one process, and this run has 3"
    ):
        check_shares(SimpleNamespace(generator=Limited, prompts_per_step=3), 3)


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
        (lambda p, _: None, "made None, which has no method generate and no sync and no close"),
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
    """Fills every column as the default generator does, and lies from some call on."""

    abilities = Abilities()
    lie, calls, since = None, None, 0

    def __init__(self, policy, _):
        super().__init__(policy)
        self.calls[:] = []

    def generate(self, prompt_ids, sampling, draws):
        self.calls.append(draws is not None)
        rollout = super().generate(prompt_ids, sampling, draws)
        if sum(self.calls) > self.since:
            return self.lie(rollout, draws is None)
        return rollout


def of_samples(change):
    return lambda rollout, greedy: rollout if greedy else change(rollout)


IGNORED = {
    "logprobs": changed("logprobs", lambda x: x - 3),
    "logprobs of a row": changed("logprobs", lambda x: x - 0.4 * (torch.arange(len(x)) == 1)[:, None]),
    "entropy": changed("entropy", lambda x: x * 0 + 5),
    "score norms": changed("score_norms", lambda x: None if x is None else x * 0 + 1),
    "hidden": changed("hidden", lambda x: None if x is None else x * 0),
}  # fmt: skip


@pytest.mark.parametrize("lie", IGNORED)
@pytest.mark.parametrize("agrees", [False, True])
def test_what_the_trainer_computes_itself_is_its_own_whatever_an_engine_says(tmp_path, lie, agrees):
    estimator = Estimator.preset("a2c", beta=0.1, kl_placement="reward")
    if lie == "score norms":
        estimator = Estimator(baseline="optimal", beta=0.1)
    rows = []
    for name, change in (("honest", lambda r: r), ("lying", IGNORED[lie])):
        fields = {"lie": staticmethod(of_samples(change)), "calls": []}
        fields["abilities"] = Abilities(agrees=agrees)
        kind = type("Lying", (Lying,), fields)
        letters_trained(tmp_path / name, letter_task(ends), generator=kind, estimator=estimator)
        rows.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert rows[0] == rows[1]


def early(rollout):
    """Completions are cut after a token, told as if they had reached the limit."""
    cut = rollout.mask.sum(1) > 1
    mask = rollout.mask & ((torch.arange(rollout.mask.shape[1]) < 1) | ~cut[:, None])
    return dataclasses.replace(rollout, mask=mask, truncated=rollout.truncated | cut)


def even(rollout):
    return dataclasses.replace(rollout, sampling_distribution=uniform(rollout))


def in_a_row(x):
    return x - 0.8 * (torch.arange(len(x)) == 1)[:, None]


LATER = {
    "log-probabilities": (changed("sampling_logprobs", lambda x: x - 3), "by 3 nats per token"),
    "of a row": (changed("sampling_logprobs", in_a_row), "by 0.8 nats per token in row 1 of"),
    "distribution": (
        lambda r: r if r.sampling_distribution is None else even(r),
        "of the probability on other tokens",
    ),
}
"""Old weights may be as far away, so a run goes on and tells it."""


@pytest.mark.parametrize("lie", LATER)
def test_an_engine_whose_numbers_become_others_is_told(tmp_path, lie):
    change, words = LATER[lie]
    fields = {"lie": staticmethod(of_samples(change)), "calls": [], "since": 3}
    kind = type("Lying", (Lying,), fields)
    estimator = Estimator(importance="token", importance_centre=lie == "distribution")
    options = {"estimator": estimator, "learning_rate": 0.5, "max_steps": 8, "eval_generations": 2}
    letters_trained(tmp_path, letter_task(ends), generator=kind, **options)
    warnings = json.loads((tmp_path / "summary.json").read_text())["warnings"]
    assert any(words in " ".join(text.split()) for text in warnings), warnings


STOPPED = {
    "a little, though it agrees": (changed("sampling_logprobs", lambda x: x - 0.2), "by 0.2 nats"),
    "cut early": (early, "is truncated although it has fewer than 4 tokens"),
}


@pytest.mark.parametrize("lie", STOPPED)
def test_an_engine_that_lies_after_its_first_rollouts_is_stopped(tmp_path, lie):
    change, words = STOPPED[lie]
    fields = {"lie": staticmethod(of_samples(change)), "calls": [], "since": 3}
    fields["abilities"] = Abilities(agrees="agrees" in lie)
    kind = type("Lying", (Lying,), fields)
    options = {"learning_rate": 0.5, "max_steps": 8, "eval_generations": 2}
    with pytest.raises(Stopped, match=rf"^At step [1-8]: Lying.generate returned .*{words}"):
        letters_trained(tmp_path, letter_task(ends), generator=kind, **options)


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
    words = r"^At step \d+: LaterSampled.generate returned .* of its greedy tokens are not the most"
    with pytest.raises(Stopped, match=words):
        letters_trained(tmp_path, letter_task(ends), generator=LaterSampled, **options)
