"""The recipe on the forms of distillation: its gradients from the logits, and the numbers of its page."""

from __future__ import annotations

import math
import re
import runpy
import sys
from statistics import median

import distillation_forms
import pytest
import torch
from drawing import normals, seeded
from folders import RECIPES
from torch.testing import assert_close

from tokenrl import Estimator
from tokenrl.lab import all_completions, exact_moments

RECIPE = RECIPES / "enumeration" / "distillation_forms.py"


@pytest.mark.parametrize("ends", [(), (0,)])
@pytest.mark.parametrize(("seed", "distance"), [(0, 0.3), (2, 3.0)])
def test_the_forms_are_those_of_the_formulas(seed, distance, ends):
    """Of the KL of whole completions, or of the KL of each token with its prefix held fixed."""
    rows = all_completions(3, 2, ends=ends)
    draw = seeded(seed)
    student, noise = normals(draw, 2, len(rows.prefixes), 3)
    leaf = student.clone().requires_grad_()
    pi, q = (logits.log_softmax(-1) for logits in (leaf, student + distance * noise))
    chances = (pi[rows.prefix, rows.ids] * rows.mask).sum(-1).exp()  # [M]
    log_ratios = ((pi - q)[rows.prefix, rows.ids] * rows.mask).sum(-1)
    visits = torch.zeros(len(rows.prefixes), dtype=torch.double)
    visits.index_add_(0, rows.prefix.flatten(), (chances.detach()[:, None] * rows.mask).flatten())
    of_prefixes = (pi.exp() * (pi - q)).sum(-1)
    whole, fixed = (
        torch.autograd.grad(-kl.sum(), leaf, retain_graph=True)[0].flatten()
        for kl in (chances * log_ratios, visits * of_prefixes)
    )
    problem = distillation_forms.distillation_problem(seed, distance, 2, ends)
    for name, form in distillation_forms.measure(problem).items():
        mean = whole if "to_go" in name or "path" in name else fixed
        assert_close(form.mean[0], mean, rtol=0, atol=1e-12)
        assert_close(form.target[0], whole, rtol=0, atol=1e-12)


def test_the_other_forms_are_those_of_the_lab():
    problem = distillation_forms.distillation_problem(1, 1.0, 2, ())
    opd, weighed = (
        distillation_forms.measure(problem)["opd"],
        distillation_forms.iw_opd(problem, gamma=0.0),
    )
    assert_close(weighed.mean, opd.mean)
    assert weighed.second == pytest.approx(opd.second)
    form = distillation_forms.rloo_of_log_ratio(problem)
    exact = exact_moments(Estimator(beta=1.0), problem, group_size=4)
    assert_close(form.mean, exact.mean)
    assert form.variance == pytest.approx(4 * exact.variance)


def test_the_tables_have_these_numbers(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    flags = f"--output {page} --figure {tmp_path / 'figure.png'} --lengths 1 2 --problems 3"
    monkeypatch.setattr(sys, "argv", ["distillation_forms.py", *flags.split()])
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    written = page.read_text(encoding="utf-8")
    moments = [
        distillation_forms.measure(distillation_forms.distillation_problem(seed, 1.0, 2, ()))
        for seed in range(3)
    ]
    noises = [median(forms[name].noise for forms in moments) for name in ("opd", "opd_full_path")]
    for name, noise in zip(("opd", "opd_full_path"), noises, strict=True):
        assert re.search(
            rf"^\| {name} \| \S+ \| {distillation_forms.short(noise)} \|", written, re.MULTILINE
        )
    pairs = [(forms["opd_full_path"], forms["opd_full"]) for forms in moments]
    completions = math.ceil(median(distillation_forms.crossing(*pair) for pair in pairs))
    assert f"| opd_full_path, opd_full | {completions} |" in written
