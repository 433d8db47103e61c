"""The page on allowed tokens, computed a second time: text by text, with the package's automaton, and by the lab."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from statistics import median

import allowed
import pytest
import torch
from folders import RECIPES
from pages import section

from tokenrl.core.estimator import Estimator
from tokenrl.lab import all_completions, exact_moments, off_policy_moments, tabular_problem
from tokenrl.language.policy.model import wrap
from tokenrl.language.rollout.allowed import with_allowed
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import score

PAGE = RECIPES / "pages" / "explain" / "allowed.md"
ROWS = all_completions(4, 3)


def lab_texts(seed):
    """The texts of a problem, with the number of each among all completions."""
    case = allowed.problem_case(seed)
    every = [tuple(ids[m > 0].tolist()) for ids, m in zip(ROWS.ids, ROWS.mask, strict=True)]
    texts = [tuple(ids[m].tolist()) for ids, m in zip(case.ids, case.mask, strict=True)]
    return {text: every.index(text) for text in texts}


def lab_policy(seed, table="logprobs"):
    """Parameters, a function of the log-probabilities of each text's tokens (masked, unmasked), and rewards."""
    problem = tabular_problem(seed, vocabulary=4, length=3)
    texts = lab_texts(seed)
    prefixes = sorted({text[:t] for text in texts for t in range(len(text))})
    weights = torch.empty(len(prefixes), 4, dtype=torch.double)
    for m, ids in enumerate(ROWS.ids.tolist()):
        for t in range(int(ROWS.mask[m].sum())):
            if tuple(ids[:t]) in prefixes:
                weights[prefixes.index(tuple(ids[:t])), ids[t]] = getattr(problem, table)[0, m, t]
    weights.requires_grad_()

    def scores():
        for text in texts:
            whole = [weights[prefixes.index(text[:t])].log_softmax(-1) for t in range(len(text))]
            taken = [row[i] for row, i in zip(whole, text, strict=True)]
            kept = []
            for t, row in enumerate(whole):
                others = {other[t] for other in texts if len(other) > t and other[:t] == text[:t]}
                kept.append(row[[*others]].logsumexp(-1))
            yield [x - y for x, y in zip(taken, kept, strict=True)], taken

    return [weights], scores, problem.totals[0, [*texts.values()]].tolist()


@cache
def schema_policy(seed, warm):
    """The same of a tiny model, whose texts are all ways through the automaton that the package makes."""
    policy = wrap(allowed.tiny_model(seed), allowed.TOKENIZER)
    sampling = with_allowed(policy, [{}], Sampling(9, allowed=allowed.SCHEMA))
    rules = sampling.allowed
    ways, ended = [((), (), rules.beginning([{}], 9).begins)], []
    for ids, keys, key in ways:
        kept = rules.restricted(torch.zeros(1, len(allowed.TOKENIZER)), key)[0] == 0
        for token in kept.nonzero().flatten().tolist():
            after, _ = rules.following(key, torch.tensor([token]))
            way = (*ids, token), (*keys, int(key)), after
            (ended if token in policy.eos_ids else ways).append(way)
    texts = [policy.tokenizer.decode(ids[:-1]) for ids, *_ in ended]
    assert sorted(texts) == sorted(allowed.TEXTS)
    ids, keys = (torch.zeros(len(ended), 9, dtype=torch.long) for _ in range(2))
    for row, (tokens, of_tokens, _) in enumerate(ended):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        keys[row, : len(tokens)] = torch.tensor(of_tokens)
    lengths = [len(tokens) for tokens, *_ in ended]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    prompt = torch.tensor([policy.encode(allowed.PROMPT)]).expand(len(ids), -1)
    none = torch.zeros(len(ids), dtype=torch.long)
    visible = torch.ones_like(prompt, dtype=torch.bool)
    rollout = Rollout(prompt, visible, none, ids, mask, mask.double(), none.bool(), keys)

    def scores():
        masked = score(policy.model, rollout, distribution=sampling).logprobs
        unmasked = score(policy.model, rollout).logprobs
        for row, length in enumerate(lengths):
            yield masked[row, :length].unbind(), unmasked[row, :length].unbind()

    parameters = [*policy.model.parameters()]
    for _ in range(warm):
        move(parameters, gradient_of(parameters, sum(sum(row) for _, row in scores())))
    return parameters, scores, [float(sum(map(int, re.findall(r"\d", x))) == 4) for x in texts]


