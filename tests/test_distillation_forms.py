"""The numbers of the page on distillation, computed a second time: from logits, by lists and loops over all groups."""

from __future__ import annotations

import itertools
import math
import re
import runpy
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from tokenrl import measure_bias

RECIPE = Path(__file__).parents[1] / "recipes" / "enumeration" / "distillation_forms.py"
LENGTH = 2
GROUP = 4


def all_prefixes(ends):
    """The prefixes of completions of at most two tokens, shortest first; a token in `ends` has none after it."""
    tokens = [token for token in range(3) if token not in ends]
    return [*itertools.chain(*(itertools.product(tokens, repeat=t) for t in range(LENGTH)))]


def completions(student, teacher, ends):
    """Chance, log ratios, scores, KLs and gradients of the KLs of each completion, all of them lists by position."""
    prefixes = all_prefixes(ends)
    row = {prefix: number for number, prefix in enumerate(prefixes)}
    written = [(token,) for token in ends]
    written += [(*prefix, t) for prefix in prefixes if len(prefix) == LENGTH - 1 for t in range(3)]
    for tokens in written:
        chance = 1.0
        ratios, scores, kls, slopes = [], [], [], []
        for t, token in enumerate(tokens):
            place = row[tokens[:t]]
            own = [math.exp(x) for x in student[place]]
            other = [math.exp(x) for x in teacher[place]]
            p = [x / sum(own) for x in own]
            q = [x / sum(other) for x in other]
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            score, slope = torch.zeros(2, len(prefixes), 3, dtype=torch.double)
            for v in range(3):
                score[place, v] = (v == token) - p[v]
                slope[place, v] = p[v] * (math.log(p[v] / q[v]) - kl)  # in the logit of v
            chance *= p[token]
            ratios.append(math.log(q[token] / p[token]))
            scores.append(score.flatten())
            kls.append(kl)
            slopes.append(slope.flatten())
        yield chance, ratios, scores, kls, slopes


def iw_weight(ratios, t):
    sizes = [abs(x) for x in ratios]
    return 1 + 0.5 * (1 - sum(sizes[:t]) / sum(sizes))


DIRECTIONS = {  # of token t: from log ratios, its score, the KLs and the gradient of its KL
    "opd": lambda ls, s, kls, g, t: ls[t] * s,
    "vopd": lambda ls, s, kls, g, t: (ls[t] + kls[t]) * s,
    "opd_full": lambda ls, s, kls, g, t: -g,
    "opd_to_go": lambda ls, s, kls, g, t: sum(ls[t:]) * s,
    "opd_to_go,kl_baseline=closed_form": lambda ls, s, kls, g, t: (sum(ls[t:]) + kls[t]) * s,
    "opd_full_path": lambda ls, s, kls, g, t: -g - sum(kls[t + 1 :]) * s,
    "iw_opd of TRL": lambda ls, s, kls, g, t: ls[t] * iw_weight(ls, t) * s,
}


def logits(seed, distance, ends):
    draw = torch.Generator().manual_seed(seed)
    shape = len(all_prefixes(ends)), 3
    student, noise = torch.randn(2, *shape, generator=draw, dtype=torch.double)
    return student, student + distance * noise


def by_hand(seed, distance, ends=()):
    """E[g], E|g|^2 and grad(-KL) of each form; the last by differentiating the sum over completions."""
    student, teacher = logits(seed, distance, ends)
    leaf = student.clone().requires_grad_()
    first, second = (x.log_softmax(-1) for x in (leaf, teacher))
    pi, q = (
        torch.cat([x[0][: len(ends)], (x[0][len(ends) :, None] + x[1:]).flatten()])
        for x in (first, second)
    )
    (gradient,) = torch.autograd.grad(-(pi.exp() * (pi - q)).sum(), leaf)
    listed = [*completions(student.tolist(), teacher.tolist(), ends)]
    chances = torch.tensor([chance for chance, *_ in listed], dtype=torch.double)
    assert float(chances.sum()) == pytest.approx(1, abs=1e-12)
    moments = {}
    for name, direction in DIRECTIONS.items():
        rows = torch.stack(
            [
                sum(direction(ls, scores[t], kls, g[t], t) for t in range(len(ls)))
                for _, ls, scores, kls, g in listed
            ]
        )
        moments[name] = chances @ rows, float(chances @ rows.square().sum(-1))
    moments["RLOO of 4, KL in the reward"] = rloo(listed)
    return moments, gradient.flatten()


