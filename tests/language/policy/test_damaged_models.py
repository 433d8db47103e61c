"""A model without a manifest, such as that of a finished run: what can be seen to be damaged is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_models import make_model, make_tokenizer

from tokenrl.errors import Refused
from tokenrl.language.policy.adapters import add_lora, load_adapted
from tokenrl.language.policy.model import load_policy
from tokenrl.language.policy.saving import save_policy
from tokenrl.language.preferences.backbone import reward_backbone, save_reward_model
from tokenrl.language.rewards.model import RewardModel


def half(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def header(file):
    """Flip a bit among the first bytes, where safetensors keeps the length of its header."""
    data = file.read_bytes()
    file.write_bytes(data[:3] + bytes([data[3] ^ 0x40]) + data[4:])


def remove(file):
    file.unlink()


def folder(file):
    file.unlink()
    file.mkdir()


FILES = ["model.safetensors", "config.json", "tokenizer.json"]
DAMAGES = [(f, d) for f in [*FILES, "generation_config.json"] for d in (half, empty, header, folder)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By loader, the folder of a model that it loads."""
    place = tmp_path_factory.mktemp("models")
    make_model("llama").save_pretrained(place / "model")
    make_tokenizer("pad").save_pretrained(place / "model")
    (place / "reward").mkdir()
    save_reward_model(reward_backbone(str(place / "model")), place / "reward")
    policy = load_policy(place / "model")
    add_lora(policy, r=2)
    (place / "lora").mkdir()
    save_policy(policy, place / "lora")
    return {load_policy: place / "model", RewardModel: place / "reward", reward_backbone: place / "model"}


@pytest.mark.parametrize("load", [load_policy, RewardModel, reward_backbone], ids=lambda load: load.__name__)
def test_a_damaged_file_is_named(sources, load, tmp_path):
    for number, (name, damage) in enumerate(DAMAGES):
        copy = shutil.copytree(sources[load], tmp_path / str(number))
        if not (copy / name).exists():  # a classifier generates nothing
            continue
        damage(copy / name)
        with pytest.raises(Refused, match=rf"The file {name} of the model in {copy} is damaged") as caught:
            load(str(copy))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_policy, RewardModel, reward_backbone], ids=lambda load: load.__name__)
def test_a_lost_file_or_other_content_is_refused(sources, load, tmp_path):
    for name in FILES:
        copy = shutil.copytree(sources[load], tmp_path / name)
        (copy / name).unlink()
        with pytest.raises(Refused, match=str(copy)):
            load(str(copy))
        shutil.copy(sources[load] / name, copy / name)
        load(str(copy))
        if name.endswith(".json"):
            for text in ("[]", "null", '{"a": "b"}', json.dumps([1] * 9)):
                (copy / name).write_text(text)
                with pytest.raises(Refused, match=str(copy)):
                    load(str(copy))


def test_an_adapter_that_is_damaged_is_refused(sources, tmp_path):
    how = {"dtype": "float32", "trust_remote_code": False}
    whole = sources[load_policy].parent / "lora" / "adapter"
    load_adapted(whole, **how)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        for damage in (half, empty, header, remove, folder):
            copy = shutil.copytree(whole, tmp_path / f"{name}-{damage.__name__}" / "adapter")
            damage(copy / name)
            with pytest.raises(Refused, match=str(copy)):
                load_adapted(copy, **how)


def test_a_pickle_with_code_in_place_of_the_weights_is_refused_and_not_run(sources, tmp_path):
    import pickle

    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    copy = shutil.copytree(sources[load_policy], tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malicious()}, protocol=2))
    for load in (load_policy, RewardModel, reward_backbone):
        with pytest.raises(Refused):
            load(str(copy))
    assert not (tmp_path / "run").exists()
