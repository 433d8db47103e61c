"""Files of settings, whatever is in them: read, or refused in one paragraph that names the file."""

from __future__ import annotations

import json

import pytest

from tokenrl.cli import COMMANDS, main

TRAINS = [name for name, command in COMMANDS.items() if command.trains]
SPOILT = {
    "nothing.json": "",
    "truncated.json": '{"seed": 1, "max_st',
    "list.json": "[1, 2]",
    "text.json": '"seed"',
    "null.json": "null",
    "twice.json": '{"seed": 1, "seed": 2}',
    "deep.json": "[" * 100_000,
    "seed.json": '{"seed": 9223372036854775808}',
    "nan.json": '{"learning_rate": NaN}',
    "infinite.json": '{"max_grad_norm": 1e999}',
    "list_for_number.json": '{"max_steps": [1]}',
    "mapping_for_text.json": '{"output_dir": {"a": 1}}',
    "number_for_text.json": '{"run_name": 5}',
    "null_for_text.json": '{"output_dir": null}',
    "bool_for_number.json": '{"seed": true}',
    "text_for_bool.json": '{"quiet": "yes"}',
    "other_kind.json": '{"kind": ["train"]}',
    "unknown.json": '{"vllm_mode": 5, "": 3}',
    "itself.yaml": "&a [*a]\n",
    "date.yaml": "seed: 2020-01-01\n",
    "broken.yaml": "seed: [1\n",
    "tag.yaml": "seed: !!python/object/apply:os.system ['touch oops']\n",
    "bytes.json": "\udcff",
}
ESTIMATORS = {
    "number": 5,
    "list": ["rloo"],
    "unknown": "rlooo",
    "nested": {"baseline": {"name": "rloo"}},
    "field": {"baselin": "rloo"},
    "null": None,
    "size": {"window": 1.5, "gamma": "1"},
    "bool": {"scale_ddof": True},
}


def refused(command: str, path, capsys, monkeypatch) -> str:
    monkeypatch.chdir(path.parent)
    assert main([*command.split(), "--config", str(path)]) == 2
    out, said = capsys.readouterr()
    assert said.startswith("tokenrl: ") and said.count("\n") == 1 and len(said) < 1500 and not out, said
    return said


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("command", TRAINS)
def test_a_spoilt_file_of_settings_is_refused_in_one_paragraph(command, name, tmp_path, capsys, monkeypatch):
    path = tmp_path / name
    path.write_text(SPOILT[name], encoding="utf-8", errors="surrogateescape")
    assert str(path) in refused(command, path, capsys, monkeypatch)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("command", ["train", "control"])
def test_a_spoilt_estimator_in_a_file_is_refused(command, name, tmp_path, capsys, monkeypatch):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"estimator": ESTIMATORS[name]}))
    refused(command, path, capsys, monkeypatch)


@pytest.mark.parametrize("name", ["", "absent.json", "x" * 5000, "\0", "nested/absent.yaml"])
def test_a_file_that_is_not_there_is_refused(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", name]) == 2
    said = capsys.readouterr().err
    assert "cannot be read" in said and said.count("\n") == 1


@pytest.mark.parametrize("place", ["", ".", "absent/file.json"])
@pytest.mark.parametrize(
    "command",
    [
        "lab exact --estimators rloo --json",
        "lab measure --json",
        "evaluate --model x --json",
        "advise --env bandit --json",
    ],
)
def test_a_file_of_results_that_cannot_be_written_is_refused_before_the_work(command, place, capsys):
    assert main([*command.split(), place]) == 2
    assert "cannot be written" in capsys.readouterr().err
