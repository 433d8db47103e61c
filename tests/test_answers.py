"""The answers by enumeration, computed a second time: by loops over whole groups of completions, and by autograd."""

from __future__ import annotations

import itertools
import math
import re
import runpy
from collections import Counter

import pytest
import torch
from folders import RECIPES
from torch.testing import assert_close

PAGES = RECIPES / "pages" / "explain" / "answers"
SEEDS = (0, 3)


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPES / "enumeration" / "answers.py"))


def rows_of(problem):
    """Chance, reward and score of each completion."""
    scores = problem.scores.sum(-2)[0]
    return list(zip(problem.chances[0].tolist(), problem.totals[0].tolist(), scores, strict=True))


def expected(weights, drawn):
    """The mean and the second moment of a weighted sum of scores, over groups of whole completions."""
    mean, second, total = 0.0, 0.0, 0.0
    for group in drawn:
        chance = 1.0
        for row in group:
            chance *= row[0]
        factors = weights(tuple(round(row[1], 12) for row in group))
        gradient = sum(w * row[2] for w, row in zip(factors, group, strict=True))
        mean, second, total = (
            mean + chance * gradient,
            second + chance * gradient @ gradient,
            total + chance,
        )
    assert total == pytest.approx(1)
    return mean, float(second)


def until_two_differ(rows, most):
    """All ways to sample until two rewards differ, by recursion."""

    def further(group):
        if len({row[1] for row in group}) > 1 or len(group) == most:
            return [group]
        return [longer for row in rows for longer in further((*group, row))]

    return [group for row in rows for group in further((row,))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["rloo", "positive", "negative", "standardised"])
def test_levels_give_the_moments_of_whole_completions(recipe, name, seed):
    problem = recipe["shared_problem"](seed)
    weights = recipe[name]
    drawn = itertools.product(recipe["levels_of"](problem), repeat=3)
    moments, size = recipe["moments_of"](weights, drawn, problem)
    mean, second = expected(weights, itertools.product(rows_of(problem), repeat=3))
    assert size == pytest.approx(3)
    assert_close(moments.mean[0], mean)
    assert moments.second == pytest.approx(second)
    p = sum(chance * reward for chance, reward, _ in rows_of(problem))
    factor = {"rloo": 1, "positive": 1 - p, "negative": p}.get(name, moments.scale)
    assert_close(mean, factor * gradient_of(problem))


def gradient_of(problem):
    """The gradient of the expected reward."""
    return sum(chance * reward * score for chance, reward, score in rows_of(problem))


@pytest.mark.parametrize("rewards", ["binary", "graded"])
@pytest.mark.parametrize("name", ["rloo", "earlier"])
def test_groups_of_random_size(recipe, name, rewards):
    problem = recipe["shared_problem"](2, rewards)
    levels = recipe["levels_of"](problem)
    moments, size = recipe["moments_of"](
        recipe[name], recipe["adaptive_groups"](levels, 4), problem
    )
    drawn = until_two_differ(rows_of(problem), 4)
    mean, second = expected(recipe[name], drawn)
    assert_close(moments.mean[0], mean)
    assert moments.second == pytest.approx(second)
    mean_size = sum(len(group) * math.prod(row[0] for row in group) for group in drawn)
    assert size == pytest.approx(mean_size)
    target = (size - 1) * gradient_of(problem)
    if name == "earlier":
        assert_close(mean, target)
    else:
        assert (moments.cosine == pytest.approx(1, abs=1e-12)) == (rewards == "binary")


def test_a_verifier_that_errs_scales_the_gradient(recipe):
    problem = recipe["shared_problem"](1)
    noisy = recipe["flipped"](problem, 0.3, 0.1, False)
    assert float(noisy.chances.sum()) == pytest.approx(1)
    observed = sum(
        chance * (0.3 + 0.6 * reward) * score for chance, reward, score in rows_of(problem)
    )
    assert_close(noisy.gradient()[0], observed)
    assert_close(noisy.gradient(), 0.6 * problem.gradient())
    long = recipe["flipped"](problem, 0.3, 0.1, True)
    assert not torch.allclose(long.gradient(), 0.6 * problem.gradient(), rtol=1e-3)
    corrected = recipe["flipped"](problem, 0.3, 0.1, True, True)
    assert_close(corrected.gradient(), problem.gradient())


@pytest.mark.slow
def test_the_errors_of_answers_with_more_of_the_squared_scores_are_noisier(recipe):
    counts = Counter()
    for problem in map(recipe["shared_problem"], range(20)):
        wrong, right = recipe["levels_of"](problem)
        noises = []
        for errors in ((0.2, 0.0), (0.0, 0.2)):
            noisy = recipe["levels_of"](recipe["flipped"](problem, *errors, False))
            moments, _ = recipe["moments_of"](
                recipe["rloo"], itertools.product(noisy, repeat=4), problem
            )
            noises.append(moments.noise)
        of_wrong = wrong.chance * wrong.norm > right.chance * right.norm
        assert (noises[0] > noises[1]) == of_wrong
        counts[right.chance > 0.5, of_wrong] += 1
    # As two pages say: 15 problems, also three of the five with p above .5.
    assert counts == {(False, True): 12, (False, False): 3, (True, True): 3, (True, False): 2}


