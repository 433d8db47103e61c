"""Episodes as they are played: each fault that other toolkits have or had in this is a test here."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_environments import Faulty, Guess, Recorded, Safe, call, chat_policy
from tiny_models import ENDS, completions, letters, make_policy

from tokenrl.core import Estimator
from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.policy.model import wrap
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.episodes import ENDINGS, play
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import reward_rows
from tokenrl.language.rollout.sampling import Sampling, uniforms

PROMPTS = ["the cat ", "a ", "count to ten ", "sat on "]
SAMPLING = Sampling(max_completion_length=14, num_generations=3, step=1)


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


def scripted(*script, context=512, limit=400, malformed="end", **row):
    """The rollout of a safe in which the policy writes a script, and the generator, which kept its inputs."""
    policy = chat_policy(context)
    generator, rows = (
        Recorded(policy, *([text] for text in script)),
        [(0, {"prompt": ASKED, **row})],
    )
    sampling = Sampling(max_completion_length=limit, step=1)
    environments = Environments(Safe, malformed=malformed)
    return play(policy, generator, environments, rows, sampling, "training"), generator


ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "Open it."}]


def outcome(rollout, i):
    """All that an episode is, without its padding."""
    length = int(rollout.mask[i].nonzero().max()) + 1
    row = [
        getattr(rollout, name)[i][:length].tolist() for name in ("completion_ids", "mask", "turns")
    ]
    rewards = rollout.turn_rewards[i][rollout.turn_rewards[i] != 0].tolist()
    prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
    return row, rewards, prompt, rollout.messages[i], rollout.endings[i], bool(rollout.truncated[i])


def test_an_episode_depends_on_no_other_of_its_batch_and_on_no_draw_outside():
    policy, whole = guessing(), played(guessing())
    environments = Environments(Guess)  # whose instances are used again
    assert len({str(outcome(whole, i)) for i in range(12)}) == 12 and set(
        whole.turns.unique().tolist()
    ) > {1}
    for numbers in ([3, 1, 0, 2], [2], [1, 3]):
        random.seed(len(numbers))
        np.random.seed(len(numbers))
        generator = TransformersGenerator(policy, rows_at_once=numbers[0] or None)
        part = played(policy, environments, numbers=numbers, generator=generator)
        for i, row in enumerate(3 * n + g for n in numbers for g in range(3)):
            assert outcome(part, i) == outcome(whole, row)
            mask = whole.mask[row]
            for name in ("logprobs", "entropy", "sampling_logprobs"):
                mine, wanted = getattr(part, name)[i][part.mask[i]], getattr(whole, name)[row][mask]
                torch.testing.assert_close(mine, wanted, rtol=0, atol=2e-5)


def test_what_was_sampled_is_never_tokenised_again():
    """In verl and TRL the history of a later turn was the tokens of its text, which are often others."""
    policy = guessing()
    generator = Recorded(policy)
    rollout = played(policy, generator=generator)
    decoded = policy.tokenizer.decode
    changed = 0
    for i in range(12):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        for turn in range(1, int(rollout.turns[i].max()) + 1):
            begin = int((rollout.mask[i] & (rollout.turns[i] == turn)).nonzero().min())
            history = prompt + rollout.completion_ids[i][:begin].tolist()
            assert history in generator.histories[turn]
            changed += policy.encode(decoded(history)) != history
    assert changed > 3


def test_the_random_numbers_of_a_row_are_counted_in_the_tokens_that_it_chose():
    policy = guessing()
    generator, numbers = Recorded(policy), uniforms("training", SAMPLING, range(4))
    rollout = played(policy, generator=generator)
    for turn, draws in enumerate(generator.draws):
        active = (rollout.turns.amax(dim=1) >= turn).nonzero().flatten().tolist()
        for row, own in zip(active, draws, strict=True):
            chosen = int((rollout.mask[row] & (rollout.turns[row] < turn)).sum())
            assert torch.equal(own[: 14 - chosen], numbers[row, chosen:]) and (chosen > 0) == (
                turn > 0
            )


def test_no_turn_follows_the_end_of_an_episode():
    """Also the environment asserts it. In OpenRLHF and miles such turns were sampled, and trained on."""
    policy = guessing()
    generator = Recorded(policy)
    rollout = played(policy, generator=generator)
    counts = [int((rollout.turns.amax(dim=1) >= turn).sum()) for turn in range(Guess.limit)]
    assert [len(histories) for histories in generator.histories] == counts and counts[-1] < counts[
        0
    ]
    # at the limit of turns terminated wins
    assert set(rollout.endings) == {
        "completed",
        "max_tokens",
    }
    for i, messages in enumerate(rollout.messages):
        assert [m["role"] for m in messages[::2]] == ["assistant"] * (
            int(rollout.turns[i].max()) + 1
        )
    capped = played(policy, Environments(Guess, max_turns=1))
    assert set(capped.endings) == {"max_turns", "completed"} and not capped.turns.any()
    assert not capped.truncated.any()
    endless = played(policy, Environments(Guess, max_turns=10**12))
    assert endless.endings == rollout.endings


def test_an_episode_of_one_turn_is_a_completion_with_the_same_random_numbers():
    policy = guessing()
    once = played(policy, Environments(Guess, max_turns=1))
    prompts = [
        row[mask].tolist()
        for row, mask in zip(once.prompt_ids[::3], once.prompt_mask[::3], strict=True)
    ]
    plain = completions(policy, prompts, max_completion_length=14, num_generations=3)
    width = plain.mask.shape[1]
    for name in ("completion_ids", "logprobs", "sampling_logprobs", "mask"):
        x = getattr(once, name)[:, :width]
        assert torch.equal(x[plain.mask], getattr(plain, name)[plain.mask]), name
    greedy = played(policy, num_generations=0)
    assert len(greedy) == 4 and greedy.turns.any()


@pytest.mark.parametrize("limit", [1, 2, 5, 14])
def test_the_limit_of_length_counts_what_the_policy_chose_in_all_turns(limit):
    rollout = played(guessing(), max_completion_length=limit)
    chosen = rollout.mask.sum(dim=1)
    used_up = torch.tensor([ending == "max_tokens" for ending in rollout.endings])
    assert int(chosen.max()) <= limit and used_up.any()
    assert (chosen[used_up] == limit).all() and rollout.truncated[used_up].all()
    assert rollout.mask.shape[1] > limit or limit == 1
    # and a shorter limit cuts the same episodes
    whole = played(guessing(), max_completion_length=14)
    for i in range(12):
        mine = rollout.completion_ids[i][rollout.mask[i]].tolist()
        assert whole.completion_ids[i][whole.mask[i]].tolist()[: len(mine)] == mine


@pytest.mark.parametrize("share", [True, False])
def test_the_episodes_of_a_group_begin_alike(share):
    """In OpenEnv's example of TRL the members of a group had different secrets."""
    policy, environments = guessing(), Environments(Guess, share_seed=share)

    def openings(**how):
        rollout = played(policy, environments, **how)
        texts = policy.decode(rollout.prompt_ids, rollout.prompt_mask)
        groups = [set(texts[i : i + 3]) for i in range(0, 12, 3)]
        assert all(
            text.startswith(prompt)
            for prompt, group in zip(PROMPTS, groups, strict=True)
            for text in group
        )
        return groups

    first = openings()
    assert all(len(group) == 1 for group in first) == share
    observed = {
        text.removeprefix(prompt) for prompt, g in zip(PROMPTS, first, strict=True) for text in g
    }
    assert len(observed) > 1 and openings() == first != openings(step=2)
    assert openings(seed=1) != first


