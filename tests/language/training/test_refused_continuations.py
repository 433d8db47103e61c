"""A run is continued only with its own data, tokenizer, base model and settings; else nothing is touched."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import PROMPTS, vowel_reward

import tokenrl
from tokenrl.errors import Refused


@pytest.fixture
def train(saved, tmp_path):
    """`train(...)`: a run of two steps on a model and a data file that can be changed."""
    shutil.copytree(saved(), tmp_path / "model")
    rows = [json.dumps({"prompt": f"{prompt} {word}"}) for prompt in PROMPTS for word in ("one", "two")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def run(**changes):
        settings = {
            **{"model": str(tmp_path / "model"), "task": str(tmp_path / "rows.jsonl"), "estimator": "rloo"},
            **{"reward": vowel_reward, "output_dir": tmp_path / "run", "max_steps": 2, "prompts_per_step": 2},
            **{"num_generations": 2, "max_completion_length": 4, "eval_size": 2, "eval_every": 1},
            **{
                "learning_rate": 0.01,
                "threads": 1,
                "quiet": True,
                "cpu": True,
            },
        }
        return tokenrl.train(**(settings | changes))

    return run


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_data(folder):
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text.replace("sat on the two", "sat on the mat"))


def change_tokenizer(folder):
    described = json.loads((folder / "model" / "tokenizer.json").read_text())
    described["added_tokens"][1]["lstrip"] = True
    (folder / "model" / "tokenizer.json").write_text(json.dumps(described))


def change_base(folder):
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] *= 1 + 2**-20
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (change_data, {}, "The data is not the same"),
        (change_tokenizer, {}, "The tokenizer is not the same"),
        (change_base, {}, "The base model is not the same"),
        (None, {"seed": 1}, "other settings: seed: 0, now 1"),
        (None, {"learning_rate": 0.02}, r"learning_rate: 0\.01, now 0\.02"),
        (None, {"estimator": "grpo"}, "estimator: .*'rloo'.*, now .*'group_mean'"),
    ],
)
def test_a_run_of_something_else_is_refused_and_nothing_is_touched(train, tmp_path, change, settings, words):
    train()
    before = files(tmp_path / "run")
    if change is not None:
        change(tmp_path)
    with pytest.raises(Refused, match=words):
        train(resume="auto", max_steps=4, **settings)
    assert files(tmp_path / "run") == before


def test_a_finished_run_is_left_as_it_is_and_more_steps_continue_it(train, tmp_path):
    first = train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = train(resume="auto")
    assert (again.exit_code, again.exit_reason, again.steps) == (0, "finished", 2)
    assert again.eval_after == first.eval_after and again.eval_before == first.eval_before
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    train(resume="auto", max_steps=4, save_every=1)
    train(output_dir=tmp_path / "whole", max_steps=4)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
