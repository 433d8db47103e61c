"""Prompts to ids and ids to text, what ends a completion, dropout, and the reference of a KL term."""

import pytest
import torch
from families import family_policy
from tiny_models import TEMPLATE, completions, make_model, make_policy, make_task, make_tokenizer
from transformers import PythonBackend

import tokenrl
from tokenrl.errors import Refused
from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.policy.loading import switch_dropout_off
from tokenrl.language.policy.model import (
    enable_gradient_checkpointing,
    load_policy,
    wrap,
)
from tokenrl.language.policy.stops import decoded
from tokenrl.language.rollout.agreement import check_scoring
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import score
from tokenrl.language.supervised.arguments import SftArguments

CHAT = [{"role": "user", "content": "the cat"}]
LONG = "count to ten " * 6


def ids_of(policy, text):
    return list(policy.tokenizer(text, add_special_tokens=False).input_ids)


def test_load_from_a_directory(saved):
    policy = load_policy(saved())
    assert policy.eos_ids == (1,) and policy.context == 64 and not policy.has_adapter
    assert policy.source == str(saved()) and not policy.model.training
    expected = make_model().state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in policy.model.state_dict().items()
    )


def test_objects_that_are_no_model_with_its_tokenizer_are_refused_in_the_call():
    model, tokenizer = make_model(), make_tokenizer()
    hint = r"^model was given as .*: model=\(model, tokenizer\)\.$"
    for wrong in (
        model,
        tokenizer,
        (tokenizer, model),
        (model, tokenizer, 1),
        ("name", tokenizer),
        5,
    ):
        for function in (tokenrl.train, tokenrl.sft):
            with pytest.raises(Refused, match=hint) as caught:
                function(model=wrong, task="sort_digits")
            assert "\n" not in str(caught.value) and "Linear" not in str(caught.value)
    for right in ((model, tokenizer), [model, tokenizer], wrap(model, tokenizer), "a/b", None):
        SftArguments(model=right)
    with pytest.raises(Refused, match=r"reward 1\.0 is a float.*; give the function itself"):
        tokenrl.train(task=[{"prompt": "a"}], reward=[1.0, 0.0], model=(model, tokenizer))


def test_float16_is_refused_for_training_also_if_it_was_saved_so(tmp_path):
    from tokenrl.language.supervised.base import make_policy
    from tokenrl.language.training.arguments import TrainArguments

    make_model(dtype="float16").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for kind in (TrainArguments, SftArguments):
        with pytest.raises(Refused, match="float16"):
            make_policy(kind(model=str(tmp_path), dtype="auto"), None, print)


def test_every_eos_of_config_generation_config_and_tokenizer_counts():
    model = make_model(eos_token_id=[5, 7])
    model.generation_config.eos_token_id = [9, 5]
    assert wrap(model, make_tokenizer()).eos_ids == (1, 5, 7, 9)
    model = make_model(eos_token_id=None)
    model.generation_config.eos_token_id = None
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert (wrap(model, tokenizer).eos_ids, wrap(model, tokenizer).pad_id) == ((), 2)
    tokenizer.pad_token = None
    assert wrap(model, tokenizer).pad_id == 0
    model.generation_config.eos_token_id = 10_000  # of another vocabulary: can never be drawn
    assert wrap(model, tokenizer).eos_ids == ()
    # a padded embedding is common
    assert wrap(make_model(vocabulary=128), make_tokenizer()).pad_id == 2


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


def test_chat_has_one_bos_and_a_generation_prompt(saved):
    for policy in (make_policy(kind="chat"), load_policy(saved("llama", "chat"))):
        assert policy.tokenizer.chat_template == TEMPLATE
        assert policy.encode(CHAT) == [0, *ids_of(policy, "u the cat a ")]
        # plain text gets its one BOS too
        assert policy.encode("the cat") == [
            0,
            *ids_of(policy, "the cat"),
        ]
        begun = [*CHAT, {"role": "assistant", "content": "the mat"}]
        # to be continued
        assert policy.encode(begun) == [
            0,
            *ids_of(policy, "u the cat a the mat"),
        ]


def test_an_empty_prompt_is_the_bos_or_refused():
    assert make_policy(kind="chat").encode("") == [0]
    policy = make_policy()
    with pytest.raises(Refused, match="BOS"):
        policy.encode("")
    policy.tokenizer.bos_token = "<bos>"  # known but not added by itself
    assert policy.encode("") == [0]
    policy = make_policy(kind="closing")
    assert policy.tokenizer("the cat").input_ids[-1] == 1
    assert policy.encode("the cat") == ids_of(policy, "the cat")
    assert policy.encode("the cat<eos>")[-1] == 1  # written by the user: part of the prompt