def test_the_observation_of_reset_ends_the_last_message_of_the_user():
    """TRL dropped it where a prompt did not end in that message."""
    rollout, _ = scripted("no<eos>")
    text = chat_policy().tokenizer.decode(rollout.prompt_ids[0])
    assert text == "1 tool.system:s<eos>user:Open it. There is a safe.<eos>assistant:"


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


def test_a_turn_of_the_assistant_in_the_prompt_is_no_action():
    """NeMo-RL trained on it."""
    asked = [
        ASKED[1],
        {"role": "assistant", "content": "Why?"},
        {"role": "user", "content": "Please."},
    ]
    rollout, _ = scripted(call(3) + "<eos>", "done<eos>", prompt=asked)
    decoded = chat_policy().tokenizer.decode
    assert "assistant:Why?<eos>user:Please. There is a safe." in decoded(rollout.prompt_ids[0])
    assert decoded(rollout.completion_ids[0][rollout.mask[0]]) == f"{call(3)}<eos>done<eos>"
    assert [m["role"] for m in rollout.messages[0]] == ["assistant", "tool", "assistant"]


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
    greedy, sampled = played(policy, num_generations=0), played(policy)
    for i in range(4):
        prompt, other = greedy.prompt_ids[i][greedy.prompt_mask[i]], sampled.prompt_ids[3 * i]
        assert torch.equal(prompt, other[sampled.prompt_mask[3 * i]])
        actions = greedy.mask[i].nonzero().flatten()
        ids = torch.cat([prompt, greedy.completion_ids[i][: actions[-1] + 1]])
        likeliest = policy.model(ids[None]).logits[0].argmax(-1)
        assert torch.equal(likeliest[len(prompt) - 1 + actions], greedy.completion_ids[i][actions])


