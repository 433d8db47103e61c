"""Code that is shipped with a model never runs unless `trust_remote_code` asks for it."""

import json
import sys

import pytest
from tiny_models import make_model, make_tokenizer

from tokenrl.errors import Refused
from tokenrl.language.policy.model import load_policy
from tokenrl.language.preferences.backbone import reward_backbone
from tokenrl.language.rewards.model import RewardModel

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({ran!r}).touch()
class Mine(LlamaConfig): model_type = "mine"
class Model(LlamaForCausalLM): config_class = Mine
"""


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The folder of a model with a Python file of its classes, which leaves a trace when it is imported."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a user who says yes to whatever a library asks
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    make_tokenizer("pad").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}
    classes["AutoModelForSequenceClassification"] = "mine.Model"
    changed = config | {"model_type": "mine", "auto_map": classes, "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(changed))
    (folder / "mine.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("load", [load_policy, RewardModel, reward_backbone], ids=lambda load: load.__name__)
def test_it_is_off_by_default_and_nobody_is_asked(shipped, load):
    with pytest.raises(Refused, match=r"custom code|trust_remote_code"):
        load(str(shipped))
    assert not (shipped.parent / "ran").exists()


def test_the_flag_runs_it(shipped):
    policy = load_policy(shipped, trust_remote_code=True)
    assert type(policy.model).__name__ == "Model" and (shipped.parent / "ran").exists()
