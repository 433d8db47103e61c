"""The recipe of formulas: which may be written, what they are worth, and a search that recovers the easiest."""

import json
import re
import runpy
import sys
from itertools import product

import numpy as np
import pytest
from folders import RECIPES

FOLDER = RECIPES / "formulas"
ROW = {"prompt": ">", "variables": "x", "x": [0.5, 1.0, 2.0], "target": [1.0, 3.0, 4.0]}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import formulas

    yield formulas
    sys.modules.pop("formulas")


def infix(formula):
    """The formula as Python writes it, and what follows it; an error where it is not whole."""
    token, rest = formula[0], formula[1:]
    if token in "+-*/":
        left, rest = infix(rest)
        right, rest = infix(rest)
        return f"({left}{token}{right})", rest
    if token in "scel":
        inner, rest = infix(rest)
        return f"{ {'s': 'sin', 'c': 'cos', 'e': 'exp', 'l': 'log'}[token] }({inner})", rest
    return token, rest


def may_be_written(formula):
    """Whether it is whole, and follows the rules of Deep Symbolic Regression."""
    try:
        text, rest = infix(formula)
    except IndexError:
        return False
    nested = False
    for match in re.finditer(r"(?:sin|cos)\(", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        nested |= bool(re.search("sin|cos", text[match.end() : end]))
    return not (rest or nested or "exp(log" in text or "log(exp" in text) and len(formula) >= 4


def test_the_rule_allows_whole_formulas_of_the_field_and_no_others(recipe):
    automaton = recipe.rule({"variables": "x"})
    for formula in map("".join, product("+*scelx", repeat=5)):
        state = 0
        for token in formula:
            state = automaton.edges[state].get(token) if state is not None else None
        assert (state in automaton.accepting) == may_be_written(formula)


def test_a_reward_is_that_of_the_formula_that_python_computes(recipe):
    names = {name: getattr(np, name) for name in ("sin", "cos", "exp", "log")}
    formulas = ["+x*xx", "s*xx", "-ex/xlx", "lx", "/x-xx"]
    rewards = recipe.fit(formulas, ["x"] * 5, [ROW["target"]] * 5, x=[ROW["x"]] * 5)
    x, target = np.array(ROW["x"]), np.array(ROW["target"])
    for formula, reward in zip(formulas[:4], rewards, strict=False):
        errors = eval(infix(formula)[0], names | {"x": x}) - target
        expected = 1 / (1 + np.sqrt((errors**2).mean() / target.var()))
        assert reward == pytest.approx(expected if np.isfinite(expected) else 0, abs=1e-12)
    assert rewards[4] == 0  # it is infinite everywhere


@pytest.mark.slow
def test_a_search_recovers_the_first_problem(recipe, tmp_path, monkeypatch, capsys):
    flags = ["--formulas", "40000", "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["nguyen.py", *flags])
    runpy.run_path(str(FOLDER / "nguyen.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recovered"] and result["formulas"] < 40000
