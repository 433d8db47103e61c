"""Episodes as they are played, and that what a row has read is kept from turn to turn.

Each fault that other toolkits have or had in this is a test here.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import family_policy
from refusals import refused
from tiny_environments import Guess, Recorded, Safe, call, chat_policy
from tiny_models import ENDS, letters, make_policy, make_tokenizer, quickly
from torch.testing import assert_close

from tokenrl.language.policy.model import add_lora, wrap
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout import decoding as module
from tokenrl.language.rollout.agreement import checked_generator
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.episodes import play
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import reward_rows
from tokenrl.language.rollout.sampling import Sampling, uniforms

PROMPTS = ["the cat ", "a ", "count to ten ", "sat on "]
SAMPLING = Sampling(max_completion_length=14, num_generations=3, step=1)
ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "Open it."}]


def guessing(**options):
    """A policy whose turns are short, with a long context."""
    policy = make_policy(vocabulary=90, max_position_embeddings=256, **options)
    policy.eos_ids = ENDS
    return policy


def played(policy, environments=None, prompts=PROMPTS, numbers=None, generator=None, **sampling):
    """A rollout of the prompts with these numbers, all of them without."""
    numbers = range(len(prompts)) if numbers is None else numbers
    rows = [(n, {"prompt": prompts[n]}) for n in numbers]
    generator = generator or TransformersGenerator(policy)
    environments = environments or Environments(Guess)
    return play(policy, generator, environments, rows, replace(SAMPLING, **sampling), "training")


def scripted(*script, limit=400, malformed="end"):
    """The rollout of a safe in which the policy writes a script, and the generator, which kept its inputs."""
    policy = chat_policy()
    generator = Recorded(policy, *([text] for text in script))
    sampling = Sampling(max_completion_length=limit, step=1)
    environments = Environments(Safe, malformed=malformed)
    rows = [(0, {"prompt": ASKED})]
    return play(policy, generator, environments, rows, sampling, "training"), generator


def outcome(rollout, i):
    """All that an episode is, without its padding and its probabilities."""
    row = rollout.take(torch.tensor([i]))
    exact = ("prompt_ids", "completion_ids", "mask", "turns", "turn_rewards", "truncated")
    columns = [getattr(row, name).tolist() for name in exact]
    return columns, row.messages, row.endings


def test_an_episode_depends_on_no_other_of_its_batch_and_on_no_draw_outside():
    policy = guessing()
    whole = played(policy)
    environments = Environments(Guess)  # whose instances are used again
    assert len({str(outcome(whole, i)) for i in range(12)}) == 12
    assert whole.turns.max() > 1
    for numbers in ([3, 1, 0, 2], [2]):
        random.seed(len(numbers))
        np.random.seed(len(numbers))
        generator = TransformersGenerator(policy, rows_at_once=numbers[0] or None)
        part = played(policy, environments, numbers=numbers, generator=generator)
        for i, row in enumerate(3 * n + g for n in numbers for g in range(3)):
            assert outcome(part, i) == outcome(whole, row)
            for name in ("logprobs", "entropy", "sampling_logprobs"):
                actual = getattr(part, name)[i][part.mask[i]]
                expected = getattr(whole, name)[row][whole.mask[row]]
                assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def recorded():
    """A policy, the generator that kept its inputs, and the rollout."""
    policy = guessing()
    generator = Recorded(policy)
    return policy, generator, played(policy, generator=generator)


def test_what_was_sampled_is_never_tokenised_again(recorded):
    """In verl and TRL the history of a later turn was the tokens of its text, which are often others."""
    policy, generator, rollout = recorded
    changed = 0
    for i in range(12):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        for turn in range(1, int(rollout.turns[i].max()) + 1):
            begin = int((rollout.mask[i] & (rollout.turns[i] == turn)).nonzero().min())
            history = prompt + rollout.completion_ids[i][:begin].tolist()
            assert history in generator.histories[turn]
            changed += policy.encode(policy.tokenizer.decode(history)) != history
    assert changed > 3


def test_the_random_numbers_of_a_row_are_counted_in_the_tokens_that_it_chose(recorded):
    _, generator, rollout = recorded
    numbers = uniforms("training", SAMPLING, range(4))
    for turn, draws in enumerate(generator.draws):
        active = (rollout.turns.amax(dim=1) >= turn).nonzero().flatten().tolist()
        assert len(generator.histories[turn]) == len(
            active
        )  # no turn follows the end of an episode
        for row, own in zip(active, draws, strict=True):
            chosen = int((rollout.mask[row] & (rollout.turns[row] < turn)).sum())
            assert torch.equal(own[: 14 - chosen], numbers[row, chosen:])
            assert (chosen > 0) == (turn > 0)


def test_an_episode_ends_as_its_environment_or_a_limit_says(recorded):
    """An episode that is terminated at the limit of turns is completed."""
    policy, _, rollout = recorded
    assert {*rollout.endings} == {"completed", "max_tokens"}
    capped = played(policy, Environments(Guess, max_turns=1))
    assert {*capped.endings} == {"max_turns", "completed"} and not capped.turns.any()
    assert not capped.truncated.any()


@pytest.mark.parametrize("limit", [1, 5])
def test_the_limit_of_length_counts_what_the_policy_chose_in_all_turns(limit):
    rollout = played(guessing(), max_completion_length=limit)
    used_up = torch.tensor([ending == "max_tokens" for ending in rollout.endings])
    chosen = rollout.mask.sum(dim=1)
    assert used_up.any() and rollout.truncated[used_up].all() and int(chosen.max()) <= limit
    assert (chosen[used_up] == limit).all()
    assert rollout.mask.shape[1] > limit or limit == 1
    whole = played(guessing(), max_completion_length=14)  # a limit cuts the same episodes
    for i in range(12):
        row = rollout.completion_ids[i][rollout.mask[i]]
        assert torch.equal(whole.completion_ids[i][whole.mask[i]][: len(row)], row)


@pytest.mark.parametrize("share", [True, False])
def test_the_episodes_of_a_group_begin_alike(share):
    """In OpenEnv's example of TRL the members of a group had different secrets."""
    policy, environments = guessing(), Environments(Guess, share_seed=share)

    def openings(**settings):
        rollout = played(policy, environments, ["a "] * 4, max_completion_length=1, **settings)
        return policy.decode(rollout.prompt_ids, rollout.prompt_mask)

    first = openings()
    assert all(len({*first[i : i + 3]}) == 1 for i in range(0, 12, 3)) == share
    assert len({*first}) > 1 and all(text.startswith("a ") for text in first)
    assert openings() == first
    assert first not in (openings(step=2), openings(seed=1))


