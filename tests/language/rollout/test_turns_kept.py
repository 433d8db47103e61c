"""What a row has read is kept from turn to turn, and its episode is that of reading everything again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import family_policy
from test_episodes import PROMPTS, SAMPLING, outcome, played
from tiny_environments import Guess
from tiny_models import ENDS, make_tokenizer, quickly

import tokenrl
from tokenrl.language.policy.model import add_lora
from tokenrl.language.rollout import generator as module
from tokenrl.language.rollout.agreement import check_turns
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.prefixes import PrefixCache
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import score
from tokenrl.runs import read_metrics

WINDOWS = {"mistral": {"sliding_window": 16}, "gemma3": {"sliding_window": 24}}
LONG = {"gemma3", "falcon_h1", "lfm2", "deepseek_v3"}
"""Families that the quick tests leave out; they have relatives of each."""


def talking(family: str, **config):
    """A random policy of a family that plays episodes of texts."""
    sizes = {"vocabulary": 96, "max_position_embeddings": 256, **WINDOWS.get(family, {}), **config}
    policy = family_policy(family, **sizes)
    policy = replace(policy, tokenizer=make_tokenizer(), eos_ids=ENDS, source=family)
    check_turns(policy)
    return policy


class Reads:
    """Counts the tokens that the model of a policy reads, padding included."""

    def __init__(self, policy) -> None:
        self.policy, self.count = policy, 0

    def __enter__(self):
        embedding = self.policy.model.get_input_embeddings()
        self.handle = embedding.register_forward_pre_hook(self.add)
        return self

    def add(self, _, inputs):
        self.count += inputs[0].numel()

    def __exit__(self, *_):
        self.handle.remove()


def plainly(policy):
    """The same policy, of which each turn reads its whole history."""
    return replace(policy, keeps_turns=False)


def assert_same(actual, expected):
    """The same episodes, token for token, and the same numbers but for rounding."""
    assert [outcome(actual, i) for i in range(len(actual))] == [
        outcome(expected, i) for i in range(len(expected))
    ]
    for name in ("logprobs", "entropy", "sampling_logprobs"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=2e-5, atol=3e-5
        )


FAMILIES = ["llama", "gpt2", "qwen3", "qwen3_5", "mistral", *sorted(LONG)]


@pytest.mark.parametrize("family", quickly(FAMILIES, LONG))
def test_episodes_are_those_of_reading_everything_again(family):
    policy = talking(family)
    assert policy.keeps_turns
    with Reads(policy) as fewer:
        rollout = played(policy)
    with Reads(policy) as all_of_it:
        expected = played(plainly(policy))
    assert rollout.turns.max() == 2
    assert_same(rollout, expected)
    share = 1 if family in WINDOWS else 0.8  # rows that have outgrown a window are read again
    assert fewer.count < share * all_of_it.count


def test_episodes_under_an_adapter_and_looks_that_come_late_are_the_same(monkeypatch):
    """On a device rows go on for some tokens behind their end, with keys that belong to nothing."""
    expected = {}
    for family in ("llama", "qwen3_5"):
        policy = talking(family)
        add_lora(policy, r=2)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.normal_(std=0.3)
        expected[family] = policy, played(plainly(policy))
    monkeypatch.setitem(module.LOOK_EVERY, "cpu", 3)
    for family, (policy, episodes) in expected.items():
        with Reads(policy) as reads:
            assert_same(played(policy), episodes)
        with Reads(policy) as plain:
            assert_same(played(plainly(policy)), episodes)
        if family == "llama":  # states have gone beyond the end
            assert reads.count < 0.85 * plain.count


def test_with_little_memory_the_episodes_are_the_same_and_more_is_read():
    policy = talking("qwen3")
    expected = played(plainly(policy))
    counts = []
    for bytes_of_rows in (2**31, 16_000, 1):  # of some 30,000 that all rows take
        generator = TransformersGenerator(policy, cache=bytes_of_rows / 2**30)
        with Reads(policy) as reads:
            assert_same(played(policy, generator=generator), expected)
        counts.append(reads.count)
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_every_token_of_an_episode_is_read_once(family):
    """But the last, after which nothing comes. In the update too: the prompt of a group, and then its rows."""
    policy = talking(family)
    for number in range(4):
        with Reads(policy) as reads:
            rollout = played(policy, numbers=[number], num_generations=1)
        length = int(rollout.mask[0].nonzero().max()) + 1
        assert reads.count == int(rollout.prompt_mask.sum()) + length - 1
    rollout = played(policy)
    with Reads(policy) as reads:
        score(policy.model, rollout)
    n, width = rollout.mask.shape
    assert reads.count == 4 * rollout.prompt_ids.shape[1] + n * (width - 1)


def test_a_model_that_cannot_continue_its_cache_reads_everything_again():
    policy = replace(talking("mamba"), keeps_turns=None)
    # it forgets its state where several tokens follow
    assert "from turn to turn gives log-probabilities that are off by" in check_turns(policy)
    assert policy.keeps_turns is False and check_turns(policy) == ""  # tried once
    with Reads(policy) as reads:
        rollout = played(policy)
    with Reads(policy) as plain:
        assert_same(played(plainly(policy)), rollout)
    assert reads.count == plain.count
    short = replace(talking("mistral", sliding_window=3), keeps_turns=None)
    assert check_turns(short) == "its cache drops tokens, as with a sliding window"


def test_wrong_numbers_of_a_kept_cache_are_seen_before_the_first_turn(monkeypatch):
    right = Cache.joined

    def shifted(parts, lengths, room):
        cache = right(parts, lengths, room)
        for layer in cache.held.layers:
            layer.keys.copy_(layer.keys.roll(1, dims=2))
        return cache

    monkeypatch.setattr(Cache, "joined", shifted)
    policy = talking("llama")
    assert policy.keeps_turns is False


def test_a_run_says_in_its_header_that_it_reads_everything_again(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("rows do not fit")

    runs = []
    for number in range(2):
        result = tokenrl.train(
            model=replace(talking("llama"), keeps_turns=None),
            task=[{"prompt": prompt} for prompt in PROMPTS],
            environment=Guess,
            output_dir=tmp_path / str(number),
            max_steps=2,
            eval_size=1,
            prompts_per_step=2,
            num_generations=2,
            max_completion_length=14,
            eval_generations=1,
            cpu=True,
        )
        assert result.exit_code == 0 and result.policy.keeps_turns == (number == 0)
        header = " ".join(capsys.readouterr().out.split())
        assert ("each reads its whole history again (" in header) == (number == 1)
        runs.append(read_metrics(tmp_path / str(number) / "metrics.jsonl"))
        monkeypatch.setattr(Cache, "joined", broken)
    for kept, plain in zip(*runs, strict=True):
        assert kept == pytest.approx(plain, rel=1e-3, abs=1e-5)


def test_the_longest_prefix_is_continued_and_the_oldest_is_forgotten_first():
    policy = talking("llama")
    turns = TransformersGenerator(policy).over_turns()
    out = policy.model(torch.tensor([[5, 6, 7, 8]]), use_cache=True)
    cache = Cache.of(out)
    size = cache.row(0, 0, 4).nbytes
    assert size == 2 * 2 * 2 * 8 * 4 * 4  # keys and values, layers, heads, size, tokens, float32
    prefixes = PrefixCache(2.5 * size)
    for ids in ([5, 6], [5, 6, 7, 8], [5, 9]):
        prefixes.add(ids, cache.row(0, 0, 4))
    assert prefixes.longest([5, 6, 1]) == (0, None)  # the oldest of three
    assert prefixes.longest([5, 6, 7, 8, 1])[0] == 4
    assert prefixes.longest([5, 6, 7, 8])[0] == 0  # a token has to be read
    assert prefixes.longest([5, 9, 9])[0] == 2
    prefixes.drop([5, 9, 9], 2)
    assert prefixes.longest([5, 9, 9])[0] == 0 and len(prefixes) == 1
    prefixes.add([1], out_of_memory := cache.row(0, 0, 4))
    assert out_of_memory is prefixes.longest([1, 2])[1] and len(prefixes) == 2
    assert not turns.prefixes and TransformersGenerator(policy).prefixes is None


def test_rows_with_the_same_history_are_read_once_and_end_alike():
    """Twins of one history may be answered differently, and both continue it."""
    policy = talking("qwen3")
    turns = TransformersGenerator(policy).over_turns()
    sampling = replace(SAMPLING, num_generations=1, max_completion_length=8)
    draws = torch.full((4, 8), 0.4)
    with Reads(policy) as reads:
        first = turns.generate([[3, 4, 5]] * 4, sampling, draws)
    counts = first.mask.sum(dim=1)
    assert reads.count == 3 + int((counts - 1).sum())
    assert len({*map(str, first.completion_ids.tolist())}) == 1 == len(turns.prefixes)
    history = [3, 4, 5, *first.completion_ids[0][first.mask[0]].tolist()]
    histories = [[*history, 7], [*history, 7, 8, 9], [*history, 7], [3, 4, 6]]
    with Reads(policy) as reads:
        second = turns.generate(histories, Sampling(1), draws)
    assert reads.count == 2 + 4 + 3  # two and four new tokens, and a new prompt
    plain = TransformersGenerator(policy).generate(histories, Sampling(1), draws)
    torch.testing.assert_close(second.logprobs, plain.logprobs, rtol=0, atol=3e-5)
    assert torch.equal(second.completion_ids, plain.completion_ids)
    # What was continued is dropped, and only what has an end is kept.
    rows = zip(histories, second.truncated.tolist(), strict=True)
    assert len(turns.prefixes) == len({str(history) for history, cut in rows if not cut}) < 3
