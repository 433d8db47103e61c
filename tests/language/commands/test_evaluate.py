"""A run's model is evaluated on what the run was trained on, unless told otherwise, and sampled as it was."""

from __future__ import annotations

import pytest
from folders import read_json
from refusals import refused
from tiny_models import vowel_reward

import tokenrl
from tokenrl.cli import COMMANDS, main
from tokenrl.files import write_json
from tokenrl.flags import parse
from tokenrl.language.commands.arguments import EvaluateArguments
from tokenrl.language.commands.evaluate import as_trained
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.training.arguments import TrainArguments
from toy_tasks import load

WORDS = ["cat", "dog", "mat", "log", "one", "two", "three", "four", "the", "a"]
REWARDS = (
    "def vowels(completions, **_): return [sum(map(text.count, 'aeiou')) for text in completions]"
)
OWN = {
    "prompt_column": "question",
    "eval_size": 1,
    "reward_weights": (2.0,),
    "max_completion_length": 5,
}
SAMPLED = {"temperature": 0.7, "top_p": 0.6}
SMALL = {"prompts_per_step": 2, "num_generations": 2, "max_steps": 1, "cpu": True, "quiet": True}


@pytest.fixture
def trained(saved, workplace, cache):
    """`trained(name, **changes)`: the directory of a run on a data file with a reward of the user's own."""
    (workplace / "words.jsonl").write_text("".join(f'{{"question": "{word}"}}\n' for word in WORDS))
    (workplace / "rewards.py").write_text(REWARDS)
    data = {"task": "words.jsonl", "reward": "rewards.py:vowels", "model": str(saved(kind="chat"))}

    def trained(name="run", **changes):
        tokenrl.train(**(data | OWN | SAMPLED | {"seed": 3} | SMALL | changes), output_dir=name)
        return name

    return trained


@pytest.mark.parametrize("part", ["", "/checkpoints/step_000001"])
def test_what_is_left_out_is_as_in_the_run_and_is_said(trained, part, capsys, said):
    run = trained() + part
    asked = {"task": "words.jsonl", "reward": "rewards.py:vowels", "seed": 3} | OWN
    capsys.readouterr()
    expected = tokenrl.evaluate(model=run, **SAMPLED, **asked)
    assert "as in the run" not in capsys.readouterr().err
    assert tokenrl.evaluate(model=run) == expected and len(expected.rows) == 1
    output = capsys.readouterr().err
    assert f"tokenrl: as in the run of {run}: " in output
    assert "task words.jsonl, reward rewards.py:vowels" in output and "eval_size 1, " in output
    assert "temperature 0.7, top_p 0.6, max_completion_length 5, seed 3" in output
    assert tokenrl.evaluate(model=run, quiet=True) == expected
    assert capsys.readouterr() == ("", "")
    changed = tokenrl.evaluate(model=run, top_p=1.0)
    whole = SAMPLED | {"top_p": 1.0}
    assert changed == tokenrl.evaluate(model=run, **whole, **asked) != expected
    other = {"reward": "length(target=4)"}  # the run's weight is not that of this reward
    weighted = tokenrl.evaluate(model=run, reward_weights=1.0, **other)
    assert tokenrl.evaluate(model=run, **other) == weighted
    main(["evaluate", "--model", run, "--json", "numbers.json"])
    assert "held-out prompts of words.jsonl" in said()
    assert read_json("numbers.json") == pytest.approx(expected.metrics)


MINE = PromptTask("mine", [{"prompt": "a"}], [{"prompt": "b"}], vowel_reward, 9)
OF_DATA = {"share_seed": False, "malformed": "observe", "max_turns": 4, "eval_size": 5}
OF_DATA |= {"prompt_column": "question", "reward": ("exact_match",), "reward_weights": (2.0,)}
RECORDED = {"task": "vowels", "temperature": 0.7, "top_k": 3, "seed": 2, "truncate_prompts": True}
RECORDED |= {"max_completion_length": 7} | OF_DATA
IN_MEMORY = {"task": "in-memory:0123", "command": ""}


