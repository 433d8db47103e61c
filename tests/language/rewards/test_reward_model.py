"""A reward model's scores: batched as single, at the last real token, in the model's own format."""

import numpy as np
import pytest
import torch
from refusals import refused
from tiny_models import make_model, make_tokenizer

from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rewards.rewards import Rewards


def save_model(path, architecture="llama", kind="no_pad", *, labels=1, headless=False):
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = make_model(architecture), make_tokenizer(kind)
    if not headless:
        model.config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(model.config)
    torch.manual_seed(0)
    for parameter in model.parameters():  # the usual initialisation hardly tells two texts apart
        torch.nn.init.normal_(parameter, std=0.5)
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


def alone(model, ids):
    """The logit at the last token of one sequence, without any padding."""
    model.config.pad_token_id = None
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize(
    ("name", "kind", "dtype"), [("gpt2", "no_pad", "float32"), ("llama", "pad", "bfloat16")]
)
def test_a_reward_models_batched_scores_are_those_of_single_texts(tmp_path, name, kind, dtype):
    model, tokenizer = save_model(tmp_path / "judge", name, kind)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "judge")
    texts = ["a b", "a", "hello world a b c", "b a", "", "c c c c c <eos>", "a b c d", "a b <eos>"]
    rewards = Rewards([str(tmp_path / "judge"), lambda **_: [0.0, 0.0]])
    assert rewards.names == ["judge", "reward"]
    reward = rewards.functions[0]
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    single = [alone(model, tokenizer("hello " + text)["input_ids"]) for text in texts]
    assert np.std(single) > 0.1
    for reward.batch_size in (1, 3, 16):
        scores = reward(["hello "] * len(texts), texts)
        assert all(type(score) is float for score in scores)
        assert scores == pytest.approx(single, abs=1e-5 if dtype == "float32" else 0.1)


def test_a_long_text_loses_its_beginning_and_an_empty_one_is_scored(tmp_path):
    model, tokenizer = save_model(tmp_path / "judge", "gpt2")
    reward = RewardModel(tmp_path / "judge", device="cpu")
    ids = tokenizer("a b c d " * 20 + "hello")["input_ids"]
    expected = [alone(model, ids[-64:]), alone(model, [tokenizer.eos_token_id])]  # it has no BOS
    assert reward(["a b c d " * 20, ""], ["hello", ""]) == pytest.approx(expected, abs=1e-5)


def test_chat_messages_go_through_the_models_own_template_once(tmp_path):
    model, tokenizer = save_model(tmp_path / "judge", kind="chat")
    reward = RewardModel(tmp_path / "judge", device="cpu")
    prompt = [{"role": "user", "content": "hello"}]
    answers = ["world", [{"role": "assistant", "content": "a b"}]]
    texts = ["<bos>u hello a world ", "<bos>u hello a a b "]
    single = [
        alone(model, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    ]
    assert reward([prompt, prompt], answers) == pytest.approx(single, abs=1e-5)

    save_model(tmp_path / "plain", "llama")
    with refused(r"tokenizer of 'plain' has no chat template"):
        Rewards(str(tmp_path / "plain"))([prompt], ["world"], [[9]], {})


def test_folders_that_hold_no_reward_model_are_refused(tmp_path):
    save_model(tmp_path / "three", "gpt2", labels=3)
    with refused(r"has 3 labels.*num_labels=1"):
        load_reward(tmp_path / "three")
    save_model(tmp_path / "headless", "gpt2", headless=True)
    with refused(r"headless' lacks score\.weight"):
        load_reward(tmp_path / "headless")
