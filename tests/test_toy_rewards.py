"""Each reward on values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from toy_tasks import addition, countdown, reverse_text, sentiment, sort_digits, target_length, vowels


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("012457", 1.0),
        ("754210", 0.0),
        ("402715", 0.0),
        ("01245", 0.0),
        ("0124577", 0.0),
        ("012457 ", 0.0),
        ("٠١٢٤٥٧", 0.0),
        ("", 0.0),
    ],
)
def test_sort_digits(completion, expected):
    assert sort_digits.reward(["402715>"], [completion]) == [expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("dcba", 1.0),
        ("abcd", 0.0),
        ("dcb", 0.75),
        ("dcbaa", 0.8),
        ("dxbx", 0.5),
        ("cba", 0.0),
        ("", 0.0),
        ("dcbadcba", 0.5),
    ],
)
def test_reverse_text(completion, expected):
    assert reverse_text.reward(["abcd>"], [completion]) == [expected]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("27+45>", "72", 1.0),
        ("27+45>", "62", 0.0),
        ("27+45>", "072", 0.0),
        ("27+45>", "+72", 0.0),
        ("27+45>", "72.0", 0.0),
        ("03+04>", "07", 1.0),
        ("03+04>", "7", 0.0),
        ("27+45>", "\uff17\uff12", 0.0),
        ("27+45>", "", 0.0),
    ],
)
def test_addition(prompt, completion, expected):
    assert addition.reward([prompt], [completion]) == [expected]


def test_addition_without_the_carry():
    assert addition.without_carry("27+45>") == "62"
    assert addition.without_carry("09+01>") == "00"
    assert addition.without_carry("12+34>") == addition.right("12+34>") == "46"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("8+5-3", 1.0),
        ("5-3+8", 1.0),
        ("3+8+5", 0.1),  # the wrong value
        ("10", 0.1),  # the right value, the wrong numbers
        ("5+5", 0.1),
        ("8+5-3-3+3", 0.1),  # a number reused
        ("8+8-6", 0.1),
        ("8+5", 0.1),  # a number left out
        ("", 0.0),
        ("-3+8+5", 0.0),  # no sign in front
        ("+8+5-3", 0.0),
        ("8+5--3", 0.0),
        ("8++5-3", 0.0),
        ("8+5+-3", 0.0),
        ("8+5-", 0.0),
        ("~3+8+5", 0.0),
        ("(8+5)-3", 0.0),
        ("((((8+5-3", 0.0),
        ("8*5/4", 0.0),
        ("30/3", 0.0),
        ("2**9", 0.0),
        ("08+5-3", 0.0),
        ("8_0", 0.0),
        ("1e1", 0.0),
        ("8+5-3.0", 0.0),
        ("8 + 5 - 3", 0.0),
        ("8+5-3\n", 0.0),
        ("8+5-3=10", 0.0),
        ("\u0668+\u0665-\u0663", 0.0),
        ("8+5-3;import os", 0.0),
        ("__import__('os').system('true')", 0.0),
        ("8" * 100_000, 0.0),
        ("8+5-3" + "+1-1" * 100_000, 0.0),
        ("(" * 100_000, 0.0),
    ],
)
def test_countdown(completion, expected):
    assert countdown.reward(["3,8,5=10>"], [completion]) == [expected]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.data())
def test_countdown_parses_a_sum_back_into_its_terms(numbers, data):
    signs = [1, *(data.draw(st.sampled_from((1, -1))) for _ in numbers[1:])]
    terms = [sign * number for sign, number in zip(signs, numbers, strict=True)]
    text = str(numbers[0]) + "".join(
        f"{'+' if sign > 0 else '-'}{number}" for sign, number in zip(signs[1:], numbers[1:], strict=True)
    )
    assert countdown.parse(text) == terms


@given(st.text(alphabet="0123456789+-*/().=_ \n٣", max_size=12))
def test_countdown_accepts_exactly_what_its_grammar_says(text):
    pieces = text.replace("-", "+").split("+")
    numbers = all(0 < len(p) <= 2 and p.isascii() and p.isdigit() and str(int(p)) == p for p in pieces)
    assert (countdown.parse(text) is not None) == numbers


def test_countdown_uses_each_given_number_once_even_if_two_are_equal():
    assert countdown.reward(["4,4,1=1>"] * 3, ["4-4+1", "1+4-4", "1"]) == [1.0, 1.0, 0.1]


def test_countdown_without_a_solution_is_named():
    with pytest.raises(ValueError, match="1,1,1=9"):
        countdown.right("1,1,1=9>")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("aeiou", 1.0),
        ("a", 1.0),
        ("ab", 0.5),
        ("xyz", 0.0),
        ("", 0.0),
        ("A", 0.0),
        ("é", 0.0),
        ("aaaaaaaa", 1.0),
        ("aaaaaaaaaa", 0.8),  # the ninth and tenth do not count as vowels
        ("bbbbaaaaaa", 0.4),
    ],
)
def test_vowels(completion, expected):
    assert vowels.reward(["abc>"], [completion]) == [expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (" great.", 1.0),
        (" very great and quite moving, i loved it.", 1.0),
        (" great and dull, i admired it.", 1.0),
        (" great and dull.", 0.0),  # a draw
        (" great and dull, i hated it.", 0.0),
        (" awful.", 0.0),
        (" awful, i loved it.", 0.0),
        (" great", 0.0),  # the rest: not grammatical
        ("great.", 0.0),
        (" great great.", 0.0),
        (" great and great and great.", 0.0),
        (" great.great.", 0.0),
        (" great. ", 0.0),
        (" great.\n", 0.0),
        (" Great.", 0.0),
        (" loved.", 0.0),
        (" very very great.", 0.0),
        (" great, i loved it", 0.0),
        (" great" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_sentiment(completion, expected):
    assert sentiment.reward(["the plot was"], [completion]) == [expected]


@pytest.mark.parametrize(
    ("completion", "target", "expected"),
    [
        ("ababab", 6, 0.0),
        ("zzzzzz", 6, 0.0),
        ("ababa", 6, -1 / 6),
        ("abababab", 6, -2 / 6),
        ("abab", 2, -1.0),
        ("a" * 1000, 8, -1.0),
        ("", 3, -1.0),
        ("🙂🙂", 2, 0.0),
    ],
)
def test_target_length(completion, target, expected):
    assert target_length.reward([f"ab{target}>"], [completion], target=[target]) == [pytest.approx(expected)]