def rloo(listed):
    """The first moments of RLOO by all groups, each completion in the place of each of its rows."""
    chances = torch.tensor([chance for chance, *_ in listed], dtype=torch.double)
    rewards = torch.tensor([sum(ls) for _, ls, *_ in listed], dtype=torch.double)
    scores = torch.stack([sum(row) for _, _, row, *_ in listed])
    groups = torch.cartesian_prod(*[torch.arange(len(listed))] * GROUP)
    chance = chances[groups].prod(-1)
    drawn = rewards[groups]
    others = (drawn.sum(-1, keepdim=True) - drawn) / (GROUP - 1)
    steps = ((drawn - others)[..., None] * scores[groups]).mean(1)
    mean = chance @ steps
    signal = float(mean.square().sum())
    variance = float(chance @ steps.square().sum(-1)) - signal
    return mean, signal + GROUP * variance


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE), run_name="recipe")


@pytest.mark.parametrize("ends", [(), (0,)])
@pytest.mark.parametrize(("seed", "distance"), [(0, 0.3), (1, 1.0), (2, 3.0)])
def test_the_forms_are_those_of_the_formulas(recipe, seed, distance, ends):
    problem = recipe["distillation_problem"](seed, distance, LENGTH, ends=ends)
    forms = recipe["measure"](problem)
    forms |= {name: form(problem) for name, form in recipe["OTHERS"].items()}
    moments, gradient = by_hand(seed, distance, ends)
    assert forms.keys() == moments.keys()
    for name, (mean, second) in moments.items():
        assert torch.allclose(forms[name].mean[0], mean, rtol=0, atol=1e-12), name
        assert torch.allclose(forms[name].target[0], gradient, rtol=0, atol=1e-12), name
        assert forms[name].second == pytest.approx(second, rel=1e-10), name
        is_exact = torch.allclose(mean, gradient, rtol=0, atol=1e-10)
        assert is_exact == ("to_go" in name or "path" in name or "RLOO" in name), name


def test_the_tables_have_these_numbers(recipe, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    flags = f"--output {page} --figure {tmp_path / 'figure.png'} --lengths 1 2 --problems 3"
    monkeypatch.setattr(
        sys, "argv", ["distillation_forms.py", *flags.split(), "--vocabularies", "3"]
    )
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    written = page.read_text(encoding="utf-8")
    moments = [recipe["measure"](recipe["distillation_problem"](seed, 1.0, 2)) for seed in range(3)]
    noises = [median(forms[name].noise for forms in moments) for name in ("opd", "opd_full_path")]
    for name, noise in zip(("opd", "opd_full_path"), noises, strict=True):
        assert re.search(
            rf"^\| {name} \| \S+ \| {recipe['short'](noise)} \|", written, re.MULTILINE
        )
    pairs = [(forms["opd_full_path"], forms["opd_full"]) for forms in moments]
    completions = math.ceil(median(recipe["crossing"](*pair) for pair in pairs))
    assert f"| opd_full_path, opd_full | {completions} |" in written


def test_closed_forms_have_more_noise_where_two_tokens_share_a_logit(recipe):
    shared = recipe["one_logit"]()
    names = ("opd", "opd_full", "opd_to_go", "opd_full_path")
    text = [f"{shared[name].variance:.1e}".replace("e-0", "e-") for name in names]
    page = " ".join(recipe["PAGE"].read_text(encoding="utf-8").split())
    sentence = "The variances are {} with `opd`, {} with `opd_full`, {} with `opd_to_go` and {} with `opd_full_path`."
    assert sentence.format(*text) in page
    noises = [measure_bias(name).noise for name in ("opd", "vopd", "opd_full")]
    assert (
        "a noise of {:.2f} for `opd`, {:.2f} for `vopd` and {:.2f} for `opd_full`".format(*noises)
        in page
    )


def test_the_page_has_the_tables_of_the_recipe(recipe):
    page = recipe["PAGE"].read_text(encoding="utf-8")
    between = page.partition(recipe["BEGIN"])[2].partition(recipe["END"])[0]
    names = [line.split(" | ")[0].strip("| ") for line in between.splitlines() if line[:2] == "| "]
    assert {*recipe["PRESETS"], *recipe["OTHERS"]} <= {*names}