def test_the_forms_of_distillation_differ_for_feedback_of_the_row_alone(recipe):
    """From log-probabilities and KLs of each row, in loops."""
    failure, success, own = recipe["teachers_of"](0)
    form = recipe["Estimator"].preset
    for problem in (failure, success, own):
        sampled, closed = 0.0, 0.0
        for m, chance in enumerate(problem.chances[0]):
            length = int(problem.mask[m].sum())
            for t in range(length):
                score = problem.scores[0, m, t]
                ratios = (problem.ref_logprobs - problem.logprobs)[0, m, t:length]
                sampled = sampled + chance * ratios.sum() * score
                later = problem.token_kl[0, m, t + 1 : length].sum()
                closed = closed - chance * (problem.kl_slopes[0, m, t] + later * score)
        assert_close(recipe["distilled"](form("opd_to_go"), problem), sampled)
        assert_close(recipe["distilled"](form("opd_full_path"), problem), closed)
        assert torch.allclose(sampled, closed) == (problem is not own)
    right = own.rewards[0].bool()
    assert torch.equal(own.token_kl[0][right], success.token_kl[0][right])
    assert torch.equal(own.token_kl[0][~right], failure.token_kl[0][~right])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_tokens_that_are_kept_have_the_highest_entropies(recipe, share):
    problem = recipe["shared_problem"](4, "continuous")
    kept = recipe["most_uncertain"](problem, share).bool()
    visits = problem.chances[0][:, None] * problem.mask
    on = problem.mask.bool()
    assert float((visits * kept).sum() / visits.sum()) >= share - 1e-9
    if share == 1:
        assert torch.equal(kept, on)
    else:
        entropy = problem.entropy[0]
        least = entropy[kept].min()
        assert least >= entropy[on & ~kept].max()
        above = float((visits * (entropy > least)).sum() / visits.sum())
        assert above < share  # no threshold above it keeps enough


@pytest.mark.parametrize("lag", [1, 4])
def test_a_sampler_that_is_behind_biases_rloo_as_loops_say(recipe, lag):
    problem = recipe["lagged_problem"](0, lag)
    sampled = problem.sampler.logprobs.sum(-1)[0].exp()
    rewards, scores = problem.totals[0], problem.scores.sum(-2)[0]
    ratios = problem.chances[0] / sampled
    assert float(sampled.sum()) == pytest.approx(1)
    for importance, weights in (("none", torch.ones_like(ratios)), ("sequence", ratios)):
        mean = torch.zeros_like(scores[0])
        for i, j in itertools.product(range(len(rewards)), repeat=2):
            mean += sampled[i] * sampled[j] * weights[i] * (rewards[i] - rewards[j]) * scores[i]
        estimator = recipe["Estimator"](importance=importance)
        moments, _ = recipe["off_policy_moments"](estimator, problem)
        assert_close(moments.mean[0], mean)
        assert (moments.relative_bias < 1e-9) == (importance == "sequence")


@pytest.mark.slow
def test_the_pages_show_what_the_program_prints(recipe, capsys, monkeypatch):
    """Each number of a table of a page is printed, rounded to as many digits."""
    pages = {"signs": "positives", "verifier": "verifier", "adaptive": "adaptive"}
    pages |= {"informed": "teacher_context", "entropies": "entropy_tokens"}
    for section, page in pages.items():
        recipe["main"]((section,))
        printed = [float(x) for x in re.findall(r"-?\d+\.\d{3}", capsys.readouterr().out)]
        table = re.findall(r"^\|(.*)\|$", (PAGES / f"{page}.md").read_text(), re.MULTILINE)[2:]
        for line in table:
            for cell in line.split("|")[1:]:
                for number in re.findall(r"(?<![\d.])-?\d*\.\d+", cell):
                    digits = len(number.partition(".")[2])
                    assert any(round(x, digits) == float(number) for x in printed), (page, cell)
    recipe["main"](("stale",))
    out = capsys.readouterr().out
    table = re.findall(
        r"^\| (\d+) steps? \| (\S+) \((\S+)\) \| (\S+) \((\S+)\) \| (\S+) \((\S+)\)",
        (PAGES.parent / "off_policy.md").read_text(),
        re.MULTILINE,
    )
    assert len(table) == 3
    for behind, *cells in table:
        rows = re.findall(
            rf"^{behind} steps, .* (\d\.\d+) +(\d+\.\d+) +\d+\.\d+$", out, re.MULTILINE
        )
        assert [float(x) for x in cells] == [float(x) for pair in rows[:3] for x in pair]