def test_calls_of_tools_are_answered_until_a_turn_calls_none():
    rollout, generator = scripted(
        call(2) + "<eos>", "hm " + call(3) + call(4) + "<eos>", "done<eos>"
    )
    assert rollout.endings == ["completed"] and not rollout.truncated.any()
    assert [m["content"] for m in rollout.messages[0]] == ["", "shut", "hm", "open", "open", "done"]
    decoded = chat_policy().tokenizer.decode
    histories = [decoded(histories[0]) for histories in generator.histories]
    begun, first, second = (text.split("assistant:", 1)[1] for text in histories)
    assert begun == "" and first == call(2) + "<eos>tool:shut<eos>assistant:"
    assert second == f"{first}hm {call(3)}{call(4)}<eos>tool:open<eos>tool:open<eos>assistant:"
    assert rollout.turn_rewards.nonzero().tolist() == [[0, int(rollout.mask[0].nonzero().max())]]
    assert float(rollout.turn_rewards.sum()) == 0.25
    assert decoded(rollout.completion_ids[0][rollout.mask[0]]) == (
        f"{call(2)}<eos>hm {call(3)}{call(4)}<eos>done<eos>"
    )


def test_a_model_that_cannot_call_is_refused_before_a_turn_even_where_every_turn_is_cut():
    policy = chat_policy()
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("tool_call>", "call>")
    policy.tokenizer.response_template = None
    generator = Recorded(policy, ["sat"])
    sampling = Sampling(max_completion_length=3, step=1)
    with refused(r"tokenizer.response_template and save it"):
        play(policy, generator, Environments(Safe), [(0, {"prompt": ASKED})], sampling, "training")
    assert generator.histories == []