@pytest.mark.parametrize("limit", [len(call(3)), len(call(3)) - 1, 3])
def test_a_call_in_a_turn_that_was_cut_by_length_is_not_executed(limit):
    """In TRL it is, if it happens to be complete, though the policy has not ended its turn."""
    rollout, _ = scripted(call(3) + " and more<eos>", limit=limit)
    assert rollout.environments[0].tries == 0 and rollout.endings == ["max_tokens"]
    assert rollout.truncated.all() and rollout.messages[0] == [
        {"role": "assistant", "content": call(3)[:limit]}
    ]
    assert not rollout.turn_rewards.any()


def test_a_result_that_does_not_fit_ends_the_episode_as_truncated():
    """TRL takes the result back but neither the call nor its reward, and counts the row as one that ended."""
    fits, _ = scripted(call(3) + "<eos>", "done<eos>", answer_length=20)
    size = len(fits.prompt_ids[0])
    # one token less than the history of the second turn
    context = size + int(fits.mask[0].nonzero().max()) - 4
    for room, ending in (
        (1, "context_overflow"),
        (0, "context_overflow"),
        (-1, "context_overflow"),
    ):
        rollout, generator = scripted(
            call(3) + "<eos>", "done<eos>", answer_length=20, context=context + room
        )
        assert len(generator.histories) == 1 + (room == 1) and rollout.endings == [ending]
        assert rollout.truncated.all() and rollout.failures == [""]
        assert [m["role"] for m in rollout.messages[0]][:2] == ["assistant", "tool"]
        assert float(rollout.turn_rewards.sum()) == 0.75 and rollout.environments[0].open


def test_no_row_outgrows_the_context():
    model, tokenizer = letters(context=24)
    policy = wrap(model, tokenizer)

    class Long(Guess):
        def step(self, text):
            return "abcd" * random.randint(0, 3), 1.0, False, False, {}

        def reset(self, seed=None):
            return "a" * random.randint(0, 30), {}

    rollout = played(
        policy, Environments(Long), [f"{x}>" for x in "abcd"] * 5, max_completion_length=12
    )
    lengths = rollout.prompt_mask.sum(dim=1) + rollout.mask.long().cumsum(1).argmax(dim=1) + 1
    assert int(lengths.max()) == 24
    cut = torch.tensor([ending == "context_overflow" for ending in rollout.endings])
    unread = torch.tensor([failure != "" for failure in rollout.failures])
    assert cut.any() and not cut.all() and rollout.truncated[cut].all()
    assert unread.any() and (cut | ~unread).all() and not rollout.mask[unread].any()
    failure = next(filter(None, rollout.failures))
    assert failure.startswith("The prompt with its first observation has ") and failure.endswith(
        "context 24."
    )


def test_a_stop_string_is_looked_for_in_the_tokens_of_a_turn_alone():
    model, tokenizer = letters(context=200)
    policy = wrap(model, tokenizer)
    policy.ask(PromptArguments(stop=("ab",)))

    class Half(Guess):
        def reset(self, seed=None):
            return "a", {}

        def step(self, text):
            return "a", 1.0, False, False, {}

    rollout = played(policy, Environments(Half), ["c>"] * 12, max_completion_length=60)
    across, stop = 0, tokenizer("ab").input_ids
    for ids, mask, turns in zip(rollout.completion_ids, rollout.mask, rollout.turns, strict=True):
        for turn in range(int(turns.max())):  # the last one may be cut
            written = ids[mask & (turns == turn)].tolist()
            pairs = list(pairwise(written))
            assert written[-1] in policy.eos_ids or written[-2:] == stop
            assert tuple(stop) not in pairs[:-1]
            across += turn > 0 and written[0] == stop[1] and len(written) > 2
    assert across > 5  # "a" of the environment and "b" of the policy


