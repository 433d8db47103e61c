"""The answers by enumeration, computed a second time: by loops over whole groups of completions, and by autograd."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import answers
import pytest
import torch
from folders import RECIPES
from pages import section
from torch.testing import assert_close

PAGES = RECIPES / "pages" / "explain"
SEEDS = (0, 3)


def rows_of(problem):
    """Each completion as a level of its own."""
    scores = problem.scores.sum(-2)[0]
    rows = zip(problem.totals[0], problem.chances[0], scores, strict=True)
    return [
        answers.Level(round(float(reward), 12), float(chance), score, None)
        for reward, chance, score in rows
    ]


def gradient_of(problem):
    """The gradient of the expected reward."""
    return sum(row.chance * row.reward * row.score for row in rows_of(problem))


def measured(name, problem, drawn):
    """Moments and size of random groups, once they are those of groups of whole completions."""
    weights = getattr(answers, name)
    moments, size = answers.moments_of(weights, drawn(answers.levels_of(problem)), problem)
    mean, second, chances, count = 0.0, 0.0, 0.0, 0.0
    for group in drawn(rows_of(problem)):
        chance = math.prod(row.chance for row in group)
        factors = weights(tuple(row.reward for row in group))
        gradient = sum(w * row.score for w, row in zip(factors, group, strict=True))
        mean, second = mean + chance * gradient, second + chance * float(gradient @ gradient)
        chances, count = chances + chance, count + chance * len(group)
    assert (chances, count) == (pytest.approx(1), pytest.approx(size))
    assert_close(moments.mean[0], mean)
    assert moments.second == pytest.approx(second)
    return moments, size


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["rloo", "positive", "negative", "standardised"])
def test_levels_give_the_moments_of_whole_completions(name, seed):
    problem = answers.shared_problem(seed)
    moments, _ = measured(name, problem, lambda rows: itertools.product(rows, repeat=3))
    p = float(problem.chances[0] @ problem.totals[0])
    factor = {"rloo": 1, "positive": 1 - p, "negative": p}.get(name, moments.scale)
    assert_close(moments.mean[0], factor * gradient_of(problem))


@pytest.mark.parametrize("rewards", ["binary", "graded"])
@pytest.mark.parametrize("name", ["rloo", "earlier"])
def test_groups_of_random_size(name, rewards):
    problem = answers.shared_problem(2, rewards)
    moments, size = measured(name, problem, lambda rows: answers.adaptive_groups(rows, 4))
    if name == "earlier":
        assert_close(moments.mean[0], (size - 1) * gradient_of(problem))
    else:
        assert (moments.cosine == pytest.approx(1, abs=1e-12)) == (rewards == "binary")


def test_a_verifier_that_errs_scales_the_gradient():
    problem = answers.shared_problem(1)
    noisy = answers.flipped(problem, 0.3, 0.1, False)
    assert float(noisy.chances.sum()) == pytest.approx(1)
    assert_close(noisy.gradient(), 0.6 * problem.gradient())
    long = answers.flipped(problem, 0.3, 0.1, True)
    assert not torch.allclose(long.gradient(), 0.6 * problem.gradient(), rtol=1e-3)
    corrected = answers.flipped(problem, 0.3, 0.1, True, True)
    assert_close(corrected.gradient(), problem.gradient())


@pytest.mark.slow
def test_the_errors_of_answers_with_more_of_the_squared_scores_are_noisier():
    counts = Counter()
    for problem in map(answers.shared_problem, range(20)):
        wrong, right = answers.levels_of(problem)
        noises = []
        for errors in ((0.2, 0.0), (0.0, 0.2)):
            noisy = answers.levels_of(answers.flipped(problem, *errors, False))
            moments, _ = answers.moments_of(
                answers.rloo, itertools.product(noisy, repeat=4), problem
            )
            noises.append(moments.noise)
        of_wrong = wrong.chance * wrong.norm > right.chance * right.norm
        assert (noises[0] > noises[1]) == of_wrong
        counts[right.chance > 0.5, of_wrong] += 1
    # As two pages say: 15 problems, also three of the five with p above .5.
    assert counts == {(False, True): 12, (False, False): 3, (True, True): 3, (True, False): 2}


def test_the_forms_of_distillation_differ_for_feedback_of_the_row_alone():
    """Each form by itself is in `test_distillation_forms.py`."""
    failure, success, own = answers.teachers_of(0)
    for problem in (failure, success, own):
        sampled, closed = (
            answers.distilled(answers.Estimator.preset(name), problem)
            for name in ("opd_to_go", "opd_full_path")
        )
        assert torch.allclose(sampled, closed) == (problem is not own)
    right = own.rewards[0].bool()
    assert torch.equal(own.token_kl[0][right], success.token_kl[0][right])
    assert torch.equal(own.token_kl[0][~right], failure.token_kl[0][~right])


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_tokens_that_are_kept_have_the_highest_entropies(share):
    problem = answers.shared_problem(4, "continuous")
    kept = answers.most_uncertain(problem, share).bool()
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


@pytest.mark.slow
def test_the_pages_show_what_the_program_prints(capsys, monkeypatch):
    """Each number of a table of a page is printed, rounded to as many digits."""
    shown = {
        "signs": ("rewards", "Is it better to learn from right answers"),
        "verifier": ("rewards", "What does a noisy reward"),
        "adaptive": ("rewards", "May I sample until"),
        "informed": ("rewards", "May the teacher see"),
        "entropies": ("groups", "Should only the uncertain tokens"),
    }
    for name, (page, heading) in shown.items():
        answers.main((name,))
        printed = [float(x) for x in re.findall(r"-?\d+\.\d{3}", capsys.readouterr().out)]
        text = section(PAGES / f"{page}.md", heading)
        table = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)[2:]
        assert table
        for line in table:
            for cell in line.split("|")[1:]:
                for number in re.findall(r"(?<![\d.])-?\d*\.\d+", cell):
                    digits = len(number.partition(".")[2])
                    assert any(round(x, digits) == float(number) for x in printed), (name, cell)
    answers.main(("stale",))
    out = capsys.readouterr().out
    table = re.findall(
        r"^\| (\d+) steps? \| (\S+) \((\S+)\) \| (\S+) \((\S+)\) \| (\S+) \((\S+)\)",
        (PAGES / "off_policy.md").read_text(),
        re.MULTILINE,
    )
    assert len(table) == 3
    for behind, *cells in table:
        rows = re.findall(
            rf"^{behind} steps, .* (\d\.\d+) +(\d+\.\d+) +\d+\.\d+$", out, re.MULTILINE
        )
        assert [float(x) for x in cells] == [float(x) for pair in rows[:3] for x in pair]