@pytest.mark.parametrize("malformed", ["end", "observe"])
def test_a_call_that_cannot_be_parsed_ends_the_episode_or_is_answered(malformed):
    rollout, _ = scripted(
        "<tool_call>{3</tool_call><eos>", call(3) + "<eos>", "done<eos>", malformed=malformed
    )
    roles = [m["role"] for m in rollout.messages[0]]
    if malformed == "end":
        assert rollout.endings == ["parse_error"] and roles == ["assistant"]
        assert not rollout.turn_rewards.any()
    else:
        assert rollout.endings == ["completed"] and roles == ["assistant", "tool"] * 2 + [
            "assistant"
        ]
        assert (
            "error" in rollout.messages[0][1]["content"]
            and float(rollout.turn_rewards.sum()) == 0.75
        )
    assert not rollout.truncated.any()


def test_a_greedy_episode_begins_as_its_group_and_takes_the_likeliest_tokens():
    """ReMax compares a row with it, so both must be episodes of the same seed."""
    policy = guessing()
    greedy = played(policy, num_generations=0)
    assert torch.equal(greedy.prompt_ids, played(policy).prompt_ids[::3])
    assert len(greedy) == 4 and greedy.turns.any()
    for i in range(4):
        row = greedy.take(torch.tensor([i]))
        ids = torch.cat([row.prompt_ids, row.completion_ids], dim=1)
        likeliest = policy.model(ids).logits.argmax(-1)[:, row.prompt_ids.shape[1] - 1 : -1]
        assert torch.equal(likeliest[row.mask], row.completion_ids[row.mask])


@pytest.mark.parametrize("limit", [len(call(3)), len(call(3)) - 1, 3])
def test_a_call_in_a_turn_that_was_cut_by_length_is_not_executed(limit):
    """In TRL it is, if it happens to be complete, though the policy has not ended its turn."""
    rollout, _ = scripted(call(3) + " and more<eos>", limit=limit)
    assert rollout.environments[0].tries == 0 and rollout.endings == ["max_tokens"]
    assert rollout.truncated.all() and rollout.messages[0] == [
        {"role": "assistant", "content": call(3)[:limit]}
    ]
    assert not rollout.turn_rewards.any()


class Long(Guess):
    """Observations of up to 30 and 12 letters."""

    def reset(self, seed=None):
        return "a" * random.randint(0, 30), {}

    def step(self, text):
        return "abcd" * random.randint(0, 3), 1.0, False, False, {}


def test_no_row_outgrows_the_context():
    policy = wrap(*letters(context=24))
    prompts = [f"{x}>" for x in "abcd"] * 5
    rollout = played(policy, Environments(Long), prompts, max_completion_length=12)
    lengths = rollout.prompt_mask.sum(dim=1) + rollout.mask.long().cumsum(1).argmax(dim=1) + 1
    assert int(lengths.max()) == 24
    cut = torch.tensor([ending == "context_overflow" for ending in rollout.endings])
    unread = torch.tensor([failure != "" for failure in rollout.failures])
    assert cut.any() and not cut.all() and rollout.truncated[cut].all()
    assert unread.any() and cut[unread].all() and not rollout.mask[unread].any()
    for failure in {*rollout.failures} - {""}:
        assert re.match(r"The prompt with its first observation has .* context 24\.$", failure)


def test_rewards_of_turns_are_at_the_last_token_of_their_turn_and_those_of_functions_at_the_end():
    policy, environments = guessing(), Environments(Guess)
    plain = played(policy, environments)
    scores = [100.0 * (i + 1) for i in range(len(plain))]
    rewards = Rewards([lambda **_: scores], [2.0, 0.5], environments=environments)
    rollout = reward_rows(policy, rewards, plain, [{"prompt": prompt} for prompt in PROMPTS])
    expected = 0.5 * plain.turn_rewards
    ends = torch.zeros_like(plain.mask)
    for i, turns in enumerate(plain.turns):
        for turn in range(turns.max() + 1):
            last = int((plain.mask[i] & (turns == turn)).nonzero().max())
            ends[i, last] = True
        expected[i, last] += 2.0 * scores[i]
    assert not plain.turn_rewards[~ends].any()
    assert_close(rollout.dense_rewards, expected)
    assert_close(rollout.rewards, expected.sum(dim=1))
    totals = [scores, plain.turn_rewards.sum(dim=1).tolist()]
    assert_close(rollout.by_function, torch.tensor(totals).double().T)