def gradient_of(parameters, gain):
    return torch.cat([x.flatten() for x in torch.autograd.grad(gain, parameters)])


def move(parameters, gradient):
    assert allowed.LENGTH == 0.1
    ends = [0, *torch.tensor([x.numel() for x in parameters]).cumsum(0).tolist()]
    for x, (start, end) in zip(parameters, pairwise(ends), strict=True):
        x.data += (gradient[start:end] / gradient.norm() / 10).view_as(x)


def expected_gradient(parameters, scores, rewards, rule):
    """The expected gradient of a rule, text by text."""
    scored, _, baseline = rule.partition(", ")
    rows = [*scores()]
    chances = [math.exp(sum(x.item() for x in masked)) for masked, _ in rows]
    mean = sum(map(float.__mul__, chances, rewards)) if baseline == "mean" else 0.0
    gain = 0.0
    for (masked, unmasked), chance, reward in zip(rows, chances, rewards, strict=True):
        ratios = [math.exp(x.item() - y.item()) for x, y in zip(unmasked, masked, strict=True)]
        # So no cap of 1 or more changes a weight.
        assert max(ratios) < 1 + 1e-12
        if scored == "sequence":
            ratios = [math.prod(ratios)] * len(ratios)
        if scored in ("as sampled", "unmasked"):
            ratios = [1.0] * len(ratios)
        taken = masked if scored == "as sampled" else unmasked
        gain = gain + chance * (reward - mean) * sum(
            w * x for w, x in zip(ratios, taken, strict=True)
        )
    return gradient_of(parameters, gain)


def numbers(policy, rule):
    """What the recipe measures."""
    parameters, scores, rewards = policy

    def total(which, factors):
        return sum(f * sum(row[which]).exp() for f, row in zip(factors, scores(), strict=True))

    assert total(0, [1] * len(rewards)).item() == pytest.approx(1, abs=1e-12)
    true, of_language = (gradient_of(parameters, total(which, rewards)) for which in (0, 1))
    gradient = expected_gradient(parameters, scores, rewards, rule)
    cosines = [float(gradient @ x / gradient.norm() / x.norm()) for x in (true, of_language)]
    off = float((gradient - true).norm() / true.norm())
    start = [x.detach().clone() for x in parameters]
    for _ in range(allowed.STEPS):
        move(parameters, expected_gradient(parameters, scores, rewards, rule))
    ends = [total(0, rewards).item(), total(1, [1] * len(rewards)).item()]
    for x, old in zip(parameters, start, strict=True):
        x.data = old
    return dict(
        zip(("off", "cosine", "language", "after", "inside"), (off, *cosines, *ends), strict=True)
    )


RULES = ["as sampled"] + [
    f"{x}, {b}" for x in ("unmasked", "token", "sequence") for b in ("none", "mean")
]


