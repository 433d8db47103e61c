"""Prompts to ids and ids to text, what is refused at load, and the reference of a KL term."""

import logging
import shutil

import pytest
import torch
from tiny_models import ARCHITECTURES, TEMPLATE, completions, make_model, make_policy, make_tokenizer

from tokenrl.errors import Refused
from tokenrl.language.policy.checkpointing import enable_gradient_checkpointing
from tokenrl.language.policy.model import load_policy, wrap
from tokenrl.language.training.arguments import SftArguments

CHAT = [{"role": "user", "content": "the cat"}]


def ids_of(policy, text):
    return list(policy.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_from_a_directory(saved, architecture):
    policy = load_policy(saved(architecture))
    assert policy.eos_ids == (1,) and policy.context == 64 and not policy.has_adapter
    assert policy.source == str(saved(architecture)) and not policy.model.training
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    expected = make_model(architecture).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in policy.model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "auto"])
def test_load_in_a_precision(saved, dtype):
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert load_policy(saved(), dtype=dtype).trainable_parameters()[0].dtype == wanted


def test_float16_is_refused_for_training_also_if_it_was_saved_so(tmp_path):
    from tokenrl.language.training import setup

    make_model(dtype="float16").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for kind in (setup.TrainArguments, SftArguments):
        args = kind(model=str(tmp_path), dtype="auto")
        with pytest.raises(Refused, match="float16"):
            setup.make_policy(args, None, print)


def test_load_refuses_what_is_no_model(tmp_path, saved):
    with pytest.raises(Refused, match="save_pretrained"):
        load_policy(tmp_path)
    with pytest.raises(Refused, match="float8"):
        load_policy(saved(), dtype="float8")
    broken = shutil.copytree(saved(), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(Refused, match="broken"):
        load_policy(broken)
    broken = shutil.copytree(saved(), tmp_path / "broken2")
    (broken / "config.json").write_text("{")
    with pytest.raises(Refused, match="broken2"):
        load_policy(broken)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, saved):
    make_model(vocabulary=80).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"up to 89.*only 80 rows"):
        load_policy(tmp_path)
    assert wrap(make_model(vocabulary=128), make_tokenizer()).pad_id == 2  # a padded embedding is common


def test_every_eos_of_config_generation_config_and_tokenizer_counts():
    model = make_model(eos_token_id=[5, 7])
    model.generation_config.eos_token_id = [9, 5]
    assert wrap(model, make_tokenizer()).eos_ids == (1, 5, 7, 9)
    model = make_model(eos_token_id=None)
    model.generation_config.eos_token_id = None
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    policy = wrap(model, tokenizer)
    assert policy.eos_ids == () and policy.pad_id == 2
    tokenizer.pad_token = None
    assert wrap(model, tokenizer).pad_id == 0
    model.generation_config.eos_token_id = 10_000  # of another vocabulary: can never be drawn
    assert wrap(model, tokenizer).eos_ids == ()


@pytest.mark.parametrize("kind", ["no_pad", "pad_is_eos", "pads_right"])
def test_padding_of_the_tokenizer_changes_no_completion(kind):
    def complete(policy):
        prompts = [policy.encode(p) for p in ("the cat", "a", "count to ten")]
        rollout = completions(policy, prompts, num_generations=2, max_completion_length=5)
        return policy.decode(rollout.completion_ids, rollout.mask), rollout.logprobs

    texts, logprobs = complete(make_policy(kind="pad"))
    same, close = complete(make_policy(kind=kind))
    assert same == texts
    torch.testing.assert_close(close, logprobs)


def test_chat_has_one_bos_and_a_generation_prompt():
    policy = make_policy(kind="chat")
    assert policy.encode(CHAT) == [0, *ids_of(policy, "u the cat a ")]
    assert policy.encode("the cat") == [0, *ids_of(policy, "the cat")]  # plain text gets its one BOS too
    begun = [*CHAT, {"role": "assistant", "content": "the mat"}]
    assert policy.encode(begun) == [0, *ids_of(policy, "u the cat a the mat")]  # to be continued


def test_chat_without_a_template_is_refused():
    with pytest.raises(Refused, match="chat template"):
        make_policy().encode(CHAT)


def test_an_empty_prompt_is_the_bos_or_refused():
    assert make_policy(kind="chat").encode("") == [0]
    with pytest.raises(Refused, match="BOS"):
        make_policy().encode("")
    with pytest.raises(Refused, match="BOS"):
        make_policy(kind="closing").encode("")  # its only token would be the EOS
    policy = make_policy()
    policy.tokenizer.bos_token = "<bos>"  # known but not added by itself
    assert policy.encode("") == [0]


def test_a_tokenizer_that_closes_every_text_leaves_the_prompt_open():
    policy = make_policy(kind="closing")
    assert policy.tokenizer("the cat").input_ids[-1] == 1
    assert policy.encode("the cat") == ids_of(policy, "the cat")
    assert policy.encode("the cat<eos>")[-1] == 1  # written by the user: part of the prompt


