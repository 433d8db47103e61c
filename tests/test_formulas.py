"""The recipe of formulas: which may be written, what they are worth, and a search that recovers the easiest."""

import importlib
import json
import re
import runpy
import sys
from itertools import product

import numpy as np
import pandas as pd
import pytest
from folders import RECIPES
from scipy import stats

FOLDER = RECIPES / "formulas"
ROW = {"prompt": ">", "variables": "x", "x": [0.5, 1.0, 2.0], "target": [1.0, 3.0, 4.0]}


@pytest.fixture
def module(monkeypatch):
    """A module of the folder by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("formulas", "search", "nguyen"):
        sys.modules.pop(name, None)


@pytest.fixture
def recipe(module):
    return module("formulas")


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


@pytest.mark.parametrize("text", ["", "+x", "xx", "*xy", "x>", "sin"])
def test_a_text_that_is_no_formula_of_the_variables_is_worth_nothing(recipe, text):
    assert recipe.fit([text, "x"], "xx", [ROW["x"]] * 2, x=[ROW["x"]] * 2) == [0, 1]


def test_rows_with_equal_targets_have_points_of_their_own(recipe):
    points = [[0.5, 1.0, 2.0], [1.0, 2.0, 4.0]]
    assert recipe.fit(["x", "x"], "xx", [points[0]] * 2, x=points)[1] < 0.6


def test_a_formula_is_written_as_python_reads_it(recipe):
    formula = "-/s*xxlx+ecxx"
    assert recipe.infix(formula) == "((sin((x * x)) / log(x)) - (exp(cos(x)) + x))"
    assert recipe.infix("*xsy", {"x": "mass", "y": "exp"}) == "(mass * sin(exp))"


def test_points_of_a_file_are_a_row_with_the_last_column_as_target(module, tmp_path):
    (tmp_path / "points.csv").write_text("mass,speed,energy\n1,2,2\n2,3,9\n")
    row, names = module("search").read_points(tmp_path / "points.csv")
    assert names == {"x": "mass", "y": "speed"}
    assert row == {"variables": "xy", "x": [1.0, 2.0], "y": [2.0, 3.0], "target": [2.0, 9.0]}


def test_random_formulas_are_those_of_the_rule_and_mostly_short(module, recipe):
    draw = module("search").random_formulas
    formulas = draw("xy", 300, 1)
    assert formulas == draw("xy", 300, 1)
    lengths = [*map(len, formulas)]
    assert all(map(may_be_written, formulas)) and max(lengths) <= recipe.LONGEST
    assert np.median(lengths) < 12
    assert set("".join(formulas)) == set("+-*/scelxy")


@pytest.mark.parametrize("text", ["x\n1\n", "x,target\n1,2\n3,\n", "x,target\n1,two\n"])
def test_a_file_without_points_is_refused(module, tmp_path, text):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(SystemExit, match="one to three columns of variables"):
        module("search").read_points(tmp_path / "points.csv")


def test_a_problem_is_recovered_by_its_formula_and_not_by_one_that_is_near(module):
    problems = module("nguyen").PROBLEMS
    assert problems[10].is_recovered("*+xx*/sxxcy", seed=3)
    assert not problems[10].is_recovered("*+xx*/sxxex", seed=3)
    assert problems[12].variables == "xy"


def test_the_log_rank_statistic_of_one_stratum_is_that_of_scipy_and_strata_sum(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "study"))
    statistic = importlib.import_module("survival").statistic
    generator = np.random.default_rng(0)
    strata = []
    for problem, factor in enumerate((1.0, 0.4)):
        times = generator.integers(1, 30, 40) * np.where(np.arange(40) < 20, factor, 1)
        formulas = np.where(times < 20, times, np.nan)
        arms = pd.DataFrame({"problem": problem, "formulas": formulas, "budget": 20})
        pair = arms[:20], arms[20:]
        strata.append(pair)
        censored = [
            stats.CensoredData.right_censored(arm["formulas"].fillna(20), arm["formulas"].isna())
            for arm in pair
        ]
        expected = stats.logrank(*censored).statistic
        assert abs(statistic(*pair)) == pytest.approx(abs(expected), rel=1e-9)
    assert statistic(*strata[1]) > 2  # the first arm is solved sooner
    both = statistic(*(pd.concat(arm) for arm in zip(*strata, strict=True)))
    assert 0 < both < statistic(*strata[1])


@pytest.mark.slow
def test_a_search_recovers_the_first_problem(recipe, tmp_path, monkeypatch, capsys):
    flags = ["--formulas", "40000", "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["nguyen.py", *flags])
    runpy.run_path(str(FOLDER / "nguyen.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recovered"] and result["formulas"] < 40000


@pytest.mark.slow
def test_a_file_of_points_becomes_a_formula_of_its_columns(module, tmp_path, capsys):
    """Two resistors side by side, whose formula has seven tokens; the same command again prints the same."""
    points = pd.DataFrame(
        np.random.default_rng(0).uniform(1, 10, (20, 2)), columns=["first", "second"]
    )
    points.eval("together = first * second / (first + second)").to_csv(
        tmp_path / "points.csv", index=False
    )
    search = module("search")
    for _ in range(2):
        search.main(str(tmp_path / "points.csv"), formulas=20_000, output_dir=str(tmp_path / "run"))
    lines = [
        json.loads(line) for line in capsys.readouterr().out.splitlines() if "best" in line[:7]
    ]
    assert lines[:10] == lines[10:] and lines[0]["error"] < 1e-12
    assert eval(lines[0]["best"], {"first": 2, "second": 3}) == pytest.approx(1.2)
