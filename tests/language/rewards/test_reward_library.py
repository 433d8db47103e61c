"""The rewards of the library on cases counted by hand, and what of their options is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from refusals import refused, stopped

from tokenrl.language.rewards.library import (
    LIBRARY,
    ExactMatch,
    Length,
    NumericAnswer,
    RegexFormat,
    final_number,
)
from tokenrl.language.rewards.rewards import Rewards


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_every_reward_has_its_name_and_takes_text_and_chat_alike():
    made = {"regex_format": RegexFormat("yes.*"), "length": Length(target=3, unit="characters")}
    made |= {name: kind() for name, kind in LIBRARY.items() if name not in made}
    texts, columns = ["yes", "12", '{"a": 1}', "good good"], {"answer": ["yes", "13", "1", "x"]}
    for name, reward in made.items():
        assert reward.__name__ == name and Rewards(reward).names == [name]
        assert reward(completions=texts, **columns) == reward(completions=chat(*texts), **columns)
    pattern = "<think>.*\n</think>"
    several = [*chat("<think>a"), *chat("</think>")]
    for completion, whole, anywhere in (
        ([*several[0], *several[1]], 1, 1),
        ("<think>a\n</think>", 1, 1),
        ("<think>a\n</think> b", 0, 1),
        ("<think>\na\n</think>", 0, 0),
    ):
        assert RegexFormat(pattern)(completions=[completion]) == [whole]
        assert RegexFormat(pattern, search=True)(completions=[completion]) == [anywhere]


def test_exact_match_and_what_it_overlooks():
    answer = ["Paris", "Paris", "Paris", "the cat", 3, None]
    texts = [" Paris\n", "paris", "Paris!", "the  cat", "3", "x"]
    assert ExactMatch()(completions=texts, answer=answer) == [1, 0, 0, 0, 1, None]
    assert ExactMatch(strip=False)(completions=texts, answer=answer)[0] == 0
    for row, option in enumerate(("ignore_case", "ignore_punctuation", "collapse_spaces"), 1):
        rewards = ExactMatch(**{option: True})(completions=texts, answer=answer)
        assert [i for i in range(1, 4) if rewards[i]] == [row]
    numbers = ExactMatch(column="n")(completions=["7", "7.0", "7", "7"], n=[7.0, 7.0, 7.5, "7.0"])
    assert numbers == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 42.", 42), ("12 and then 7", 7), ("x=-5", -5), ("3-5", 5), ("\u22123.5", -3.5),
        ("1,234,567.5 km", 1234567.5), ("1,2,3", None), ("1e-3", 1e-3), ("3/4 of it", 0.75),
        ("$1,200", 1200), ("-$5", -5), ("+2", 2), ("x2", None), ("2.5cm", 2.5), (".5", 0.5), ("1.2.3", None),
        ("1/0", None), ("1e999", None), ("", None), ("none", None), ("- 5 apples", 5),
        (r"\frac{3}{4}", 0.75), (r"so -\dfrac{1}{2}", -0.5), (r"\frac{1}{0}", None),
        ("9 + 9 = 18\n#### 18\n(checked 3 times)", 18), ("#### no", None), ("7 #### 1 #### 2", 2),
        (r"\boxed{41} or \boxed{42}, 7", 42), (r"\boxed{x = 5}", 5), (r"\boxed{\frac{1}{4}}", 0.25),
        (r"\boxed{5\text{ cm}^2}", 5), (r"\boxed{1\,000}", 1000), (r"\boxed{y} 3", None), (r"\fbox{3} 9", 3),
        ("2 for 12,50", None), ("99,50.", None), ("x12,50", None), ("1,23,456", None), ("1.234,5", None),
        ("0,123", None), ("3,4 and 5", 5), ("(3, 4)", 4), ("1,5/2", None), ("1/2,5", None), ("1,2345", None),
        ("1,234,567.8", 1234567.8), ("1'234'567", None), ("1_000", None), ("1\u202f234", None), ("1,234'567", None),
        ("#### 12,50", None), (r"\boxed{12,5} 3", None), (r"\boxed{1{,}234}", 1234), ("1{,}234", 1234), (".5.5", None),
        ("2.", 2), (r"\frac{1.2.3}{4}", None), (r"\boxed{3} #### 4", 3), (r"7 \boxed{8", 8), (r"\boxed{7} \boxed{8", 7),
    ],
)  # fmt: skip
def test_the_final_number(text, number):
    value = final_number(text)
    assert (value if number is None else float(value)) == number


def test_numeric_answers_and_their_tolerance():
    reward = NumericAnswer(tolerance=0.01)
    answer = ["42", 42, "so #### 42", "no number", None, "1000", "0.5", "0.5"]
    texts = ["42.4", "42.5", r"\boxed{42}", "42", "42", "990", "0.505", "0.509"]
    assert reward(completions=texts, answer=answer) == [1, 0, 1, None, None, 1, 1, 0]
    assert NumericAnswer()(completions=["0.3333333", "1/3", "3"], answer=["1/3"] * 3) == [1, 1, 0]
    assert NumericAnswer(tolerance=0)(completions=["2", "2.0000001"], answer=[2.0, 2]) == [1, 0]
    assert NumericAnswer(column="n")(completions=["__import__('os')"], n=[1]) == [0]


@given(st.integers(-(10**27), 10**27), st.integers(-5, 5), st.booleans())
def test_a_whole_answer_is_met_by_itself_alone(answer, difference, has_point):
    column = float(answer) if has_point and abs(answer) < 2**53 else answer
    number = answer + difference
    texts = [f"{number:,}", f"so {number}.0", f"{number}/1", rf"2 \boxed{{{number}}} 3"]
    rewards = NumericAnswer()(completions=texts, answer=[column] * 4)
    assert rewards == [float(difference == 0)] * 4


@pytest.mark.parametrize(
    ("answer", "completion", "earned"),
    [
        ("1234567", "1234568", 0), (7.0, "7.0000001", 0), (1e16, "10000000000000001", 0), (0, "0.0000001", 0),
        ("9007199254740993", "9007199254740992", 0), (2**53 + 1, str(2**53), 0), ("6e23", "6.0e23", 1),
        ("0.0000001", "0", 0), ("0.0000001", "0.0000002", 0), (1e-12, "1e-12", 1), (1e-12, "2e-12", 0),
        ("1234567.25", "1234567.50", 0), (1234567.4, "1234567", 0), ("1/3", "0.33333333", 1), ("2/3", "0.666", 0),
        (0.1 + 0.2, "0.3", 1), (2.9999999999999996, "3", 1), ("3.14159265", "3.14159", 0), ("0.5", "-0.5", 0),
        ("5", "1e999999999999999999999", 0),
    ],
)  # fmt: skip
def test_what_counts_as_equal_to_an_answer(answer, completion, earned):
    assert NumericAnswer()(completions=[completion], answer=[answer]) == [earned]


def test_length_is_measured_in_tokens_words_or_characters():
    texts, ids = ["a bc", "a b c d e f", ""], [[5, 6], [5] * 6, [2]]
    assert Length(target=4)(completions=texts, completion_ids=ids) == [-0.5, -0.5, -0.75]
    assert Length(target=4, unit="characters")(completions=texts) == [0, -7 / 4, -1]
    assert Length(max=2, unit="words")(completions=texts) == [0, -2, 0]
    result = Rewards(Length(max=1))(["p"] * 3, texts, ids, {})  # ids reach it by name
    assert result.total.tolist() == [-1, -5, 0]
    with pytest.raises(ValueError, match="needs completion_ids"):
        Length(max=1)(completions=texts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Length(), lambda: Length(target=1, max=2), lambda: Length(target=3, unit="bytes"),
        lambda: RegexFormat("("), lambda: NumericAnswer(tolerance=-1),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(make):
    with refused(r"was given as|give exactly one of the two|is not a regular expression"):
        make()


def test_a_column_that_is_not_there_is_refused_before_the_first_step():
    for reward in (ExactMatch(column="anser"), NumericAnswer(column="anser")):
        with refused(r"column 'anser'.*Did you mean 'answer'.*\(column='...'\)"):
            Rewards(reward).check_columns(["prompt", "answer"])
    Rewards(ExactMatch()).check_columns(["prompt", "answer"])
    with stopped("exact_match raised KeyError: 'answer'"):
        Rewards(ExactMatch())(["p"], ["c"], [[1]], {})