@pytest.mark.parametrize("rule", RULES)
def test_the_recipe_measures_what_a_loop_over_the_texts_does(rule):
    assert [*allowed.RULES] == RULES
    for seed in (0, 3):
        measured = allowed.measured(allowed.problem_case, rule, seed)
        expected = numbers(lab_policy(seed), rule)
        assert {x: measured[x] for x in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rule", [RULES[0], RULES[2], RULES[5]])
def test_the_recipe_measures_what_the_automaton_and_the_scores_of_the_package_do(rule):
    measured = allowed.measured(lambda seed: allowed.schema_case(seed, 2), rule, 1)
    expected = numbers(schema_policy(1, 2), rule)
    assert {x: measured[x] for x in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", [0, 3])
def test_estimators_of_the_lab_have_these_gradients(seed):
    texts = lab_texts(seed)
    mask = torch.tensor(
        [
            [any(x[: len(p) + 1] == (*p, token) for x in texts) for token in range(4)]
            for p in ROWS.prefixes
        ]
    )
    mask |= ~mask.any(1, keepdim=True)
    problem = tabular_problem(
        seed, vocabulary=4, length=3, sampler=lambda z: z.masked_fill(~mask, -1e4)
    )
    inside = torch.isin(torch.arange(len(ROWS.ids)), torch.tensor([*texts.values()]))
    of_language = replace(problem, rewards=problem.rewards * inside).gradient().sum(0)
    for rule in RULES[1:]:
        weights, baseline = rule.split(", ")
        fields = {} if weights == "unmasked" else {"importance": weights}
        estimator = Estimator.preset("rloo" if baseline == "mean" else "reinforce", **fields)
        _, moments = off_policy_moments(estimator, problem)
        measured = allowed.measured(allowed.problem_case, rule, seed)
        cosine = torch.cosine_similarity(moments.mean.sum(0), of_language, 0)
        expected = moments.relative_bias, moments.cosine, float(cosine)
        assert [measured[x] for x in ("off", "cosine", "language")] == pytest.approx(expected)
        assert (rule == "sequence, none") == torch.allclose(moments.mean.sum(0), of_language)
    assert exact_moments(Estimator.preset("rloo"), problem.of_sampler).status == "exact"


@pytest.mark.parametrize("table", ["ref_logprobs", "logprobs"])
def test_the_kl_to_the_reference_as_it_is_adds_what_its_mask_would_take(table):
    """The KL of each prefix in closed form, by the chance of the prefix."""
    measured = allowed.divergences(table, 3)
    parameters, scores, _ = lab_policy(3)
    _, reference, _ = lab_policy(3, table)
    alike = taken = 0.0
    for (masked, _), (ref_masked, ref) in zip(scores(), reference(), strict=True):
        chance = sum(masked).exp()
        alike += chance * (sum(masked) - sum(ref_masked).detach())
        taken += chance * sum(x.detach() - y.detach() for x, y in zip(ref_masked, ref, strict=True))
    expected = {"alike": alike.item(), "as it is": (alike + taken).item()}
    for name, kl in (("alike", alike), ("as it is", alike + taken)):
        (slope,) = torch.autograd.grad(kl, parameters, retain_graph=True)
        expected[f"gradient {name}"] = float(slope.norm())
    assert measured == pytest.approx(expected, abs=1e-12)
    assert (measured["alike"] < 1e-12) == (table == "logprobs")


def cells(part):
    """The numbers of the rows of the tables of the page, by rule: of each table, and of each row."""
    rows = re.findall(r"(?m)^\| (as sampled|unmasked) \| ?(\w*) \| (\w+) \| (.*)", part)
    for name, weights, baseline, text in rows:
        rule = name if name == "as sampled" else f"{weights or 'unmasked'}, {baseline}"
        yield rule, [float(x) for x in re.findall(r"-?\d*\.\d+", text)]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_the_page_has_these_numbers(rule):
    page = [*cells(section(PAGE, "How far off"))]
    assert [name for name, _ in page] == RULES * 3
    lab, offs, ends = (row for name, row in page if name == rule)

    def columns(policies):
        drawn = [numbers(policy, rule) for policy in policies]
        return {name: [row[name] for row in drawn] for name in drawn[0]}

    x = columns(lab_policy(seed) for seed in range(100))
    expected = median(x["off"]), min(x["off"]), max(x["off"]), median(x["cosine"]), min(x["cosine"])
    expected += median(x["after"]), median(x["inside"])
    assert lab == pytest.approx(expected, abs=6e-4)
    for k, warm in enumerate((0, 50, 200)):
        x = columns(schema_policy(seed, warm) for seed in range(3))
        medians = [median(x[name]) for name in ("off", "cosine", "after", "inside")]
        shown = offs[2 * k : 2 * k + 2] + ends[2 * k : 2 * k + 2]
        assert shown == pytest.approx(medians, abs=6e-4)
