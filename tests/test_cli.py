"""The command line: what it prints, and the exit codes that scripts rely on."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from command_line import completes
from folders import read_json, write_rows
from refusals import refused

import tokenrl
import tokenrl.__main__
from tokenrl.cli import COMMANDS, main
from tokenrl.configuration import configured
from tokenrl.core import Estimator
from tokenrl.files import write_json
from tokenrl.flags import parse
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import arguments as made, field_types

TRAIN = shlex.split(
    "train --task vowels --max-steps 2 --prompts-per-step 2 --num-generations 3 --eval-generations 1 "
    "--eval-size 16 --output-dir run"
)
EVALUATE = shlex.split("evaluate --task vowels --eval-size 16 --json numbers.json --model")

REWARDS = """
calls = 0
def fails(completions): raise KeyError("answer")
def fails_later(completions):
    global calls
    calls += 1
    if calls > 3: raise SystemExit(0)
    return [len(c) for c in completions]
class Game:
    def reset(self): ...
"""


@pytest.fixture(autouse=True)
def _rewards(workplace, cache):
    (workplace / "made_up_rewards.py").write_text(REWARDS)


def assert_repeats(name: str, run: Path) -> None:
    """Check that a run's configuration and its command repeat it byte for byte, and that others refuse it."""
    assert read_json(run / "config.json")["kind"] == name
    module, _, function = COMMANDS[name].function.partition(":")
    continued = dataclasses.replace(configured(COMMANDS[name].arguments, run, name), resume="auto")
    getattr(importlib.import_module(module), function)(continued)
    recorded = shlex.split(read_json(run / "config.json")["command"])  # by a program
    assert recorded[:3] == ["tokenrl", name, "--config"]
    completes(*recorded[1:], "--output-dir", "again", "--quiet")
    (weights,) = (run / "model").glob("*.safetensors")
    for file in ("metrics.jsonl", f"model/{weights.name}"):
        assert (run / file).read_bytes() == (Path("again") / file).read_bytes(), file
    assert main(["train" if name == "control" else "control", "--config", str(run)]) == 2


