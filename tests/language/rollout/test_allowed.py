"""Completions that a rule allows: all are in its language, and the gradient is that of the policy that sampled them."""

import copy
import math
import re
from dataclasses import replace
from itertools import count

import pytest
import torch
from tiny_models import (
    Engine,
    apart,
    gradient,
    letter_task,
    letters,
    letters_trained,
    make_learner,
    make_policy,
    one_step,
    recorded,
    scored,
    textbook_logprobs,
    vowel_reward,
    weights,
)

import tokenrl
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.language.policy.automata import Automaton
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.allowed import with_allowed
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import sample_rows
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import score

CHOICES = {
    "the cat": ["the cat", "the dog", "the", "a log and the dog sat on the mat"],
    "a": ["12 34", "12", "56"],
    "count to ten one two": ["one two", "one ten"],
    "sat on the": ["mat"],
}
"""Texts of one to seven tokens: the longest does not fit into a completion, and one is the beginning of others."""
ROWS = [{"prompt": prompt, "options": texts} for prompt, texts in CHOICES.items()]
LENGTH = 6
RULE = {"allowed": "choices:options", "max_completion_length": LENGTH, "rows": ROWS}
SEVERAL = {"optimizer": "sgd", "num_iterations": 3, "learning_rate": 0.05}


def policy_of(architecture="gpt2", seed=0):
    return make_policy(architecture, dtype="float64", initializer_range=0.1, seed=seed)


def sequences(policy, prompt):
    """The completions of a prompt that fit, as ids with EOS."""
    ids = [policy.tokenizer(text)["input_ids"] for text in CHOICES[prompt]]
    return [(*row, policy.eos_ids[0]) for row in ids if len(row) < LENGTH]


def masked_logprobs(policy, model, prompt, completion, **distribution):
    """Log-probabilities of all tokens [T, V] under the masked policy, from the list of completions that fit."""
    fitting = sequences(policy, prompt)
    before = policy.encode(prompt)
    logits = model(torch.tensor([[*before, *completion]])).logits[0, len(before) - 1 : -1]
    rows = []
    for t, row in enumerate(logits):
        allowed = {ids[t] for ids in fitting if ids[:t] == tuple(completion[:t])}
        masked = torch.full_like(row, -math.inf)
        masked[[*allowed]] = row[[*allowed]]
        rows.append(textbook_logprobs(masked[None], **distribution)[0])
    return torch.stack(rows)


def advantages_of(rewards, size=3):
    rewards = torch.tensor(rewards, dtype=torch.float64).view(-1, size)
    return (rewards - (rewards.sum(1, keepdim=True) - rewards) / (size - 1)).flatten()


