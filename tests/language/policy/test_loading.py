"""What can be loaded as a model, and what is refused by name before a library reads it."""

import json
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from folders import read_json
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_models import make_model, make_policy, make_tokenizer

from tokenrl.files import write_json
from tokenrl.language.policy.model import add_lora, load_policy
from tokenrl.language.policy.saved import SavedModel
from tokenrl.language.policy.saving import base_named, save_policy
from tokenrl.language.preferences.data import reward_backbone
from tokenrl.language.rewards.model import RewardModel

LOADERS = [load_policy, RewardModel, reward_backbone]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By loader, the folder of a model that it loads; by `add_lora`, that of an adapter."""
    folder = tmp_path_factory.mktemp("models")
    save_policy(make_policy(), folder / "model")
    (folder / "reward").mkdir()
    save_policy(reward_backbone(str(folder / "model")), folder / "reward")
    policy = load_policy(folder / "model")
    add_lora(policy, r=2)
    save_policy(policy, folder / "adapted")
    folders = [folder / name for name in ("model", "reward", "model", "adapted/adapter")]
    return dict(zip([*LOADERS, add_lora], folders, strict=True))


FILES = [("model.safetensors", "config.json", "tokenizer.json")] * 3
FILES += [("adapter_model.safetensors", "adapter_config.json")]


@pytest.mark.parametrize(("kind", "files"), [*zip([*LOADERS, add_lora], FILES, strict=True)])
def test_a_damaged_or_lost_file_is_refused(sources, kind, files, tmp_path):
    load = load_policy if kind == add_lora else kind
    for name in files:
        folder = shutil.copytree(sources[kind], tmp_path / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with refused(str(folder)):
            load(str(folder))
        (folder / name).unlink()
        with refused(str(folder)):
            load(str(folder))


def test_another_precision_or_vocabulary_is_refused(sources, tmp_path):
    assert load_policy(sources[load_policy], dtype="bfloat16").model.dtype == torch.bfloat16
    with refused("float8"):
        load_policy(sources[load_policy], dtype="float8")
    make_model(vocabulary=80).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with refused(r"up to 89.*only 80 rows"):
        load_policy(tmp_path)


def test_a_model_without_its_language_head_is_refused(sources):
    with refused(r"lacks lm_head\.weight"):
        load_policy(sources[RewardModel])


def test_weights_that_do_not_fit_are_refused_in_a_sentence_and_others_left_out_without_a_table(
    tmp_path, capfd
):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["lm_head.weight"]
    more = weights | {"value_head.weight": head.clone()}
    save_file(more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_policy(tmp_path)
    smaller = weights | {"lm_head.weight": head[:, 1:].clone()}
    save_file(smaller, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refused(r"lacks .*lm_head\.weight.*, or has it in another size\. Give one with its head"):
        load_policy(tmp_path)
    assert "LOAD REPORT" not in capfd.readouterr().err


# ---- what is no model ----


def test_a_name_of_nothing_is_refused_within_seconds(workplace):
    for name in ("runs/nope", "/nope", "no such model"):
        began = time.monotonic()
        with refused(f"There is no directory '{name}' in {workplace}"):
            load_policy(name)
        # transformers asks the hub for 50 s where there is no network
        assert time.monotonic() - began < 15


def test_a_directory_of_something_else_says_what_it_is(tmp_path):
    for path, content in {
        "run/config.json": '{"kind": "train"}',
        "run/metrics.jsonl": "",
        "run/checkpoints/step_000002/model.safetensors": "",
        "agent/config.json": '{"kind": "control"}',
        "agent/metrics.jsonl": "",
        "notes/notes.json": "{}",
        "bare/config.json": "{}",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    for folder, words in {
        "run": "a run that has saved no model.*latest checkpoint: .*step_000002",
        "agent": "a run that has saved no model",
        "notes": "holds no saved model",
        "bare": "has no tokenizer beside its model",
    }.items():
        with refused(words):
            load_policy(tmp_path / folder)


# ---- programs in the folder of models ----


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_are_a_program_are_refused_and_not_run(sources, tmp_path):
    folder = shutil.copytree(sources[load_policy], tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Program(tmp_path / "trace"), 2))
    with refused("could be loaded from"):
        load_policy(folder)
    assert not (tmp_path / "trace").exists()


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
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    folder = shutil.copytree(sources[load_policy], tmp_path / "model")
    classes = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    auto_map = dict.fromkeys(classes, "mine.Model") | {"AutoConfig": "mine.Mine"}
    config = read_json(folder / "config.json")
    config |= {"model_type": "mine", "auto_map": auto_map, "num_labels": 1}
    write_json(folder / "config.json", config)
    (folder / "mine.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    return folder


def test_code_shipped_with_a_model_does_not_run_by_default(shipped):
    for load in LOADERS:
        with refused(r"custom code|trust_remote_code"):
            load(str(shipped))
    assert not (shipped.parent / "trace").exists()
    policy = load_policy(shipped, trust_remote_code=True)
    assert type(policy.model).__name__ == "Model" and (shipped.parent / "trace").exists()


ASKED = [
    {"_attn_implementation": "owner/kernel"},
    {"attn_implementation": {"text_config": {"inner": "owner/kernel"}, "": "sdpa"}},
    {"layers": [{"attn_implementation": "owner/kernel"}]},
]


@pytest.fixture
def fetched(monkeypatch):
    """The kernels that transformers would have got from the hub."""
    from transformers.integrations import hub_kernels

    names = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)

    def get(name, **_):
        names.append(name)
        raise ValueError("not here")

    monkeypatch.setattr(hub_kernels, "get_kernel", get)
    return names


@pytest.fixture
def adapter(sources, tmp_path):
    """`adapter(base)`: the folder of an adapter whose configuration names a base, and further values."""
    policy = load_policy(sources[load_policy])
    add_lora(policy, r=2)
    numbers = iter(range(9))

    def write(base=sources[load_policy], **changes):
        policy.model.peft_config["default"].base_model_name_or_path = str(base)
        folder = tmp_path / f"adapter{next(numbers)}"
        folder.mkdir()
        SavedModel(policy).write(folder)
        config = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", config | changes)
        return folder

    return write


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_an_attention_from_the_hub_is_refused_wherever_a_configuration_names_it(
    sources, adapter, asked, fetched, tmp_path
):
    for load in LOADERS:
        folder = shutil.copytree(sources[load], tmp_path / load.__name__)
        config = read_json(folder / "config.json")
        # in JSON a slash may also be written as an escape
        text = json.dumps(config | asked).replace("owner/", "owner\\u002f")
        (folder / "config.json").write_text(text)
        with refused(r"program from the hub .*owner/kernel.*trust_remote_code"):
            load(str(folder))
        with refused("program from the hub"):
            load_policy(adapter(folder))
    assert not fetched


def test_an_adapter_imports_no_module_that_it_names(adapter, tmp_path, monkeypatch):
    (tmp_path / "a_module_of_a_stranger.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    megatron = {"hidden_size": 8}
    folder = adapter(megatron_config=megatron, megatron_core="a_module_of_a_stranger")
    with refused("Megatron"):
        load_policy(folder)
    assert "a_module_of_a_stranger" not in sys.modules


def test_the_base_of_an_adapter_is_looked_at_in_its_own_revision(adapter, monkeypatch):
    import transformers.utils as utils

    seen = []

    def cached(name, file, revision=None, **_):
        if Path(name).is_dir():
            return None
        seen.append((name, file, revision))
        raise OSError("no network")

    folder = adapter("owner/name", revision="v2")
    monkeypatch.setattr(utils, "cached_file", cached)
    with refused("no network"):
        load_policy(folder)
    assert seen == [("owner/name", "config.json", "v2")]
    assert base_named(str(folder), True) == ("owner/name", "v2")  # what is loaded
