"""Products and gates, rewards of the library by name, and specs that cannot be read."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tokenrl.errors import Refused, Stopped
from tokenrl.language.rewards.composition import Gate, Product, load_reward
from tokenrl.language.rewards.library import ExactMatch, Length, RegexFormat, ValidJson
from tokenrl.language.rewards.rewards import Rewards

COMPLETIONS = ["yes", "no", "maybe", "yes"]
IDS = [[1], [2, 3], [4], [5, 6]]
PROMPTS = ["p"] * 4


def call(reward, columns=None, weights=None):
    return Rewards(reward, weights)(PROMPTS, COMPLETIONS, IDS, columns or {}, step=3)


def first(completions):
    return [0.5, None, 2.0, 1.0]


def second(completions, level):
    return np.array([4.0, 1.0, 3.0, 0.0]) * level


async def third(completions):
    await asyncio.sleep(0)
    return [1.0, 1.0, None, 2.0]


def test_a_product_multiplies_abstains_and_logs_its_parts():
    result = call(Product(first, second), {"level": [1, 1, 2, 1]})
    np.testing.assert_array_equal(result.values[:, 0], [2.0, np.nan, 12.0, 0.0])
    assert result.metrics["rewards/product/mean"] == pytest.approx(14 / 3)
    assert result.metrics["rewards/first/mean"] == pytest.approx(3.5 / 3)
    assert result.metrics["rewards/second/mean"] == pytest.approx(11 / 4)
    assert call(Product(first, third)).values[:, 0].tolist()[::3] == [0.5, 2.0]


def test_a_gate_pays_only_where_its_condition_is_met():
    columns = {"level": [1, 1, 1, 1]}
    gate = Gate(first, second, threshold=1.0)
    np.testing.assert_array_equal(call(gate, columns).values[:, 0], [0.0, np.nan, 3.0, 0.0])
    np.testing.assert_array_equal(
        call(Gate(first, second, threshold=0.5), columns).values[:, 0], [4.0, np.nan, 3.0, 0.0]
    )
    # The second one's abstention counts only where the gate is open.
    np.testing.assert_array_equal(
        call(Gate(first, third, threshold=2)).values[:, 0], [0.0, np.nan, np.nan, 0.0]
    )
    both = call([first, gate], columns, [1.0, 0.5])
    assert both.total.tolist() == [0.5, 0.0, 3.5, 1.0] and both.valid.tolist() == [True, False, True, True]
    assert both.metrics["rewards/gate/mean"] == 1.0 and both.metrics["rewards/second/mean"] == 2.0


def test_parts_are_checked_and_named_like_any_reward():
    with pytest.raises(Refused, match="second has a parameter 'level'"):
        Rewards(Product(first, Gate(first, second))).check_columns(["prompt"])
    with pytest.raises(Refused, match="compares with the column 'answer'"):
        Rewards(Product(first, "exact_match")).check_columns(["prompt"])
    with pytest.raises(
        Stopped, match=r"^Reward function broken raised KeyError.*row 1 of 4, completion 'no'"
    ):
        call(Product(first, broken))
    with pytest.raises(Stopped, match=r"^Reward function short returned 1 rewards for 4"):
        call(Product(first, short))
    result = call(Product(Length(target=1), Length(target=2)))
    assert {"rewards/length/mean", "rewards/length_2/mean"} <= set(result.metrics)


def broken(completions):
    return [{"yes": 1.0}[text] for text in completions]


def short(completions):
    return [1.0]


def test_a_composition_needs_no_log_metric():
    assert Product(first, third)(PROMPTS, COMPLETIONS) == [0.5, None, None, 2.0]


def test_rewards_of_the_library_by_name(tmp_path, monkeypatch):
    assert load_reward("exact_match") == ExactMatch()
    assert load_reward("length(target=20)") == Length(target=20)
    assert load_reward(" length ( max = 3, unit='words' )") == Length(max=3, unit="words")
    assert load_reward("regex_format(pattern='a:b/c(d)')") == RegexFormat("a:b/c(d)")
    assert load_reward("valid_json(required=['a', 'b'])") == ValidJson(["a", "b"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def own(completions):\n    return [3.0] * len(completions)\n")
    gate = load_reward("gate(product(exact_match, 'own.py:own'), length(target=1), threshold=-2)")
    assert isinstance(gate, Gate) and gate.threshold == -2 and list(gate.parts) == ["product", "length"]
    assert list(gate.parts["product"].parts) == ["exact_match", "own"]
    assert gate.parts["length"] == Length(target=1)
    result = call([gate, "own.py:own"], {"answer": ["yes"] * 4}, [1, 10])
    assert result.total.tolist() == [30.0, 29.0, 30.0, 29.0]
    (tmp_path / "length").mkdir()  # a folder of that name is a model
    with pytest.raises(Refused, match=r"reward model 'length': the folder has no config\.json"):
        load_reward("length")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lenght(target=20)", "no reward 'lenght'.*Did you mean 'length'.*module:function"),
        ("exact", "no reward 'exact'.*Did you mean 'exact_match'"),
        ("length", r"length\(target=None, max=None\): give exactly one of the two"),
        ("length(20)", "length takes its options by name only"),
        ("length(targt=20)", "length got an unexpected keyword argument 'targt'"),
        ("length(target=20", "cannot be read.*SyntaxError"),
        ("length(target=1+1)", "cannot be read"),
        ("length(target=__import__('os').getpid())", "cannot be read"),
        ("length(**{'target': 3})", r"\*\* is not allowed"),
        ("length(target=1)(2)", "not the name of a reward"),
        ("product(os.system)", "'os.system' is not the name of a reward"),
        ("product(3, 4)", "not the name of a reward"),
        ("product(exact_match)", "product was given 1 rewards"),
        ("gate(exact_match, valid_json, threshold='1')", "gate was given 2 rewards and threshold='1'"),
        ("gate(exact_match)", "gate was given 1 rewards"),
        ("product(exact_match, 'no_such:thing')", "no module no_such"),
        ("regex_format", "regex_format missing 1 required positional argument: 'pattern'"),
    ],
)
def test_specs_that_cannot_be_read_are_refused(spec, words):
    with pytest.raises(Refused, match=words) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)
