"""The command line of a comparison: its own flags, and those of its runs."""

import pytest

from tokenrl.cli import COMMANDS, main
from tokenrl.errors import Refused
from tokenrl.flags import parse
from tokenrl.lab.compare.planning import make_plan
from tokenrl.lab.compare.run import _arguments
from tokenrl.language.training.arguments import TrainArguments


def parsed(text):
    return parse("compare", COMMANDS["compare"], text.split())


def test_flags_of_the_runs_are_shared_and_the_others_are_its_own():
    found = parsed(
        "--task sort_digits reverse_text --arms rloo grpo,scale=none --seeds 8 --max-steps 50 --lora-r 4 "
        "--estimator.aggregation sequence_mean --no-chat --learning-rate 1e-4 2e-4 --optimizer=sgd"
    )
    assert found.task == ("sort_digits", "reverse_text") and found.arms == ("rloo", "grpo,scale=none")
    assert found.seeds == 8 and found.learning_rate == ("1e-4", "2e-4")
    assert found.shared == {
        "max_steps": 50,
        "lora_r": 4,
        "estimator": {"aggregation": "sequence_mean"},
        "chat": False,
        "optimizer": "sgd",
    }


def test_a_flag_that_is_typed_counts_even_if_train_has_the_same_default():
    usual = TrainArguments().stop_after_zero_spread
    typed = parsed(f"--arms rloo grpo --stop-after-zero-spread {usual} --no-chat")
    assert typed.shared == {"stop_after_zero_spread": usual, "chat": False}
    plan = make_plan(typed, print)
    assert plan.problems[0].settings["stop_after_zero_spread"] == usual
    assert make_plan(parsed("--arms rloo grpo"), print).problems[0].settings["stop_after_zero_spread"] == 0


def test_with_an_environment_the_settings_are_those_of_control():
    found = parsed("--env walk CartPole-v1 --arms reinforce rloo --num-envs 8 --hidden 16 16")
    assert found.env == ("walk", "CartPole-v1") and found.shared == {"num_envs": 8, "hidden": [16, 16]}


def test_settings_of_the_runs_may_come_from_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("max_steps: 30\ntemperature: 0.9\n")
    assert parsed(f"--config {tmp_path}/mine.yaml --seeds 3").shared == {"max_steps": 30, "temperature": 0.9}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--estimator grpo", "as --arms"),
        ("--env walk --agent classic", "as --arms"),
        ("--seeds 1", "at least 2"),
        ("--max-steps -3", "at least 1"),
        ("--margin 0", "above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(text, words):
    with pytest.raises(Refused, match=words):
        parsed(text)


@pytest.mark.parametrize("text", ["--seeds many", "--no-such-flag 3", "--metric rewards"])
def test_a_mistake_on_the_command_line_is_told_with_exit_code_2(text, capsys):
    try:
        code = main(["compare", *text.split()])
    except SystemExit as error:
        code = error.code
    assert code == 2 and "Traceback" not in capsys.readouterr().err


def test_keywords_of_the_runs_are_shared_too():
    found = _arguments(
        None, {"task": "addition", "arms": ["rloo", "grpo"], "max_steps": 9, "learning_rate": 1e-3}
    )
    assert (
        found.task == ("addition",) and found.shared == {"max_steps": 9} and found.learning_rate == ("0.001",)
    )
    with pytest.raises(Refused, match="one of the two"):
        _arguments(found, {"seeds": 3})
