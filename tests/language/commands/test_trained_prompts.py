"""A model remembers the prompts that it was trained on, and each later command counts those that it evaluates on."""

from __future__ import annotations

import os
import shutil

import pytest
from folders import read_json, write_rows
from refusals import refused

from tests.language.tiny_models import make_policy
from tokenrl.core.estimator import Estimator
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.problems import make_plan
from tokenrl.language.commands.evaluate import evaluate
from tokenrl.language.policy.model import load_policy
from tokenrl.language.preferences.fit import train_reward_model
from tokenrl.language.supervised.sft import sft
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.task import load_task
from tokenrl.language.training.loop import train

ROWS = [{"prompt": f"{i} the cat", "completion": "ab"[i * i % 7 % 2]} for i in range(50)]
SMALL = {"max_steps": 1, "learning_rate": 1e-3, "quiet": True}
SIZES = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 3}


def reward(completions, **_):
    return [float(len(text) % 2) for text in completions]


HELD_OUT = load_task(ROWS, reward=reward).eval_prompts
WORDS = f"{len(HELD_OUT)} of the {len(HELD_OUT)} held-out rows have prompts that"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two warm starts: one of a split that holds all rows, and one of rows that were divided."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "rows.jsonl", ROWS)
    tasks = {"all": {"train": ROWS, "test": ROWS[:5]}, "rest": str(folder / "rows.jsonl")}
    return {
        name: sft(task=task, model=make_policy(), output_dir=folder / name, **SMALL)
        for name, task in tasks.items()
    }


def warnings_of(run):
    return " ".join(read_json(run / "summary.json")["warnings"])


@pytest.mark.parametrize(("name", "expected"), [("all", 1), ("rest", 0)])
def test_a_training_and_an_evaluation_count_them(name, expected, runs, tmp_path, capsys):
    start = runs[name]
    path = str(start.output_dir)
    for number, model in enumerate((path, start.policy)[: 1 + expected]):
        run = tmp_path / str(number)
        train(model=model, task=ROWS, reward=reward, output_dir=run, **SMALL, **SIZES)
        assert warnings_of(run).count(f"{WORDS} the model was trained on") == expected
    # and the run that began with it remembers them too
    for model in (path, str(run)):
        evaluate(model=model, task=ROWS, reward=reward, num_generations=0, seed=0)
        assert capsys.readouterr().err.count(WORDS) == expected


def test_a_teacher_a_judge_and_the_base_of_a_comparison_count_too(runs, tmp_path):
    path = str(runs["all"].output_dir)
    pairs = [{"prompt": row["prompt"], "chosen": "a", "rejected": "b"} for row in ROWS]
    judge = str(tmp_path / "judge")
    train_reward_model(data=pairs, model=path, output_dir=judge, **SMALL)
    options = {"teacher": path, "estimator": Estimator(beta=0.1)} | SMALL | SIZES
    run = tmp_path / "run"
    train(model=make_policy(), task=ROWS, reward=[judge, reward], output_dir=run, **options)
    warnings = warnings_of(run)
    assert warnings.count(WORDS) == 2
    assert f"{WORDS} the teacher was" in warnings and f"{WORDS} the reward judge was" in warnings
    notes = []
    file = str(runs["rest"].output_dir.parent / "rows.jsonl")
    options = {"reward": "length(target=3)", "model": path}
    options |= {"task": [file], "arms": ["rloo", "reinforce"]}
    make_plan(CompareArguments(**with_shared(options)), notes.append)
    assert f"{WORDS} the model was trained on" in " ".join(notes)


def told(model, data, **options):
    """Whether held-out rows are said to be among those that the model was trained on."""
    task = load_task(data, reward=reward, **options)
    return "the model was" in str(division_of(task, None, {"the model": load_policy(model)})[1])


def test_weights_carry_their_record_wherever_they_are_copied(runs, tmp_path):
    run = runs["all"].output_dir
    for folder in (run / "model", run / "checkpoints" / "step_000001"):
        model = shutil.copytree(folder, tmp_path / folder.name)
        record = (model / "trained_prompts.txt").read_bytes()
        assert told(model, ROWS)
        (model / "trained_prompts.txt").unlink()  # as before it is shared, and nothing is damaged
        assert not told(model, ROWS)
    (tmp_path / "trained_prompts.txt").write_bytes(record)  # as earlier versions wrote it
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path)
    assert told(tmp_path, ROWS)
    os.mkfifo(model / "trained_prompts.txt")
    with refused("trained_prompts.txt is a pipe"):
        load_policy(model)


def asked(*turns):
    """The same questions in another dress."""
    return [{"prompt": [*turns, {"role": "user", "content": f"{row['prompt']}\n"}]} for row in ROWS]


SYSTEM = {"role": "system", "content": "Be brief."}
LEVELS = [row | {"level": i % 5} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("learnt", "data", "template", "expected"),
    [
        ("Q: {prompt} A:", ROWS, "Answer {prompt}.", True),
        ("Q: {prompt} A:", asked(SYSTEM), None, True),
        ("{level} {prompt}", LEVELS, "{prompt} ({level})", True),
        (None, LEVELS, "Q: {prompt} A:", True),
        (None, [{"prompt": f"{i} a dog"} for i in range(50)], None, False),
    ],
)
def test_a_question_in_another_dress_is_known_again(learnt, data, template, expected, tmp_path):
    task = {"train": LEVELS, "test": LEVELS[:5]}
    sft(
        task=task, prompt_template=learnt, model=make_policy(), output_dir=tmp_path / "run", **SMALL
    )
    assert told(tmp_path / "run", data, prompt_template=template) == expected


def test_where_the_turn_of_the_system_asks_the_same_words_of_the_user_are_no_question():
    rows = [
        {"prompt": [{"role": "system", "content": f"{i}"}, *asked()[0]["prompt"]]}
        for i in range(50)
    ]
    for first, words in ((40, ""), (38, "2 of the 12 held-out rows")):
        task = load_task({"train": rows[:40], "test": rows[first:]}, reward=reward)
        assert "".join(division_of(task, None)[1]).startswith(words)
        assert bool(words) == bool(division_of(task, None)[1])
