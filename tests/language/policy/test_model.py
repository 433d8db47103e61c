"""Prompts to ids and ids to text, what ends a completion, dropout, and the reference of a KL term."""

import pytest
import torch
from families import family_policy
from refusals import refused
from tiny_models import completions, make_model, make_policy, make_tokenizer
from torch.testing import assert_close

import tokenrl
from tokenrl.language.policy.model import (
    enable_gradient_checkpointing,
    wrap,
)
from tokenrl.language.rollout.rollout import pad_left
from tokenrl.language.supervised.arguments import SftArguments

LONG = "count to ten " * 6


def ids_of(policy, text):
    return list(policy.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("function", [tokenrl.train, tokenrl.sft])
def test_objects_that_are_no_model_with_its_tokenizer_are_refused_in_the_call(function):
    model = make_model()
    tokenizer = make_tokenizer()
    hint = r"^model was given as [^\n]*: model=\(model, tokenizer\)\.$"
    for wrong in (model, tokenizer, (tokenizer, model), (model, tokenizer, 1), 5):
        with refused(hint):
            function(model=wrong, task="sort_digits")
    for right in ([model, tokenizer], wrap(model, tokenizer), "a/b", None):
        SftArguments(model=right)


def test_float16_is_refused_for_training_also_if_it_was_saved_so(tmp_path):
    from tokenrl.language.supervised.base import adapt, load_base
    from tokenrl.language.training.arguments import TrainArguments

    make_model(dtype="float16").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for kind in (TrainArguments, SftArguments):
        with refused("float16"):
            args = kind(model=str(tmp_path), dtype="auto")
            adapt(args, load_base(args, None))


def test_every_eos_of_config_generation_config_and_tokenizer_counts():
    model = make_model(eos_token_id=[5, 7])
    model.generation_config.eos_token_id = [9, 10_000]  # the last is of another vocabulary
    assert wrap(model, make_tokenizer()).eos_ids == (1, 5, 7, 9)
    model = make_model(eos_token_id=None)
    model.generation_config.eos_token_id = None
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    policy = wrap(model, tokenizer)
    assert (policy.eos_ids, policy.pad_id) == ((), 2)


@pytest.mark.parametrize("kind", ["no_pad", "pad_is_eos", "pads_right"])
def test_padding_of_the_tokenizer_changes_no_completion(kind):
    def complete(policy):
        prompts = [policy.encode(p) for p in ("the cat", "a", "count to ten")]
        rollout = completions(policy, prompts, num_generations=2, max_completion_length=5)
        return policy.decode(rollout.completion_ids, rollout.mask), rollout.logprobs

    texts, logprobs = complete(make_policy(kind="pad"))
    same, close = complete(make_policy(kind=kind))
    assert same == texts
    assert_close(close, logprobs)


def test_an_empty_prompt_is_the_bos_or_refused():
    assert make_policy(kind="chat").encode("") == [0]
    policy = make_policy()
    with refused("BOS"):
        policy.encode("")
    policy.tokenizer.bos_token = "<bos>"  # known but not added by itself
    assert policy.encode("") == [0]
    policy = make_policy(kind="closing")
    assert policy.tokenizer("the cat").input_ids[-1] == 1
    assert policy.encode("the cat") == ids_of(policy, "the cat")
    assert policy.encode("the cat<eos>")[-1] == 1  # written by the user: part of the prompt


@pytest.mark.parametrize(
    ("prompt", "length", "words"),
    [
        (
            LONG,
            32,
            r"^The prompt 'count.* has 36 tokens.*68.*context of 64: give max_completion_length 28 or less, "
            r"give truncate_prompts .--truncate-prompts., which",
        ),
        ("the cat " * 40, 8, r"of line 7 has 1\d\d tokens"),
        ("a", 64, r"no room for a prompt.*: lower it .--max-completion-length"),
    ],
)
def test_too_long_a_prompt_is_refused_with_its_lengths(prompt, length, words):
    locations = ["line 7"] if "line 7" in words else []
    with refused(words):
        make_policy().encode_all([prompt], max_completion_length=length, locations=locations)


def test_too_long_a_prompt_is_cut_on_the_left():
    policy = make_policy()
    whole = policy.encode(LONG)
    assert policy.encode_all([LONG], max_completion_length=64 - len(whole)) == [whole]
    prompts = policy.encode_all(["the cat", LONG], max_completion_length=32, truncate=True)
    assert prompts == [policy.encode("the cat"), whole[-32:]]
    policy.context = None  # a model that states no context takes any length
    assert policy.encode_all([LONG], max_completion_length=1000) == [whole]


def test_decoding_survives_broken_unicode_keeps_spaces_and_drops_special_tokens():
    policy = make_policy()
    face, words = ids_of(policy, "😀"), ids_of(policy, "ten . the cat , 12")
    rows = [face, [*face[:-1], 1], [*words, 2], words, []]  # 1 and 2 are special tokens
    whole, broken, *texts = policy.decode(*pad_left(rows, policy.pad_id))
    assert whole == "😀" and "\ufffd" in broken
    assert texts == ["ten . the cat , 12", "ten . the cat , 12", ""]


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("gpt2", {"resid_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        # OPT keeps its rates in plain attributes and hands them to functions.
        ("opt", {"dropout": 0.5, "layerdrop": 0.5}),
        # Falcon reads them in its configuration.
        ("falcon", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
        # A router adds noise in training mode.
        ("mixtral", {"router_jitter_noise": 0.5}),
    ],
)
def test_dropout_is_off_also_where_checkpointing_needs_training_mode(family, rates):
    policy = wrap(family_policy(family, vocabulary=96, **rates).model, make_tokenizer())
    ids = torch.tensor([[84, 56, 44, 39]])
    expected = policy.model(ids).logits
    enable_gradient_checkpointing(policy)
    assert any(module.training for module in policy.model.modules())
    assert_close(policy.model(ids, use_cache=False).logits, expected)


SIZES = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
CONTEXTS = [
    ("Llama", HEADS | {"intermediate_size": 16, "max_position_embeddings": 40}, 40),
    ("GPT2", {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 40}, 40),
    ("Mamba", {"num_hidden_layers": 1, "hidden_size": 16, "state_size": 4}, None),
    ("Bloom", {"n_layer": 1, "n_head": 2, "hidden_size": 16, "max_sequence_length": 40}, 40),
]


@pytest.mark.parametrize(("family", "shape", "context"), CONTEXTS)
def test_a_context_is_known_under_each_of_its_names(family, shape, context):
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES | shape)
    names = [f"{family}ForCausalLM", f"{family}LMHeadModel"]
    (kind,) = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    policy = wrap(kind(config), make_tokenizer())
    assert policy.context == context
    if context:
        with refused("more than the model's context of 40"):
            policy.encode_all([LONG * 3], max_completion_length=4)
