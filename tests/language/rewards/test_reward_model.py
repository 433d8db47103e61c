"""A reward model's scores: batched as single, at the last real token, in the model's own format."""

import numpy as np
import pytest
import torch

from tokenrl.errors import Refused
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rewards.rewards import Rewards

WORDS = ["<unk>", "<bos>", "<eos>", "<pad>", "a", "b", "c", "d", "hello", "world"]
TEMPLATE = "{% for m in messages %}<bos>{{ m['role'][0] }} {{ m['content'] }} <eos>{% endfor %}"


def save_model(path, kind, *, pad=None, labels=1, template=None, headless=False):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:  # such tokenizers often put a BOS before every text, which the template has already
        words.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token=pad
    )
    tokenizer.chat_template = template
    ends = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "num_labels": labels}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=12, **ends)
        model = GPT2LMHeadModel(config) if headless else GPT2ForSequenceClassification(config)
    else:
        config = LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=12, **ends
        )  # fmt: skip
        model = LlamaForSequenceClassification(config)
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
    ("kind", "pad", "dtype"), [("gpt2", None, "float32"), ("llama", "<pad>", "bfloat16")]
)
def test_a_reward_models_batched_scores_are_those_of_single_texts(tmp_path, kind, pad, dtype):
    model, tokenizer = save_model(tmp_path / "judge", kind, pad=pad)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "judge")
    texts = ["a b", "a", "hello world a b c", "b a", "", "c c c c c <eos>", "a b c d", "a b <eos>"]
    reward = RewardModel(tmp_path / "judge", device="cpu")
    single = [alone(model, tokenizer("hello " + text)["input_ids"]) for text in texts]
    for reward.batch_size in (1, 3, 16):
        scores = reward(["hello "] * len(texts), texts)
        assert all(type(score) is float for score in scores)
        assert (
            scores == pytest.approx(single, abs=1e-5 if dtype == "float32" else 0.1) and np.std(single) > 0.1
        )


def test_a_reward_model_is_a_reward_named_after_its_folder(tmp_path):
    model, tokenizer = save_model(tmp_path / "judge", "llama")
    rewards = Rewards([str(tmp_path / "judge"), lambda **_: [0.0, 0.0]])
    assert rewards.names == ["judge", "reward"]
    rewards.check_columns([])
    result = rewards(["a", "b"], [" c", ""], [[6], []], {"answer": ["x", "y"]}, step=0)
    assert result.values[1, 0] == pytest.approx(alone(model, tokenizer("b")["input_ids"]), abs=1e-5)
    assert not any(parameter.requires_grad for parameter in rewards.functions[0].model.parameters())
    assert not rewards.functions[0].model.training


def test_a_long_text_loses_its_beginning_and_an_empty_one_is_scored(tmp_path):
    model, tokenizer = save_model(tmp_path / "judge", "gpt2")
    reward = RewardModel(tmp_path / "judge", device="cpu")
    ids = tokenizer("a b c d " * 10 + "hello")["input_ids"]
    assert reward(["a b c d " * 10, ""], ["hello", ""]) == pytest.approx(
        [alone(model, ids[-12:]), alone(model, [tokenizer.bos_token_id])], abs=1e-5
    )


def test_torch_built_for_gpus_runs_on_a_machine_without_one(tmp_path, monkeypatch):
    save_model(tmp_path / "judge", "gpt2")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert RewardModel(tmp_path / "judge").model.device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert RewardModel(tmp_path / "judge").model.device.type == "meta"


def test_chat_messages_go_through_the_models_own_template_once(tmp_path):
    model, tokenizer = save_model(tmp_path / "judge", "llama", template=TEMPLATE)
    reward = RewardModel(tmp_path / "judge", device="cpu")
    prompt = [{"role": "user", "content": "hello"}]
    answers = ["world", [{"role": "assistant", "content": "a b"}]]
    texts = ["<bos>u hello <eos><bos>a world <eos>", "<bos>u hello <eos><bos>a a b <eos>"]
    single = [alone(model, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert reward([prompt, prompt], answers) == pytest.approx(single, abs=1e-5)

    save_model(tmp_path / "plain", "llama")
    with pytest.raises(Refused, match=r"tokenizer of 'plain' has no chat template"):
        Rewards(str(tmp_path / "plain"))([prompt], ["world"], [[9]], {}, step=0)


def test_folders_that_hold_no_reward_model_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"no config\.json"):
        load_reward(str(tmp_path / "empty"))
    save_model(tmp_path / "three", "gpt2", labels=3)
    with pytest.raises(Refused, match=r"has 3 labels.*num_labels=1"):
        load_reward(tmp_path / "three")
    save_model(tmp_path / "headless", "gpt2", headless=True)
    with pytest.raises(Refused, match=r"headless' lacks score\.weight"):
        load_reward(tmp_path / "headless")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(Refused, match=r"file config\.json of the model in .*broken is damaged"):
        load_reward(tmp_path / "broken")