def test_ctrl_c_before_a_run_is_acknowledged(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenrl.cli.main", interrupted)
    assert tokenrl.__main__.main() == 130
    assert "stopped by Ctrl-C. A training saves nothing before" in capsys.readouterr().err


def test_train_evaluate_sample_report(model, capsys, refusal, tmp_path):
    flags = "--estimator grpo --estimator.scale none --estimator.beta 0.1 --lora-r 2 --seed 3"
    completes(*TRAIN, "--model", model, *flags.split())
    out = capsys.readouterr().out
    assert (
        "no measure of progress" in out
        and "2/2" in out
        and "reward_greedy" in out
        and "scale none" in out
    )
    assert_repeats("train", Path("run"))
    assert "is for `tokenrl train`; give it to that command" in capsys.readouterr().err
    completes(*EVALUATE, "run/model")
    assert "reward_greedy" in capsys.readouterr().out
    numbers = read_json(tmp_path / "numbers.json")
    after = read_json(tmp_path / "run" / "summary.json")["eval_after"]
    assert numbers["reward_greedy"] == pytest.approx(after["reward_greedy"])
    completes("sample --model run/model --prompt abc> xyz> --num-generations 2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["prompt", "reward", "reward"] * 2
    file = tmp_path / "run" / "config.json"
    config = read_json(file)
    del config["kind"]  # as in runs of before it was written
    write_json(file, config)
    (tmp_path / "run" / "report.html").unlink()
    completes("report run")
    assert "prompts" in (tmp_path / "run" / "report.html").read_text()
    assert "several runs" in refusal("report run --output page.html")
    assert not (tmp_path / "page.html").exists()
    completes("report run again --output both.html")
    assert capsys.readouterr().out == "both.html\n"
    assert "eval_reward_greedy" in (tmp_path / "both.html").read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The untrained model of a toy task."""
    import toy_tasks
    from tokenrl.language.policy.model import wrap
    from tokenrl.language.policy.saving import save_policy

    directory = tmp_path_factory.mktemp("model") / "vowels"
    save_policy(wrap(*toy_tasks.load("vowels").build(0)), directory)
    return str(directory)


def test_evaluate_prints_a_table_and_compares_models_prompt_by_prompt(model, capsys, refusal):
    completes(*EVALUATE, model, "--k", "1", "3", "--reference", model, "--temperature", "0.9")
    assert "best@3" in capsys.readouterr().out
    numbers = read_json("numbers.json")
    assert {"best@3_stderr", "rewards/reward/mean"} <= numbers.keys()
    assert abs(numbers["kl"]) < 1e-5 and numbers["best@1"] == pytest.approx(numbers["reward"])
    assert "num_generations=2" in refusal(*EVALUATE, model, "--k", "8", "--num-generations", "2")
    completes(*TRAIN, "--model", model, "--learning-rate", "3e-3", "--quiet")
    completes(*EVALUATE, model, "run")
    out = capsys.readouterr().out
    assert "difference/ is minus" in " ".join(out.split()) and "±" in out
    numbers = read_json("numbers.json")
    assert list(numbers) == sorted([model, "run"])
    base, trained = numbers[model], numbers["run"]
    assert trained["difference/reward"] == pytest.approx(trained["reward"] - base["reward"]) != 0
    assert "difference/reward" not in base


@pytest.fixture
def talk(monkeypatch, capsys):
    """`talk(lines, *words)`: exit code, output lines and own errors of `tokenrl sample` fed through a pipe."""

    def talk(lines, *words):
        sent = "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent), "utf-8"))
        code = main(["sample", *words])
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("tokenrl:")]
        return code, captured.out.splitlines(), "".join(errors)

    return talk


def test_sample_talks_line_by_line_and_reads_on_after_an_error(model, talk):
    words = "--model", model
    code, out, error = talk(["abc>", "", "a" * 200, "abc>"], *words)
    assert code == 0 and len(out) == 2 * (1 + 4) and out[0] == out[5] == "prompt     abc>"
    assert all(line.startswith("completion ") for line in [*out[1:5], *out[6:]])
    assert error.count("tokenrl:") == 1 and "context" in error
    code, read_on, error = talk(["\udcff", "abc>"], *words)  # a byte that is no UTF-8
    assert code == 0 and read_on == out[:5] and r"holds '\udcff'" in error
    code, once, _ = talk([], *words, "--prompt", "abc>")
    assert code == 0 and once == out[:5] != out[5:]  # the same prompt again: new draws
    assert talk([], *words) == (0, [], "")
    for prompt, fault in (("abc\ud800", "UTF-8"), ("a" * 200, "context")):
        code, none, error = talk([], *words, "--prompt", prompt)
        assert (code, none) == (2, []) and fault in error


def test_a_terminal_is_asked_and_left_cleanly(model, monkeypatch, capsys):
    typed = [KeyboardInterrupt, EOFError, "abc>"]

    def ask(mark):
        if isinstance(word := typed.pop(), type):
            raise word
        return word

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", ask)
    for prompts in (1, 0):
        completes("sample --model", model, "--num-generations", "1")
        out = capsys.readouterr().out
        assert "Ctrl-D" in out and out.endswith("\n")
        assert out.count("\nprompt     abc>") == prompts


def test_sft_makes_a_model_that_train_takes(model, refusal, tmp_path):
    rows = [{"prompt": f"{x}>", "completion": x * 3} for x in "abcdefgh"] * 4
    write_rows(tmp_path / "demonstrations.jsonl", rows)
    sft = ["sft", "--task", "demonstrations.jsonl", "--model", model, "--output-dir", "tuned"]
    completes(*sft, "--max-steps", "4", "--batch-size", "16", "--learning-rate", "3e-3")
    summary = read_json(tmp_path / "tuned" / "summary.json")
    assert summary["loss_after"] < summary["loss_before"] and summary["exit_reason"] == "finished"
    assert_repeats("sft", Path("tuned"))
    assert "already holds a run" in refusal(*sft)
    completes(*TRAIN[:-1], "second", "--model", "tuned", "--quiet")


def test_reward_model_makes_a_reward_that_train_takes(model, capsys, tmp_path):
    pairs = [(x, n) for x in "abcdefgh" for n in (1, 2, 3)]
    rows = [{"prompt": f"{x}>", "chosen": "a" * n, "rejected": "b" * n} for x, n in pairs]
    write_rows(tmp_path / "preferences.jsonl", rows)
    judge = "reward-model --data preferences.jsonl --output-dir judge --max-steps 6 --eval-size 4"
    completes(f"{judge} --learning-rate 3e-3 --model", model)
    assert "Bradley-Terry" in capsys.readouterr().out
    summary = read_json(tmp_path / "judge" / "summary.json")
    assert summary["eval_after"]["margin"] > max(0, summary["eval_before"]["margin"])
    assert_repeats("reward-model", Path("judge"))
    completes("report judge")
    assert "accuracy" in (tmp_path / "judge" / "report.html").read_text()
    completes(*TRAIN[:-1], "second", "--reward", "judge/model", "--quiet")
    line = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[1])
    assert math.isfinite(line["rewards/model/mean"])


def test_an_agent_is_trained_and_its_configuration_repeats_it():
    world = "control --env gridworld --num-envs 4 --eval-episodes 4 --max-steps 3 --seed 3 --num-steps 8"
    completes(f"{world} --estimator ppo --hidden 8 8 --output-dir run --quiet")
    assert_repeats("control", Path("run"))


def test_settings_come_from_yaml_and_flags_win(tmp_path):
    def read(*words):
        return parse("train", COMMANDS["train"], [*words])

    text = "task: vowels\nmax_steps: 7\nlearning_rate: 1e-3\nestimator: grpo\n"
    (tmp_path / "mine.yaml").write_text(text)
    grpo = Estimator.preset("grpo")
    args = TrainArguments(task="vowels", max_steps=2, learning_rate=1e-3, estimator=grpo)
    assert read("--config", "mine.yaml", "--max-steps", "2") == args
    text = "# a comment\nreward: [exact_match, x.py:one]\nestimator:\n  beta: 2.5E-2\nmicro_batch_size: null"
    (tmp_path / "other.yml").write_text(text)
    args = TrainArguments(reward=("exact_match", "x.py:one"), estimator=Estimator(beta=0.025))
    assert read("--config", "other.yml") == args
    (tmp_path / "own.json").write_text('{"output_dir": "named"}')
    assert read("--config", "own.json").output_dir == "named"
    flags = "--config=mine.yaml --estimator dapo --estimator.scale-ddof 0 --no-quiet"
    args = read(*flags.split())
    assert args.estimator == Estimator.preset("dapo", scale_ddof=0) and args.max_steps == 7


STORED = {"output_dir": "old", "resume": "auto", "overwrite": True, "quiet": True, "versions": {}}


def test_what_a_flag_says_of_an_old_run_counts_and_not_what_a_file_says():
    """How a run was shown is none of its settings."""
    write_json(Path("config.json"), STORED)
    for words, where in (
        ("", (None, None, False, False)),
        ("--overwrite", ("old", None, True, False)),
        ("--resume auto", ("old", "auto", False, False)),
    ):
        args = parse("train", COMMANDS["train"], ["--config", "config.json", *words.split()])
        assert (args.output_dir, args.resume, args.overwrite, args.quiet) == where


FORMS = [
    ("train --warm-start --seed 1", "warm_start", True),
    ("train --warm-start auto", "warm_start", "auto"),
    ("train --config warm.json --no-warm-start", "warm_start", False),
    ("sample --prompt A --seed 3 --prompt B C", "prompt", ("A", "B", "C")),
    ("sample --prompt=--x -1 --prompt= --prompt --seed 3", "prompt", ("--x", "-1", "")),
    ("train --reward-weights 1 -2 --reward_weights 3", "reward_weights", (1.0, -2.0, 3.0)),
    (
        "compare --learning-rate fixed --learning-rate 1e-3,.1",
        "learning_rate",
        ("fixed", 1e-3, 0.1),
    ),
]


@pytest.mark.parametrize(("line", "name", "value"), FORMS)
def test_a_switch_also_takes_a_word_and_a_list_that_is_repeated_adds_values(line, name, value):
    Path("warm.json").write_text('{"warm_start": true}')
    command, *words = line.split()
    assert getattr(parse(command, COMMANDS[command], words), name) == value


def test_the_help_shows_flags_in_groups_those_that_matter_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):  # a preset changes what the help shows
        main(["train", "--estimator", "grpo", "--warm_start", "--help"])
    text = capsys.readouterr().out
    parts = re.split(r"^\W*((?:[A-Za-z]+ )*)options\W*$", text, flags=re.MULTILINE)
    titles = [title.strip() for title in parts[1::2]]
    assert titles[:5] == ["", "sampling", "logged rows", "optimiser", "KL control"]
    assert titles[-1] == "estimator"
    flags = [re.findall(r"^\W*--([a-z.-]+)", group, re.MULTILINE) for group in parts[2::2]]
    first = "task reward model estimator output-dir max-steps prompts-per-step num-generations "
    first += "max-completion-length learning-rate seed"
    assert flags[0][:11] == first.split() and "config" in flags[0] and len(flags[0]) < 20
    names = {field.name for field in dataclasses.fields(TrainArguments)}
    names |= {f"estimator.{field.name}" for field in dataclasses.fields(Estimator)}
    names = {"config"} | {name.replace("_", "-") for name in names}
    assert sorted(chain(*flags)) == sorted(names)  # each once, none left out


def test_every_command_has_a_help(capsys):
    for command, (arguments, *_) in COMMANDS.items():
        with pytest.raises(SystemExit) as exit:
            main([*command.split(), "--help"])
        assert exit.value.code == 0 and arguments.__doc__.split()[0] in capsys.readouterr().out


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "tokenrl", "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("tokenrl: There is no command 'fly'")


TABLE = """
train --learning-rate 1e-5x | learning_rate was given as '1e-5x'; it must be a finite number above 0
train --estimator grppo | preset was given as 'grppo'. Did you mean 'grpo'? It must be one of
train --lerning-rate 3 | There is no flag --lerning-rate. Did you mean '--learning-rate'? See tokenrl
train --epsilon 0.3 | There is no flag --epsilon. It is an axis of the estimator: --estimator.epsilon 0.3.
train --max-steps | Missing value for argument '--max-steps'
train --output-dir --quiet | Missing value for argument '--output-dir'
train --warm-start often | warm_start was given as 'often'; it must be True or False, or one of auto.
train extra | There is no flag extra. No flag takes this word: a text with spaces stands in quotes
train --task good.jsonl --model MODEL | --reward
train --task made_up_rewards.py | The file defines fails, fails_later, Game.
train --reward made_up_rewards.py | The file defines fails, fails_later, Game.
train --environment made_up_rewards.py --reward none | The file defines fails, fails_later, Game.
train --task vowels --reward made_up_rewards:fails --eval-size 2 --model MODEL | KeyError
report | Name the output directory
evaluate --task vowels | Name the model
evaluate --model MODEL --json absent/file.json | cannot be written
evaluate --model MODEL --json /proc/file.json | cannot be written
lab exact --estimators rloo --json . | cannot be written
compare --task sort_digits --json /proc/file.json | cannot be written
report one two --output /proc/file.html | cannot be written
lab exact --estimators rlo | knows no estimator 'rlo'. Did you mean 'rloo'?
lab measure --json absent/file.json | cannot be written
sample | model
"""
"""What is typed, and what it is refused with before anything is done."""


@pytest.mark.parametrize("line", TABLE.strip().splitlines())
def test_a_mistake_is_one_paragraph_and_exit_code_2(line, model, refusal, workplace):
    (workplace / "good.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    words, _, sentence = line.replace("MODEL", model).partition(" | ")
    directory = " --output-dir run --quiet" if "good" in words or "fails" in words else ""
    error = refusal(words + directory)
    assert error.startswith("tokenrl: ") and sentence in error and error.count("\n") == 1
    assert "│" not in error and "Annotated" not in error
    assert not (workplace / "run" / "config.json").exists()


def test_each_file_that_a_command_writes_is_tried_where_the_setting_is_made():
    """A directory without permission, or a name that is too long for its hidden partial, came up at the end."""
    kinds = [command.arguments for command in COMMANDS.values()]
    files = [(kind, {*field_types(kind)} & {"json", "output"}) for kind in kinds]
    assert sum(bool(names) for _, names in files) == 6
    for kind, names in files:
        for name in names:
            with refused("x cannot be written .*Give the name of a file"):
                made(kind, {name: "x" * 250, **({"run_dir": "a"} if name == "output" else {})})


def test_a_failure_during_the_run_is_exit_code_1(model, capsys):
    fails = ["--reward", "made_up_rewards:fails_later"]
    assert main([*TRAIN, "--model", model, "--quiet", *fails]) == 1
    error, summary = capsys.readouterr().err, read_json("run/summary.json")
    raised = r"Reward function fails_later raised SystemExit: 0 \(made_up_rewards"
    assert re.search(rf"At step \d: {raised}", error) and "Traceback" not in error
    assert summary["exit_reason"] == "failed" and re.search(raised, summary["error"])


def test_the_bare_command(capsys):
    for argv, code, words in (([], 2, "train"), (["--help"], 0, "train"), (["--version"], 0, ".")):
        assert main(argv) == code
        assert words in capsys.readouterr().out


LITERAL = [r"{question}\nAnswer:", r"a\tb", r"Think.\n\nThen answer."]
PLAIN = ["{question}\nAnswer:", r"\times \theta \neq \nu_1", r"C:\Users\x", "/n"]


@pytest.mark.parametrize(("name", "setting"), [("train", "prompt_template"), ("evaluate", "stop")])
def test_an_escape_that_no_shell_has_read_is_refused_and_keywords_are_taken_as_they_stand(
    name, setting
):
    flag, kind = f"--{setting.replace('_', '-')}", COMMANDS[name].arguments
    for text in LITERAL:
        with refused(rf"{setting} holds \\[nrt], a backslash.* \$'"):
            parse(name, COMMANDS[name], [flag, text])
        assert getattr(made(kind, {setting: text}), setting) in (text, (text,))
    for text in PLAIN:
        assert getattr(parse(name, COMMANDS[name], [flag, text]), setting) in (text, (text,))