def test_too_long_a_prompt_is_refused_with_row_and_lengths_or_cut_on_the_left():
    policy = make_policy()
    length = len(policy.encode(LONG))
    assert 32 < length <= 64
    with pytest.raises(Refused) as caught:
        policy.encode_all(["a", "the cat", LONG], max_completion_length=32)
    for fact in (
        f"The prompt {LONG[:20]!r}"[:-1],
        f"{length} tokens",
        f"{length + 32}",
        f"context of 64: give --max-completion-length {64 - length} or less, give --truncate-prompts, which",
    ):
        assert fact in str(caught.value)
    with pytest.raises(
        Refused, match=r"line 7 has 1\d\d tokens.* 64: give --truncate-prompts, .*, leave"
    ):
        policy.encode_all(["the cat " * 40], max_completion_length=8, locations=["line 7"])
    with pytest.raises(
        Refused, match="context of 64: leave it out, or take a model with a longer context"
    ):
        policy.encode_all([LONG], max_completion_length=64, truncate=None)
    with pytest.raises(Refused, match=r"no room for a prompt.*: lower --max-completion-length"):
        policy.encode_all(["a"], max_completion_length=64)
    assert len(policy.encode_all([LONG], max_completion_length=64 - length)[0]) == length
    short, cut = policy.encode_all(["the cat", LONG], max_completion_length=32, truncate=True)
    assert (
        short == policy.encode("the cat")
        and cut == policy.encode(LONG)[-32:] != policy.encode(LONG)[:32]
    )
    policy.context = None  # a model that states no context takes any length
    assert len(policy.encode_all(["the cat " * 40], max_completion_length=1000)[0]) > 64


def test_a_training_prompt_too_long_is_refused_before_the_first_step(tmp_path):
    task = make_task(["the cat", "a", "dog", "the cat " * 40])
    task.eval_prompts = task.train_prompts[:2]
    with pytest.raises(Refused, match="row 3"):
        tokenrl.train(
            model=make_policy(), task=task, output_dir=tmp_path / "run", cpu=True, quiet=True
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_decoding_survives_broken_unicode_keeps_spaces_and_drops_special_tokens():
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
    ids = torch.tensor([ids_of(policy, "ten . the cat , 12")])
    assert policy.decode(ids, torch.ones_like(ids).bool()) == ["ten . the cat , 12"]


def test_the_reference_is_a_frozen_copy():
    policy = make_policy()
    policy.add_reference()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(1.0)
    policy.add_reference()  # once taken it stays
    with policy.reference_model() as reference:
        assert all(
            torch.equal(value, before[name]) for name, value in reference.state_dict().items()
        )
        assert not any(p.requires_grad for p in reference.parameters())


def opt(**config):
    """A family that keeps its dropout rates in plain attributes and hands them to functions."""
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 16}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**shape, **config))


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_model("gpt2", resid_pdrop=0.5),
        lambda: make_model("llama", attention_dropout=0.5),
        lambda: opt(dropout=0.5, layerdrop=0.5),
    ],
    ids=["gpt2", "llama", "opt"],
)
def test_dropout_is_off_also_where_checkpointing_needs_training_mode(model):
    policy = wrap(model(), make_tokenizer())
    ids = torch.tensor([[84, 56, 44, 39]])
    expected = policy.model(ids).logits
    enable_gradient_checkpointing(policy)
    assert any(module.training for module in policy.model.modules())
    torch.testing.assert_close(policy.model(ids, use_cache=False).logits, expected)


def test_routers_add_no_noise_under_checkpointing_and_return_no_logits():
    policy = family_policy("mixtral", output_router_logits=True, router_jitter_noise=0.5)
    switch_dropout_off(policy.model)
    assert not check_scoring(policy).remarks
    enable_gradient_checkpointing(policy)
    scoring = check_scoring(policy)
    rollout = TransformersGenerator(policy).generate([[5, 6, 7]], Sampling(4, 2), torch.rand(2, 4))
    first, second = (score(policy.model, rollout, scoring).logprobs for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.detach(), rollout.sampling_logprobs, atol=1e-4, rtol=0)
    # activations are still recomputed after sampling
    assert any(m.training for m in policy.model.modules())


@pytest.mark.parametrize("template", ["{{ messages[0].content }}{{ messages[-1].content[:2] }}"])
def test_a_prompt_whose_end_the_template_cuts_is_refused(template):
    policy = make_policy(kind="chat")
    policy.tokenizer.chat_template = template
    prompt = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat sat"}]
    with pytest.raises(
        Refused,
        match=r"chat template of 'tiny llama' refuses .*deletes portions of the final message",
    ):
        policy.encode(prompt)


class Spelling(PythonBackend):
    """A tokenizer in Python that knows letters, and fails on all ids that are none of them."""

    def __init__(self, **options):
        super().__init__(eos_token="z", **options)

    vocab_size = 26

    def get_vocab(self):
        return {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token)

    def _convert_id_to_token(self, index):
        return {i: letter for letter, i in self.get_vocab().items()}[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.mark.parametrize("stop", [None, ("c",)])
def test_ids_that_the_tokenizer_lacks_have_no_text(stop):
    policy = wrap(make_model("llama"), Spelling())
    policy.ask(PromptArguments(stop=stop))
    ids = torch.tensor([[0, 60, 1, 80, 2]])
    assert policy.decode(ids, ids >= 0) == ["abc" if stop is None else "ab"]
    assert decoded(policy.tokenizer, [[60], []], skip_special_tokens=False) == ["", ""]
    assert policy.stops is None or policy.stops.ended(ids, torch.tensor([0]), 4).tolist() == [True]


def test_checkpointing_is_refused_where_it_is_not_supported(monkeypatch):
    policy = make_policy()
    monkeypatch.setattr(type(policy.model), "supports_gradient_checkpointing", False)
    with pytest.raises(Refused, match="gradient_checkpointing"):
        enable_gradient_checkpointing(policy)
