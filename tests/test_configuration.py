"""Files of settings, whatever is in them: read, or refused in one paragraph that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import refused

from tokenrl.cli import COMMANDS, main
from tokenrl.configuration import configured
from tokenrl.files import write_json
from tokenrl.language.training.arguments import TrainArguments

TRAINS = [name for name, command in COMMANDS.items() if command.trains]
SPOILT = {
    "nothing.json": "",
    "truncated.json": '{"seed": 1, "max_st',
    "list.json": "[1, 2]",
    "text.json": '"seed"',
    "null.json": "null",
    "deep.json": "[" * 100_000,
    "null_for_text.json": '{"split": null}',
    "other_kind.json": '{"kind": ["train"]}',
    "unknown.json": '{"vllm_mode": 5, "": 3}',
    "itself.yaml": "&a [*a]\n",
    "date.yaml": "seed: 2020-01-01\n",
    "broken.yaml": "seed: [1\n",
    "tag.yaml": "seed: !!python/object/apply:os.system ['touch oops']\n",
    "twice.json": '{"seed": 1,\n "estimator": {"scale": "none"},\n "seed": 2}',
    "twice_inside.json": '{"estimator": {"scale": "none", "gamma": 1,\n "scale": "none"}}',
    "twice.yaml": "seed: 1\nquiet: true\n'seed': 2\n",
    "bytes.json": "\udcff",
    "surrogate.json": '{"run_name": "a\\udcff"}',
}
VALUES = {
    "model": ("false", "5", "[]", '["x"]', "{}"),
    "task": ("true", "[1]", "{}"),
    "data": ("true", "[1]", "{}"),
    "estimator": ("5", '["rloo"]', '"rlooo"', '{"baseline": {}}', '{"baselin": 1}', "null"),
}
for name, values in VALUES.items():
    for number, value in enumerate(values):
        SPOILT[f"{name}_{number}.json"] = f'{{"{name}": {value}}}'


WORDS = {"list.json": "is a list; it must map names to values", "truncated.json": "cannot be read"}
WORDS |= dict.fromkeys(("twice.json", "twice.yaml"), "gives 'seed' a second time")
WORDS |= {"twice_inside.json": "gives 'scale' a second time"}
WORDS["broken.yaml"] = "cannot be read"
pytestmark = pytest.mark.usefixtures("workplace")


def assert_refused(command: str, path, capsys) -> str:
    assert main([*command.split(), "--config", str(path)]) == 2
    out, errors = capsys.readouterr()
    lines = max(1, errors.count("There is no setting"))  # a hint for each name
    assert (
        errors.startswith("tokenrl: ")
        and errors.count("\n") == lines
        and len(errors) < 1750
        and not out
    ), errors
    return errors


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file_of_settings_is_refused_in_one_paragraph(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(SPOILT[name], encoding="utf-8", errors="surrogateescape")
    for command in TRAINS:
        errors = assert_refused(command, path, capsys)
        assert str(path) in errors and WORDS.get(name, "") in errors
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_file_that_is_not_there_is_refused(capsys):
    for name in ("", "absent.json", "x" * 5000, "\0", "nested/absent.yaml"):
        assert "cannot be read" in assert_refused("train", name, capsys)


def test_a_setting_of_an_earlier_version_is_refused_with_its_sentence_unless_it_was_off(tmp_path):
    file = tmp_path / "config.json"
    old = {
        "versions": {},
        "seed": 4,
        "minutes": None,
        "on_reward_timeout": "stop",
    }
    write_json(file, old)
    assert configured(COMMANDS["train"].arguments, file, "train").seed == 4
    write_json(file, old | {"minutes": 5})
    with refused(r"no setting 'minutes'\. --check prints the seconds of a step"):
        configured(COMMANDS["train"].arguments, file, "train")


def test_words_of_yaml_without_quotes_are_texts_but_for_those_of_version_1_2():
    text = (
        "task: on\nchat_time: 2026-01-31\nsystem_prompt: 12:30\nstop: [no, yes]\noutput_dir: off\n"
    )
    numbers = "seed: 010\nlearning_rate: 1e-3\ntop_p: .5\nchat: true\nresume: ~\n"
    Path("a.yaml").write_text(text + numbers)
    args = configured(TrainArguments, "a.yaml", "train")
    assert (args.task, args.chat_time, args.system_prompt) == ("on", "2026-01-31", "12:30")
    assert (args.stop, args.output_dir, args.resume) == (("no", "yes"), "off", None)
    assert (args.seed, args.learning_rate, args.top_p, args.chat) == (10, 1e-3, 0.5, True)
    for word in ("no", "on", "2026-01-31"):
        Path("a.yaml").write_text(f"quiet: {word}")
        with refused(f"quiet was given as '{word}'; it must be True or False"):
            configured(TrainArguments, "a.yaml", "train")