def test_rewards_of_turns_are_at_the_last_token_of_their_turn_and_those_of_functions_at_the_end():
    def length(completions, **_):
        return [100.0 * (i + 1) for i in range(len(completions))]

    policy, environments = guessing(), Environments(Guess)
    rewards = Rewards([length], [2.0, 0.5], environments=environments)
    plain = played(policy, environments)
    rollout = reward_rows(policy, rewards, plain, step=1)
    for i in range(12):
        last = [
            int((plain.mask[i] & (plain.turns[i] == k)).nonzero().max())
            for k in range(plain.turns[i].max() + 1)
        ]
        own = plain.turn_rewards[i]
        assert set(own.nonzero().flatten().tolist()) <= set(last)
        wanted = 0.5 * own
        wanted[last[-1]] += 200.0 * (i + 1)
        torch.testing.assert_close(rollout.turn_rewards[i], wanted)
        assert float(rollout.rewards[i]) == pytest.approx(float(wanted.sum()))
        assert rollout.by_function[i].tolist() == [100.0 * (i + 1), pytest.approx(float(own.sum()))]


def test_a_baseline_compares_rows_and_not_turns():
    """verl 7244 subtracts from the reward of each turn the mean of that turn in the rows that reach it."""
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 0]]).bool()
    turns, rewards = torch.tensor([[0, 0, 0, 1], [0] * 4, [0, 0, 1, 0]]), torch.zeros(3, 4).double()
    rewards[0, 1], rewards[0, 3], rewards[1, 0], rewards[2, 2] = 0.3, 1.0, 0.5, -1.0
    estimator = Estimator(baseline="rloo", returns="reward_to_go")
    advantages = estimator.advantages(rewards, mask, group_size=3, turns=turns).policy
    others = [(0.5 - 1.0) / 2, (1.3 - 1.0) / 2, (1.3 + 0.5) / 2]
    wanted = torch.tensor([[1.3, 1.3, 0, 1.0], [0.5, 0, 0, 0], [-1.0, 0, -1.0, 0]]).double()
    torch.testing.assert_close(advantages, (wanted - torch.tensor(others).double()[:, None]) * mask)


def test_of_200_episodes_that_fail_at_random_none_is_lost_and_each_failure_is_named():
    Faulty.faults.clear()
    policy, environments = guessing(), Environments(Faulty, timeout=0.25)
    rewards = Rewards([], environments=environments)
    prompts = [PROMPTS[i % 4] for i in range(25)]
    before = random.getstate()
    rollout = reward_rows(
        policy, rewards, played(policy, environments, prompts, num_generations=8), step=1
    )
    assert len(rollout) == len(rollout.messages) == 200 and random.getstate() == before
    faults, endings = Faulty.faults, rollout.endings
    assert set(endings) <= set(ENDINGS) and min(faults.values()) > 0
    assert endings.count("timeout") == faults["hang"]
    assert endings.count("error") == faults["fail"] + faults["nan"] + faults["nothing"]
    logged = rollout.logged[0][0]
    assert {name: logged[f"episodes/{name}"] * 200 for name in ENDINGS} == {
        name: pytest.approx(endings.count(name)) for name in ENDINGS
    }
    words = {
        "raised OSError: the disk is full (tiny_environments.py, line",
        "nan",
        "returned None",
        "within 0.25 s",
    }
    for i, (ending, failure) in enumerate(zip(endings, rollout.failures, strict=True)):
        failed = ending in ("error", "timeout")
        assert (
            failed
            == bool(failure)
            == (not rollout.valid[i])
            == bool(rollout.by_function[i].isnan().all())
        )
        if failed:
            assert not rollout.turn_rewards[i].any()
            assert failure.startswith(("Faulty.step ", "Faulty.reset "))
            assert sum(word in failure for word in words) >= 1, failure
    reached = rollout.mask.any(dim=1)
    turns = sum(message["role"] == "assistant" for chat in rollout.messages for message in chat)
    assert logged["episodes/turns"] * 200 == pytest.approx(turns)
    assert not reached.all() and all(
        rollout.failures[i].startswith("Faulty.reset") for i in (~reached).nonzero()
    )
