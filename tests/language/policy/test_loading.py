"""What can be loaded as a model, and what is refused by name before a library reads it."""

import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, make_policy, make_tokenizer

from tokenrl.cli import main
from tokenrl.errors import Refused
from tokenrl.language.policy.model import add_lora, load_policy
from tokenrl.language.policy.saving import save_policy
from tokenrl.language.preferences.data import reward_backbone
from tokenrl.language.rewards.model import RewardModel

LOADERS = [load_policy, RewardModel, reward_backbone]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By loader, the folder of a model that it loads."""
    place = tmp_path_factory.mktemp("models")
    (place / "reward").mkdir()
    save_policy(make_policy(), place / "model")
    save_policy(reward_backbone(str(place / "model")), place / "reward")
    return {
        load_policy: place / "model",
        RewardModel: place / "reward",
        reward_backbone: place / "model",
    }


def half(file):
    os.truncate(file, file.stat().st_size // 2)


def header(file):
    """Flip a bit among the first bytes, where safetensors keeps the length of its header."""
    data = file.read_bytes()
    file.write_bytes(data[:3] + bytes([data[3] ^ 0x40]) + data[4:])


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_a_damaged_file_is_named(sources, load, tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        for damage in (half, header) if load is load_policy else (header,):
            copy = shutil.copytree(sources[load], tmp_path / name / damage.__name__)
            damage(copy / name)
            said = rf"The file {name} of the model in {copy} is damaged"
            with pytest.raises(Refused, match=said) as caught:
                load(str(copy))
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_a_lost_file_or_other_content_is_refused(sources, load, tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        copy = shutil.copytree(sources[load], tmp_path / name)
        for text in (None, "[]", '{"a": "b"}') if name.endswith(".json") else (None,):
            (copy / name).unlink() if text is None else (copy / name).write_text(text)
            with pytest.raises(Refused, match=str(copy)):
                load(str(copy))


def test_a_damaged_adapter_is_refused(sources, tmp_path):
    policy = load_policy(sources[load_policy])
    add_lora(policy, r=2)
    save_policy(policy, tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json", "base.json"):
        copy = shutil.copytree(tmp_path / "adapter", tmp_path / "copy", dirs_exist_ok=True)
        (copy / name).write_text("{}")
        with pytest.raises(Refused, match=str(copy)):
            load_policy(copy)


def test_another_precision_or_vocabulary_is_refused(sources, tmp_path):
    with pytest.raises(Refused, match="float8"):
        load_policy(sources[load_policy], dtype="float8")
    make_model(vocabulary=80).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"up to 89.*only 80 rows"):
        load_policy(tmp_path)


def test_a_model_without_its_language_head_is_refused(sources):
    with pytest.raises(Refused, match=r"lacks lm_head\.weight"):
        load_policy(sources[RewardModel])


# ---- what is no model ----


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_a_name_of_nothing_is_refused_within_seconds(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/nope", "./nope", "a/b/c", "/nope", "no such model"):
        began = time.monotonic()
        with pytest.raises(Refused, match=f"There is no directory '{name}' in {tmp_path}"):
            load(name)
        # transformers asks the hub for 50 s where there is no network
        assert time.monotonic() - began < 15


def test_a_directory_of_something_else_says_what_it_is(sources, tmp_path, capsys):
    def made(name, **files):
        for file, content in files.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file.replace("_", ".")).write_text(json.dumps(content))
        return tmp_path / name

    unfinished = made("run", metrics_jsonl=None, config_json={"kind": "train"})
    (unfinished / "checkpoints" / "step_000002").mkdir(parents=True)
    agent = made("agent", metrics_jsonl=None, config_json={"kind": "control"})
    bare = shutil.copytree(sources[load_policy], tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    for place, said in (
        (unfinished, "has not saved its model yet.*latest checkpoint: .*step_000002"),
        (agent, "agent .*tokenrl control trained.*no language model"),
        (made("compared", plan_json={}), "directory of a comparison.*one of its runs"),
        (made("other", notes_json={}), "holds no saved model"),
        (bare, "has no tokenizer beside it"),
    ):
        with pytest.raises(Refused, match=said):
            load_policy(place)
    assert main(["sample", "--model", str(unfinished), "--prompt", "a"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has not saved its model yet" in said and "sentencepiece" not in said
    (unfinished / "summary.json").write_text(
        '{"exit_reason": "failed", "error": "The reward is nan."}'
    )
    with pytest.raises(Refused, match=r"failed and has no model .The reward is nan.*step_000002"):
        load_policy(unfinished)


# ---- programs in the place of models ----


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_weights_that_are_a_program_are_refused_and_not_run(sources, load, tmp_path):
    copy, trace = shutil.copytree(sources[load], tmp_path / "copy"), tmp_path / "trace"
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Program(trace), 2))
    with pytest.raises(Refused, match=r"could be loaded from .*could run as a program"):
        load(str(copy))
    assert not trace.exists()
    pickle.loads((copy / "pytorch_model.bin").read_bytes())
    assert trace.exists()  # so the file would have run


CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({trace!r}).touch()
class Mine(LlamaConfig): model_type = "mine"
class Model(LlamaForCausalLM): config_class = Mine
"""


@pytest.fixture
def shipped(sources, tmp_path, monkeypatch):
    """The folder of a model with a Python file of its classes, which leaves a trace when it is imported."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # a user who says yes to whatever a library asks
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    place = shutil.copytree(sources[load_policy], tmp_path / "model")
    classes = dict.fromkeys(
        ["AutoModelForCausalLM", "AutoModelForSequenceClassification"], "mine.Model"
    )
    changed = {
        "model_type": "mine",
        "auto_map": classes | {"AutoConfig": "mine.Mine"},
        "num_labels": 1,
    }
    config = json.loads((place / "config.json").read_text()) | changed
    (place / "config.json").write_text(json.dumps(config))
    (place / "mine.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return place


def test_code_shipped_with_a_model_does_not_run_by_default(shipped):
    for load in LOADERS:
        with pytest.raises(Refused, match=r"custom code|trust_remote_code"):
            load(str(shipped))
    assert not (shipped.parent / "trace").exists()
    policy = load_policy(shipped, trust_remote_code=True)
    assert type(policy.model).__name__ == "Model" and (shipped.parent / "trace").exists()


def test_reading_and_writing_a_model_prints_nothing(sources, tmp_path, capfd, recwarn):
    from transformers.utils import logging

    logging.enable_progress_bar()
    capfd.readouterr()
    policy = load_policy(sources[load_policy])
    add_lora(policy, r=2)
    save_policy(policy, tmp_path)
    load_policy(tmp_path / "adapter")
    assert capfd.readouterr().err == "" and logging.is_progress_bar_enabled()
    assert [
        str(w.message) for w in recwarn if w.category in (FutureWarning, DeprecationWarning)
    ] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "auto"])
def test_a_model_is_loaded_in_a_precision(sources, dtype):
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert load_policy(sources[load_policy], dtype=dtype).trainable_parameters()[0].dtype == wanted