class Unseen(Guess):
    """Begins a third of the episodes with an empty observation, and another third goes on with one."""

    text = "on"

    def reset(self, seed=None):
        self.seed = seed % 3
        return (self.text if self.seed else ""), {}

    def step(self, text):
        return (self.text if self.seed == 2 else ""), 1.0, False, False, {}


def test_an_empty_observation_without_a_bos_ends_its_episode_alone():
    policy, environments = guessing(), Environments(Unseen)  # the tokenizer has no BOS
    rollout = played(policy, environments, [""] * 6, num_generations=1)
    begun = [bool(mask.any()) for mask in rollout.mask]
    assert 0 < sum(begun) < 6
    words = "An observation of Unseen: A prompt is empty, and the tokenizer has no BOS"
    for is_begun, failure, ending in zip(begun, rollout.failures, rollout.endings, strict=True):
        assert failure.startswith(words) != is_begun and (ending == "error") != is_begun
    scored = reward_rows(
        policy, Rewards([], environments=environments), rollout, [{"prompt": ""}] * 6
    )
    assert scored.valid.tolist() == begun
    assert scored.logged[0][0]["episodes/error"] == pytest.approx(1 - sum(begun) / 6)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ 1 / 0 if messages | length > 1 }}{{ m.content }}"]
)
def test_a_template_that_fails_on_anything_is_refused(template):
    policy = chat_policy()
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace(
        "m.role + ':' + m.content }}", "m.role + ':' }}" + template
    )
    with refused("ZeroDivisionError"):
        played(policy, Environments(Guess), [ASKED[1:]] * 9)


# ---- what a row has read is kept ----

WINDOWS = {"mistral": {"sliding_window": 16}, "gemma3": {"sliding_window": 24}}
LONG = {"gemma3", "falcon_h1", "lfm2", "deepseek_v3"}
"""Families that the quick tests leave out; they have relatives of each."""


def talking(family: str, **config):
    """What samples a random policy of a family that plays episodes of texts."""
    sizes = {"vocabulary": 96, "max_position_embeddings": 256, **WINDOWS.get(family, {}), **config}
    policy = family_policy(family, **sizes)
    policy = replace(policy, tokenizer=make_tokenizer(), eos_ids=ENDS, source=family)
    return checked_generator(policy, Environments)


def talked(turns):
    return played(turns.policy, generator=turns)


class Reads:
    """Counts the tokens that the model of a generator reads, padding included."""

    def __init__(self, turns) -> None:
        self.policy, self.count = turns.policy, 0

    def __enter__(self):
        embedding = self.policy.model.get_input_embeddings()
        self.handle = embedding.register_forward_pre_hook(self.add)
        return self

    def add(self, _, inputs):
        self.count += inputs[0].numel()

    def __exit__(self, *_):
        self.handle.remove()


def plainly(turns):
    """The same generator, of which each turn reads its whole history."""
    return replace(turns, regime=replace(turns.regime, keeps_turns=False))


def assert_same(actual, expected):
    """The same episodes, token for token, and the same numbers but for rounding."""
    assert [outcome(actual, i) for i in range(len(actual))] == [
        outcome(expected, i) for i in range(len(expected))
    ]
    for name in ("logprobs", "entropy", "sampling_logprobs"):
        assert_close(getattr(actual, name), getattr(expected, name), rtol=2e-5, atol=3e-5)


FAMILIES = ["llama", "gpt2", "qwen3", "qwen3_5", "mistral", *sorted(LONG)]


@pytest.mark.parametrize("family", quickly(FAMILIES, LONG))
def test_episodes_are_those_of_reading_everything_again(family):
    turns = talking(family)
    assert turns.regime.keeps_turns
    with Reads(turns) as fewer:
        rollout = talked(turns)
    with Reads(turns) as all_of_it:
        expected = talked(plainly(turns))
    assert rollout.turns.max() == 2
    assert_same(rollout, expected)
    share = 1 if family in WINDOWS else 0.8  # rows that have outgrown a window are read again
    assert fewer.count < share * all_of_it.count