def recorded(folder, **changes):
    """The directory of a run that has nothing but its configuration."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", RECORDED | {"command": "tokenrl"} | changes)
    (folder / "metrics.jsonl").write_text("")
    return str(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 1.0, "top_k": 0, "seed": 0}, "--temperature 1 --top-k 0 --seed 0"),
        ({"malformed": "end", "max_turns": 10}, "--malformed end --max-turns 10"),
        ({"prompt_column": "prompt", "split": "train"}, "--prompt-column prompt --split train"),
        (
            {"task": "vowels", "max_completion_length": 256},
            "--task vowels --max-completion-length 256",
        ),
        ({"reward_weights": (1.0,)}, "--reward-weights 1"),
    ],
)
def test_what_is_given_counts_also_where_it_is_the_default_and_all_else_is_the_run_s(
    tmp_path, options, words
):
    run = recorded(tmp_path / "run")
    typed = parse("evaluate", COMMANDS["evaluate"], ["--model", run, *words.split()])
    for args in (typed, EvaluateArguments(model=run, **options)):
        assert vars(as_trained(args)).items() >= (RECORDED | options).items()


@pytest.mark.parametrize(
    ("changes", "task", "same", "length"),
    [
        ({}, "sort_digits", False, None),  # it has a limit of its own
        ({}, "other.jsonl", False, 7),
        ({}, load("vowels"), True, 7),
        ({}, MINE, False, None),
        (IN_MEMORY, [{"question": "cat"}], True, 7),
        (IN_MEMORY, "vowels", False, None),
        (IN_MEMORY | {"task": "mine"}, MINE, True, 7),
    ],
)
def test_the_settings_of_the_data_are_those_of_the_run_for_its_own_task(
    tmp_path, changes, task, same, length
):
    filled = as_trained(EvaluateArguments(model=recorded(tmp_path / "run", **changes), task=task))
    usual = vars(TrainArguments())
    expected = OF_DATA if same else {name: usual[name] for name in OF_DATA}
    of_sampling = ("temperature", "top_k", "seed", "truncate_prompts")
    expected |= {name: RECORDED[name] for name in of_sampling} | {"max_completion_length": length}
    assert vars(filled).items() >= expected.items()


def test_several_models_are_evaluated_as_the_runs_among_them_which_must_agree(
    trained, saved, capsys
):
    base, runs = str(saved(kind="chat")), [trained("a"), trained("b", seed=4)]
    result = tokenrl.evaluate(model=[base, *runs])
    assert result["b"].rows == tokenrl.evaluate(model="b", seed=3).rows
    assert "as in the run of a, b: " in capsys.readouterr().err
    hot = trained("hot", temperature=2.0)
    with refused(r"runs of a, hot differ in temperature, 0.7 and 2.0: give temperature"):
        tokenrl.evaluate(model=["a", hot])
    assert list(tokenrl.evaluate(model=["a", hot], temperature=1.0)) == ["a", "hot"]


@pytest.mark.parametrize(
    "changes",
    [
        {"task": load("vowels"), "model": None, "reward": (), "reward_weights": ()},
        {"reward": lambda completions, **_: [0.0] * len(completions)},
    ],
    ids=["toy task", "lambda"],
)
def test_what_has_no_name_is_refused_with_what_to_give(trained, changes, refusal):
    run = trained(**changes)
    error = refusal("evaluate --model", run)
    assert "say with task (--task) what it was trained on, and with reward (--reward)" in error
    options = {"task": changes.get("task", "words.jsonl"), "prompt_column": "question"}
    options |= {"reward": vowel_reward, "max_completion_length": 5}
    assert tokenrl.evaluate(model=run, **options).rows


def test_a_model_of_no_run_names_no_task(saved, refusal):
    error = refusal("evaluate --model", str(saved()))
    assert "Name the task to evaluate on: task (--task)" in error