def test_too_long_a_prompt_is_refused_with_row_and_lengths():
    policy = make_policy()
    long = "count to ten " * 6
    length = len(policy.encode(long))
    assert 32 < length <= 64
    with pytest.raises(Refused) as caught:
        policy.encode_all(["a", "the cat", long], max_completion_length=32)
    for fact in ("row 2", f"{length} tokens", f"{length + 32}", "context of 64", "truncate_prompts"):
        assert fact in str(caught.value)
    with pytest.raises(Refused, match="no room for a prompt"):
        policy.encode_all(["a"], max_completion_length=64)
    exact = policy.encode_all([long], max_completion_length=64 - length)
    assert len(exact[0]) == length


def test_truncation_is_from_the_left():
    policy = make_policy()
    long = "count to ten " * 6
    assert policy.encode(long)[:32] != policy.encode(long)[-32:]
    short, cut = policy.encode_all(["the cat", long], max_completion_length=32, truncate=True)
    assert short == policy.encode("the cat") and cut == policy.encode(long)[-32:]


def test_a_model_that_states_no_context_takes_any_length():
    policy = make_policy()
    policy.context = None
    assert len(policy.encode_all(["the cat " * 40], max_completion_length=1000)[0]) > 64


def test_decoding_survives_broken_unicode_and_drops_special_tokens():
    policy = make_policy()
    face = ids_of(policy, "😀")
    assert len(face) > 1
    ids = torch.tensor([face, [*face[:-1], 1], [84] * (len(face) - 1) + [2]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    whole, broken, plain = policy.decode(ids, mask)
    assert whole == "😀" and "\ufffd" in broken
    assert plain == policy.tokenizer.decode([84] * (len(face) - 1))
    mask[0] = False
    assert policy.decode(ids, mask)[0] == ""


def test_decode_keeps_spaces_before_punctuation():
    policy = make_policy()
    ids = torch.tensor([ids_of(policy, "ten . the cat , 12")])
    assert policy.decode(ids, torch.ones_like(ids).bool()) == ["ten . the cat , 12"]


def test_the_reference_is_a_frozen_copy():
    policy = make_policy()
    with pytest.raises(RuntimeError, match="add_reference"), policy.reference_model():
        pass
    policy.add_reference()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(1.0)
    with policy.reference_model() as reference:
        assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
        assert not any(p.requires_grad for p in reference.parameters())
    kept = policy.reference
    policy.add_reference()
    assert policy.reference is kept  # once taken it stays


@pytest.mark.parametrize("architecture, dropout", [("gpt2", "resid_pdrop"), ("llama", "attention_dropout")])
def test_dropout_is_off_also_where_checkpointing_needs_training_mode(architecture, dropout):
    policy = make_policy(architecture, **{dropout: 0.5})
    ids = torch.tensor([[84, 56, 44, 39]])
    expected = policy.model(ids).logits
    enable_gradient_checkpointing(policy)
    assert policy.model.training
    torch.testing.assert_close(policy.model(ids, use_cache=False).logits, expected)


def test_functional_dropout_is_off_too():
    """OPT keeps its rates in plain attributes."""
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=90, hidden_size=16, num_hidden_layers=2, ffn_dim=16, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5,
        )
    )  # fmt: skip
    policy = wrap(model, make_tokenizer())
    ids = torch.tensor([[84, 56, 44, 39]])
    expected = policy.model(ids).logits
    policy.model.train()
    torch.testing.assert_close(policy.model(ids).logits, expected)


def test_checkpointing_is_refused_where_it_is_not_supported(monkeypatch):
    policy = make_policy()
    monkeypatch.setattr(type(policy.model), "supports_gradient_checkpointing", False)
    with pytest.raises(Refused, match="gradient_checkpointing"):
        enable_gradient_checkpointing(policy)


def test_template_is_the_one_saved(saved):
    policy = load_policy(saved("llama", "chat"))
    assert policy.tokenizer.chat_template == TEMPLATE
    assert policy.encode(CHAT) == make_policy(kind="chat").encode(CHAT)
    logging.getLogger("transformers").debug("loaded")


def test_a_model_without_its_language_head_is_refused(tmp_path):
    from transformers import AutoModelForSequenceClassification

    policy = make_policy("llama")
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    load_policy(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    classifier.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"lacks lm_head\.weight"):
        load_policy(tmp_path)


def test_reading_and_writing_a_model_draws_no_bars(tmp_path, capfd):
    from transformers.utils import logging

    from tokenrl.language.policy.model import load_policy
    from tokenrl.language.policy.saving import save_policy
    from toy_tasks.models import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer("abc")
    tiny_llama(tokenizer, layers=1, hidden=16, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    logging.enable_progress_bar()
    capfd.readouterr()
    save_policy(load_policy(tmp_path), tmp_path)
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()