def test_episodes_under_an_adapter_and_looks_that_come_late_are_the_same(monkeypatch):
    """On a device rows go on for some tokens behind their end, with keys that belong to nothing."""
    expected = {}
    for family in ("llama", "qwen3_5"):
        turns = talking(family)
        add_lora(turns.policy, r=2)
        with torch.no_grad():
            for parameter in turns.policy.trainable_parameters():
                parameter.copy_(torch.sin(torch.arange(parameter.numel()).view_as(parameter)) / 3)
        expected[family] = turns, talked(plainly(turns))
    monkeypatch.setitem(module.LOOK_EVERY, "cpu", 4)
    for family, (turns, episodes) in expected.items():
        with Reads(turns) as reads:
            assert_same(talked(turns), episodes)
        with Reads(turns) as plain:
            assert_same(talked(plainly(turns)), episodes)
        if family == "llama":  # states have gone beyond the end
            assert reads.count < 0.5 * plain.count


def test_with_little_memory_the_episodes_are_the_same_and_more_is_read():
    turns = talking("qwen3")
    expected = talked(plainly(turns))
    counts = []
    for bytes_of_rows in (2**31, 16_000, 1):  # of some 30,000 that all rows take
        with Reads(turns) as reads:
            assert_same(talked(replace(turns, cache=bytes_of_rows / 2**30)), expected)
        counts.append(reads.count)
    assert counts[0] < counts[1] < counts[2]


def test_a_model_that_cannot_continue_its_cache_reads_everything_again():
    turns = talking("mamba")
    # it forgets its state where several tokens follow
    assert (
        "from turn to turn gives log-probabilities that are off by" in turns.regime.remarks["turns"]
    )
    assert not turns.regime.keeps_turns
    with Reads(turns) as reads:
        rollout = talked(turns)
    with Reads(turns) as plain:
        assert_same(talked(plainly(turns)), rollout)
    assert reads.count == plain.count
    short = talking("mistral", sliding_window=3).regime
    assert "its cache drops tokens, as with a sliding window" in short.remarks["turns"]


def test_wrong_numbers_of_a_kept_cache_are_seen_before_the_first_turn(monkeypatch):
    right = Cache.joined

    def shifted(parts, lengths, room):
        cache = right(parts, lengths, room)
        for layer in cache.held.layers:
            layer.keys.copy_(layer.keys.roll(1, dims=2))
        return cache

    monkeypatch.setattr(Cache, "joined", shifted)
    turns = talking("llama")
    assert not turns.regime.keeps_turns


def test_rows_with_the_same_history_are_read_once_and_end_alike():
    """Twins of one history may be answered differently, and both continue it; what is continued is dropped."""
    turns = talking("qwen3").over_turns()
    sampling = replace(SAMPLING, num_generations=1, max_completion_length=8)
    draws = torch.full((4, 8), 0.4)
    with Reads(turns) as reads:
        first = turns.turn([0, 1, 2, 5], [[3, 4, 5]] * 4, sampling, draws)
    assert reads.count == 3 + int((first.mask.sum(dim=1) - 1).sum())
    assert {*turns.histories.rows} == {0, 1, 2, 5}
    history = [3, 4, 5, *first.completion_ids[0][first.mask[0]].tolist()]
    histories = [[*history, 7], [*history, 7, 8, 9], [*history, 7], [3, 4, 6]]
    with Reads(turns) as reads:
        second = turns.turn([5, 0, 2, 7], histories, Sampling(1), draws)
    assert reads.count == 2 + 4 + 3  # two and four new tokens, and a new prompt
    plain = TransformersGenerator(turns.policy).generate(histories, Sampling(1), draws)
    assert_close(second.logprobs, plain.logprobs, rtol=0, atol=3e-5)
    assert torch.equal(second.completion_ids, plain.completion_ids)
    rows = zip([5, 0, 2, 7], second.truncated.tolist(), strict=True)
    assert {*turns.histories.rows} == {1} | {row for row, cut in rows if not cut}
