"""Each reward on values worked out by hand."""

from __future__ import annotations

import pytest

from toy_tasks import (
    addition,
    countdown,
    reverse_text,
    sentiment,
    sort_digits,
    target_length,
    vowels,
)

NO_SUMS = "-3+8+5 +8+5-3 8+5--3 8++5-3 8+5+-3 8+5- ~3+8+5 (8+5)-3 ((((8+5-3 8*5/4 30/3 2**9 08+5-3 8_0 1e1 "
NO_SUMS += "8+5-3.0 8+5-3=10 \u0668+\u0665-\u0663 __import__('os').system('true')"
WRONG_SUMS = (
    "3+8+5 10 5+5 8+5-3-3+3 8+8-6 8+5"  # wrong values, wrong numbers, one reused, one left out
)
CASES = {
    (sort_digits, "402715>"): {
        1.0: ["012457"],
        0.0: ["754210", "402715", "01245", "0124577", "٠١٢٤٥٧", "012457 ", ""],
    },
    (reverse_text, "abcd>"): {
        1.0: ["dcba"],
        0.8: ["dcbaa"],
        0.75: ["dcb"],
        0.5: ["dxbx", "dcbadcba"],
        0.0: ["abcd", "cba", ""],
    },
    (addition, "27+45>"): {1.0: ["72"], 0.0: ["62", "072", "+72", "72.0", "\uff17\uff12", ""]},
    (addition, "03+04>"): {1.0: ["07"], 0.0: ["7"]},
    (countdown, "4,4,1=1>"): {
        1.0: ["4-4+1", "1+4-4"],
        0.1: ["1"],
    },  # each once, even if two are equal
    (countdown, "3,8,5=10>"): {
        1.0: ["8+5-3", "5-3+8"],
        0.1: WRONG_SUMS.split(),
        0.0: [
            "",
            *NO_SUMS.split(),
            "8 + 5 - 3",
            "8+5-3\n",
            "8+5-3;import os",
            "8" * 100_000,
            "8+5-3" + "+1-1" * 100_000,
            "(" * 100_000,
        ],
    },
    (vowels, "abc>"): {
        1.0: ["aeiou", "a", "aaaaaaaa"],
        0.5: ["ab"],
        0.0: ["xyz", "", "A", "é"],
        0.8: ["aaaaaaaaaa"],
        0.4: ["bbbbaaaaaa"],  # the ninth and tenth do not count as vowels
    },
    (sentiment, "the plot was"): {
        1.0: [
            " great.",
            " very great and quite moving, i loved it.",
            " great and dull, i admired it.",
        ],
        0.0: [
            " great and dull.",
            " great and dull, i hated it.",
            " awful.",
            " awful, i loved it.",
            # the rest: not grammatical
            " great",
            "great.",
            " great great.",
            " great and great and great.",
            " great.great.",
            " great. ",
            " great.\n",
            " Great.",
            " loved.",
            " very very great.",
            " great, i loved it",
            " great" * 100_000,
            "",
        ],
    },
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__} {case[1]}")
def test_rewards_by_hand(case):
    task, prompt = case
    for expected, texts in CASES[case].items():
        assert task.reward([prompt] * len(texts), texts) == [expected] * len(texts)


def test_target_length():
    texts = ["ababab", "zzzzzz", "ababa", "abababab", "abab", "a" * 1000, "", "🙂🙂"]
    targets, expected = [6, 6, 6, 6, 2, 8, 3, 2], [0, 0, -1 / 6, -2 / 6, -1, -1, -1, 0]
    prompts = [f"ab{target}>" for target in targets]
    assert target_length.reward(prompts, texts, target=targets) == pytest.approx(expected)
