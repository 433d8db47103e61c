"""A run keeps how its model was asked, and every command that is given the run asks it so again."""

from __future__ import annotations

import re
import shutil

import pytest
from command_line import completes
from folders import read_json
from refusals import refused
from tiny_models import vowel_reward

import tokenrl
from tokenrl.language.policy.arguments import PromptArguments, saved_form
from tokenrl.language.policy.model import load_policy
from tokenrl.language.policy.prompts import render

WORDS = ["cat", "dog", "mat", "log", "one", "two", "three", "four"]
ROWS = [{"question": word, "completion": word[::-1]} for word in WORDS]
FORM = {"system_prompt": "count", "chat": True, "stop": (" t", "e")}
DATA = {"task": ROWS, "prompt_column": "question", "max_completion_length": 8}
SMALL = {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "cpu": True, "quiet": True}
SEEN: list[tuple] = []


def looking(prompts, completions, completion_ids, **_):
    SEEN.extend(zip(prompts, completions, strict=True))
    return vowel_reward(completions=completions, completion_ids=completion_ids)


@pytest.fixture(scope="module")
def run(saved, tmp_path_factory):
    """A fine-tuning of one step, asked in a form of its own."""
    directory = tmp_path_factory.mktemp("runs") / "sft"
    settings = {"prompt_column": "question", "max_steps": 1, "batch_size": 2, "quiet": True}
    tokenrl.sft(model=str(saved(kind="chat")), task=ROWS, output_dir=directory, **settings, **FORM)
    return directory


def test_training_goes_on_in_the_form_of_the_run_unless_told_otherwise(run, tmp_path):
    SEEN.clear()
    policy = load_policy(run)
    assert policy.form.stop == (" t", "e") and policy.stops is not None
    options = {"model": str(run), "reward": looking} | DATA | SMALL
    result = tokenrl.train(output_dir=tmp_path / "a", **options)
    config = read_json(tmp_path / "a" / "config.json")
    assert [config[name] for name in FORM] == ["count", True, [" t", "e"]]
    assert {message["role"] for prompt, _ in SEEN for message in prompt} == {"user"}
    assert not any(stop in c[0]["content"] for _, c in SEEN for stop in FORM["stop"])
    assert result.policy.form == policy.form and result.eval_after["completions/clipped_ratio"] < 1
    plain = {"system_prompt": "", "stop": (), "chat": False}
    other = tokenrl.train(output_dir=tmp_path / "b", **options, **plain).policy
    assert other.stops is None and other.encode("cat") == policy.tokenizer("cat").input_ids
    chat = [{"role": "system", "content": "count"}, {"role": "user", "content": "cat"}]
    assert result.policy.encode("cat") == other.encode(chat)


def test_evaluate_and_sample_ask_as_the_run_did(run, capsys):
    result = tokenrl.evaluate(model=str(run), reward=looking, **DATA)
    expected = tokenrl.evaluate(model=str(run / "model"), reward=looking, **DATA, **FORM)
    assert result.rows == expected.rows
    line = "tokenrl: asked: each text as a message of the user; system prompt 'count'; completions end at"
    assert capsys.readouterr().err.count(line) == 2
    words = ["sample", "--model", str(run), "--prompt", "cat", "--num-generations", "0"]
    completes(*words)
    out = capsys.readouterr()
    assert line in out.err and "without rewards. The run of" in out.err
    (completion,) = re.findall(r"^prompt     cat\ncompletion (.*)$", out.out, re.MULTILINE)
    assert "e" not in completion and " t" not in completion
    completes(*words, "--no-chat", "--system-prompt", "", "--stop")
    assert "asked" not in capsys.readouterr().err
    with refused("system_prompt is for chat messages"):
        tokenrl.sample(model=str(run), prompt="cat", chat=False)


CLOCK = "\n{{ strftime_now('%d %b %Y, %-H') if strftime_now is defined }} "
CLOCK += "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def days(monkeypatch):
    """Each look at the clock is on another day."""
    import datetime

    class Calendar(datetime.datetime):
        day_of_month = 0

        @classmethod
        def now(cls, tz=None):
            cls.day_of_month += 1
            return cls(2030, 1, cls.day_of_month, 7, 30)

    monkeypatch.setattr("tokenrl.language.policy.prompts.datetime", Calendar)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Calendar)


@pytest.fixture
def dated(saved, tmp_path):
    """A model whose chat template reads the clock."""
    shutil.copytree(saved(kind="chat"), tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text(CLOCK)
    return str(tmp_path / "dated")


def prompts_of(model, form):
    policy = load_policy(model)
    policy.ask(PromptArguments(**form))
    return render(
        policy.tokenizer, [{"role": "user", "content": "the cat"}], policy.form, "dated"
    ).strip()


def test_a_template_that_reads_the_clock_has_one_time_in_a_run(dated, days, tmp_path):
    """It stands in config.json, so that a continuation and an evaluation on another day ask the same."""
    run = tmp_path / "run"

    def trained(steps, folder=run, **settings):
        shape = {"model": dated, "output_dir": folder, "save_every": 1, "chat": True}
        shape |= {"lr_scheduler_type": "constant", "eval_every": 1}
        settings = SMALL | DATA | shape | settings | {"max_steps": steps}
        return tokenrl.train(reward=looking, **settings)

    trained(1)
    recorded = read_json(run / "config.json")["chat_time"]
    assert re.fullmatch(r"2030-01-\d\dT07", recorded)
    trained(2, resume="auto")  # on another day
    trained(2, tmp_path / "given", chat_time=recorded)
    assert read_json(run / "config.json")["chat_time"] == recorded
    assert (tmp_path / "given" / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    day = f"{recorded[8:10]} Jan 2030, 7 the cat"
    assert prompts_of(run, saved_form(str(run))).startswith(day)
    assert not prompts_of(dated, {}).startswith(day)