def loss_of(policy, model, reference, seen, advantages, old, *, mean, beta=0.0, entropy=0.0, **how):
    """The loss of a step, row by row and token by token."""
    tokens = sum(len(ids) for _, ids, _ in seen)
    loss = 0.0
    for i, (prompt, ids, _) in enumerate(seen):
        logp = masked_logprobs(policy, model, prompt, ids, **how)
        chosen = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
        ratio = (chosen - (chosen if old is None else old[i]).detach()).exp()
        gain = torch.minimum(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
        terms = -gain
        if entropy:
            kept = [row[row > -math.inf] for row in logp]
            terms = terms + entropy * torch.stack([(row.exp() * row).sum() for row in kept])
        if beta:
            with torch.no_grad():
                ref = masked_logprobs(policy, reference, prompt, ids)
            if beta == "closed":
                pairs = [
                    (a[a > -math.inf], b[a > -math.inf]) for a, b in zip(logp, ref, strict=True)
                ]
                terms = terms + 0.3 * torch.stack([(a.exp() * (a - b)).sum() for a, b in pairs])
            else:
                gap = ref.gather(1, torch.tensor(ids)[:, None])[:, 0] - chosen
                terms = terms + 0.3 * (gap.exp() - 1 - gap)
        loss = loss + terms.sum() / (tokens if mean else len(seen))
    return loss


CASES = {
    "reinforce": ({"preset": "reinforce"}, {}, {}),
    "rloo": ({}, {}, {}),
    "token mean": ({"aggregation": "token_mean"}, {"mean": True}, {}),
    "entropy": ({"entropy_coef": 0.2}, {"entropy": 0.2}, {}),
    "kl in the loss": (
        {"beta": 0.3, "kl_placement": "loss", "kl_estimator": "k3"},
        {"beta": "k3"},
        {},
    ),
    "kl in closed form": (
        {"beta": 0.3, "kl_placement": "loss", "kl_estimator": "closed_form"},
        {"beta": "closed"},
        {},
    ),
    "top_k": ({}, {"top_k": 2}, {"top_k": 2}),
    "top_p, temperature": (
        {},
        {"top_p": 0.95, "temperature": 1.5},
        {"top_p": 0.95, "temperature": 1.5},
    ),
    "micro-batches": ({}, {}, {"micro_batch_size": 2}),
    "sampled in parts": ({}, {}, {"sampling_batch_size": 3}),
}


@pytest.mark.parametrize("at_once", [None, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_policy_that_sampled(name, at_once):
    fields, oracle, options = CASES[name]
    policy = policy_of()
    before = copy.deepcopy(policy.model)
    estimator = Estimator.preset(fields.get("preset", "rloo"))
    estimator = replace(estimator, **{k: v for k, v in fields.items() if k != "preset"})
    if estimator.beta:
        policy.reference = policy_of(seed=1).model.requires_grad_(False)
    learner = scored(make_learner(policy, estimator, **RULE, **options), tokens_at_once=at_once)
    seen = []
    record = one_step(learner, prompts=ROWS, reward=recorded(vowel_reward, seen))
    rewards = [x for *_, x in seen]
    advantages = rewards if name == "reinforce" else advantages_of(rewards)
    oracle = {"mean": False} | oracle
    loss = loss_of(policy, before, policy.reference, seen, advantages, None, **oracle)
    loss.backward()
    assert gradient(before).norm() > 0.01
    assert apart(gradient(policy.model), gradient(before)) < 1e-12
    assert all(tuple(ids) in sequences(policy, prompt) for prompt, ids, _ in seen)
    assert len({tuple(ids) for _, ids, _ in seen}) > 4
    assert record.metrics["completions/clipped_ratio"] == 0


def test_several_updates_are_those_of_an_independent_loop():
    policy = policy_of()
    model = copy.deepcopy(policy.model)
    estimator = replace(Estimator.preset("rloo"), ratio="token", epsilon=0.2)
    learner = make_learner(policy, estimator, **RULE, **SEVERAL)
    seen = []
    one_step(learner, prompts=ROWS, reward=recorded(vowel_reward, seen))
    advantages = advantages_of([x for *_, x in seen])
    old = []
    for prompt, ids, _ in seen:
        logp = masked_logprobs(policy, model, prompt, ids).detach()
        old.append(logp.gather(1, torch.tensor(ids)[:, None])[:, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(policy, model, None, seen, advantages, old, mean=False).backward()
        optimizer.step()
    start = weights(policy_of().model)
    assert (weights(model) - start).norm() > 0.01
    assert apart(weights(policy.model) - start, weights(model) - start) < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_all_completions_that_fit_have_probability_one_together(architecture):
    """The sampler's log-probabilities are those of the masked policy, and those of all completions sum to one."""
    policy = policy_of(architecture)
    sampling = with_allowed(policy, ROWS, Sampling(LENGTH, 400, allowed="choices:options"))
    generator = TransformersGenerator(policy)
    rollout = sample_rows(policy, generator, [*enumerate(ROWS)], sampling, "interactive", None)
    assert not rollout.truncated.any()
    again = score(policy.model, rollout, distribution=sampling)
    assert torch.allclose(again.logprobs, rollout.logprobs, atol=1e-12)
    for number, row in enumerate(ROWS):
        fitting = sequences(policy, row["prompt"])
        own = (rollout.prompt_index == number).nonzero().flatten().tolist()
        drawn = {tuple(rollout.completion_ids[i][rollout.mask[i]].tolist()): i for i in own}
        assert {*drawn} == {*fitting}
        totals = []
        for ids in fitting:
            logp = masked_logprobs(policy, policy.model, row["prompt"], ids)
            total = logp.gather(1, torch.tensor(ids)[:, None]).sum().detach()
            assert float(rollout.logprobs[drawn[ids]].sum()) == pytest.approx(
                float(total), abs=1e-12
            )
            totals.append(float(total.exp()))
        assert sum(totals) == pytest.approx(1, abs=1e-12)
    # A single way to go on has probability 1 and entropy 0, and no gradient.
    only = rollout.logprobs[rollout.prompt_index == 3]
    assert (only == 0).all() and (rollout.entropy[rollout.prompt_index == 3] == 0).all()


@pytest.mark.parametrize("length", range(2, 9))
def test_no_completion_is_cut_at_any_limit(length):
    """An automaton of balanced brackets of depth 3: the closing ones are written in time."""
    edges = [{" t": 1}, {" t": 2, " a": 0}, {" t": 3, " a": 1}, {" a": 2}]
    policy = policy_of()
    sampling = Sampling(length, 60, allowed=Automaton(edges, accepting=[0]))
    rollout = sample_rows(
        policy,
        TransformersGenerator(policy),
        [(0, {"prompt": "a"})],
        with_allowed(policy, [{"prompt": "a"}], sampling),
        "interactive",
        None,
    )
    texts = {text.replace(" ", "") for text in policy.decode(rollout.completion_ids, rollout.mask)}
    assert max(map(len, texts)) == (length - 1) // 2 * 2
    for text in texts:
        depth = 0
        for letter in text:
            depth += 1 if letter == "t" else -1
            assert 0 <= depth <= 3
        assert depth == 0
    assert not rollout.truncated.any()


def test_episodes_write_each_turn_by_the_rule_and_end_without_room_for_one():
    class Turns:
        def reset(self, seed=None):
            return "a", {}

        def step(self, text):
            return " the", 1.0, False, False, {}

    policy = policy_of()
    rewards = Rewards([], environments=Environments(Turns, max_turns=4))
    sampling = Sampling(9, 20, allowed=Automaton([{" a": 1, " t": 0}, {" t": 2}, {}], [2]))
    sampling = with_allowed(policy, ROWS[:1], sampling)
    generator = TransformersGenerator(policy)
    rollout = sample_rows(
        policy, generator, [(0, ROWS[0])], sampling, "interactive", rewards.environments
    )
    assert {*rollout.endings} == {"max_tokens"} and not any(rollout.failures)
    for row, messages in enumerate(rollout.messages):
        texts = [m["content"] for m in messages if m["role"] == "assistant"]
        assert texts and all(re.fullmatch("( t)* a t", text) for text in texts)
        assert 9 - 3 < int(rollout.mask[row].sum()) <= 9
    again = score(policy.model, rollout, distribution=sampling)
    assert torch.allclose(again.logprobs, rollout.logprobs, atol=1e-12)


ABC = {"model": None, "max_completion_length": 4}


def trained(folder, **options):
    return letters_trained(folder, letter_task(vowel_reward), **options)


def test_a_run_saves_its_rule_and_evaluations_take_it(tmp_path):
    """The file of the schema may be gone by then."""
    (tmp_path / "mine.json").write_text(
        '{"edges": [[["a", 0], ["b", 1]], [["c", 1]]], "accepting": [1]}'
    )
    run = trained(tmp_path / "run", allowed=str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").unlink()
    evaluation = tokenrl.evaluate(
        model=str(tmp_path / "run"), task=letter_task(vowel_reward), quiet=True, num_generations=8
    )
    texts = {row["completion"] for row in evaluation.rows}
    assert all(re.fullmatch("a*bc*", text) for text in texts)
    assert evaluation.metrics["completions/clipped_ratio"] == 0
    assert run.exit_reason == "finished"
    (same,) = tokenrl.sample(
        model=str(tmp_path / "run"), prompt="ab>", allowed="a*bc*", num_generations=9
    )
    assert all(re.fullmatch("a*bc*", text) for text in same)


def test_demonstrations_that_the_rule_refuses_are_named(tmp_path):
    rows = [{"prompt": "ab>", "completion": text} for text in ("ab", "ba")]
    options = {"model": letters(), "output_dir": tmp_path / "run", "cpu": True, "quiet": True}
    with pytest.raises(Refused, match=r"row 1.*after 'b' it goes on with 'a"):
        tokenrl.sft(task=rows, allowed="a*b*", **options)
    assert tokenrl.sft(task=rows, allowed="(ab?|b?a)*", max_steps=1, **options).steps == 1


COUNTS = count()


def changing(row):
    return f"a{{{next(COUNTS)}}}"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("a{9}", "no completion of 4 tokens; the shortest has 10, EOS"),
        ("x", "the tokenizer cannot write"),
        ("[", "cannot be read"),
        ("choices:options", "column 'options', which holds None in row 0"),
        (changing, "when it was asked again"),
        (lambda row: 1 / 0, "The function of allowed failed for row 0: .*ZeroDivisionError"),
        (lambda row: 5, "it must be a regular expression"),
        (lambda row: ["a", "ax"], "for row 0: the tokenizer cannot write 'ax'"),
        (7, "it must be a regular expression"),
        ("missing.json", "there is no file missing.json"),
        ("missing.py:rule", "there is no file missing.py"),
        (Automaton([{"a": 0}, {}], [1]), r"\[0\] are none of them or have no way"),
    ],
)
def test_a_rule_is_refused_before_the_first_step(rule, words, tmp_path):
    with pytest.raises(Refused, match=words):
        trained(tmp_path / "run", allowed=rule)


def test_stop_strings_and_other_engines_are_refused(tmp_path):
    with pytest.raises(Refused, match="and so does stop"):
        trained(tmp_path / "run", allowed="a*", stop="b")
    with pytest.raises(
        Refused, match=r"allowed was given as a\*; <lambda> does not sample with it"
    ):
        trained(tmp_path / "run", allowed="a*", generator=lambda policy, rows: Engine(policy))
