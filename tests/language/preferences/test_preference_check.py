"""`tokenrl reward-model --check`: what it finds in the pairs."""

from __future__ import annotations

import pytest

from tokenrl.language.preferences.fit import train_reward_model


def rows(count, *, first=0, chosen="the cat", rejected="the dog"):
    return [
        {"prompt": f"count {i}", "chosen": chosen, "rejected": rejected}
        for i in range(first, first + count)
    ]


@pytest.fixture
def check(saved, tmp_path):
    def start(train, held_out):
        data = {"train": train, "test": held_out}
        return train_reward_model(
            data=data, model=str(saved()), output_dir=tmp_path / "run", check=True
        )

    return start


def test_held_out_pairs_that_are_trained_on_and_contradictions_are_told_together(
    check, tmp_path, capsys
):
    both = rows(10) + rows(10, chosen="the dog", rejected="the cat")
    assert check(both, rows(3) + rows(2, first=50)).exit_code == 2
    error = capsys.readouterr().err
    assert "1. held-out-in-training: 3 of 5 held-out pairs are trained on too" in error
    assert "2. contradictory-pairs: 20 of 20 training pairs are there in both orders" in error
    assert check(rows(20), rows(1) + rows(4, first=50)).exit_code == 0  # few of them are a remark
    assert "held-out-in-training: 1 of 5" in "".join(capsys.readouterr())
    assert check(rows(20), rows(5, first=20)).exit_code == 0 and not (tmp_path / "run").exists()
    assert "held-out-in-training" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("chosen", "which"), [("the cat sat on the mat", "longer"), ("a", "shorter")]
)
def test_a_length_that_decides_is_a_remark(chosen, which, check, said):
    assert check(rows(20, chosen=chosen), rows(5, first=20)).exit_code == 0
    words = f"length-decides: In 100% of the training pairs the {which} completion is chosen: "
    assert words in said()
