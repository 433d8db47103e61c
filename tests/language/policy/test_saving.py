"""Weights come back bit for bit into a policy that was made anew, and another model's are refused."""

import shutil

import pytest
import torch
import yaml
from drawing import normals, seeded
from families import FAMILIES, family_policy
from folders import read_json
from refusals import refused
from tiny_models import (
    letters_trained,
    make_learner,
    make_model,
    make_policy,
    make_task,
    make_tokenizer,
    one_step,
    quickly,
)

from tests.states import as_bits
from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.policy.model import add_lora, load_policy, wrap
from tokenrl.language.policy.saved import SavedModel
from tokenrl.language.policy.saving import (
    Card,
    fingerprint,
    save_policy,
    tokenizer_fingerprint,
)


def scrambled(model):
    """Other weights in the same model, of every size that its precision has."""
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            generator = seeded(number)
            drawn = normals(generator, weight.shape)
            weight.copy_(drawn * 10.0 ** (3 * drawn))
    return model


def mixed(model):
    """In bfloat16, but for one weight in float32, as models keep their norms or routers."""
    model.to(torch.bfloat16)
    kept = next(p for name, p in model.named_parameters() if "norm" in name or "ln" in name)
    kept.data = kept.data.float()
    return model


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@pytest.mark.parametrize(
    "family", quickly(FAMILIES, set(FAMILIES) - {"llama", "gpt2", "mixtral", "gemma2"})
)
def test_all_weights_come_back(family, dtype, tmp_path):
    first, again = (family_policy(family, seed=seed) for seed in (0, 1))
    for policy in (first, again):
        policy.tokenizer = make_tokenizer()
        if dtype == "mixed":
            mixed(policy.model)
    scrambled(first.model)
    random_state = torch.get_rng_state()
    assert_comes_back(first, again, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)


def tensors_of(policy):
    return as_bits(policy.model.state_dict())


def assert_comes_back(first, again, folder):
    """Save a policy, and read it into another one, whose optimiser holds the tensors that it has."""
    before = tensors_of(first)
    addresses = [weight.data_ptr() for weight in again.trainable_parameters()]
    SavedModel(first).write(folder)
    assert tensors_of(again) != before
    SavedModel(again).read(folder)
    assert tensors_of(again) == tensors_of(first) == before
    assert [weight.data_ptr() for weight in SavedModel(again).tensors()] == addresses


def adapted_by_peft(policy, name="default", **options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
    )
    return wrap(get_peft_model(policy.model, config, name), policy.tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"name": "mine"},
        pytest.param({"use_dora": True}, marks=pytest.mark.slow),
        pytest.param({"bias": "all"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_adapter_alone_comes_back(options, tmp_path):
    with torch.random.fork_rng():
        first, again = (adapted_by_peft(make_policy(dtype="bfloat16"), **options) for _ in range(2))
    one_step(make_learner(first))
    assert_comes_back(first, again, tmp_path)
    names = {path.name: path.is_file() for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert all(names.values())


@pytest.mark.parametrize("case", ["architecture", "layers", "cut", "absent"])
def test_weights_of_another_model_or_damaged_ones_are_refused_and_change_nothing(case, tmp_path):
    options = {"architecture": {"architecture": "gpt2"}, "layers": {"num_hidden_layers": 3}}
    SavedModel(make_policy(**options.get(case, {}))).write(tmp_path)
    file = tmp_path / "model.safetensors"
    if case == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    if case == "absent":
        file.unlink()
    policy = make_policy()
    before = tensors_of(policy)
    with refused(r"are not those of this run's model .* start a new run"):
        SavedModel(policy).read(tmp_path)
    assert tensors_of(policy) == before


def adapted(policy):
    add_lora(policy, r=2)
    return policy


def _written(policy, folder):
    folder.mkdir()
    SavedModel(policy).write(folder)
    return folder


@pytest.mark.parametrize("case", ["changed", "merged", "memory"])
def test_an_adapter_is_never_put_on_another_base_than_its_own(case, tmp_path):
    folder = tmp_path / "base"
    save_policy(make_policy(), folder)
    policy = adapted(make_policy() if case == "memory" else load_policy(folder))
    one_step(make_learner(policy))
    if case == "merged":
        policy = adapted(load_policy(_written(policy, tmp_path / "first")))
    adapter = _written(policy, tmp_path / "checkpoint")
    if case == "changed":
        save_policy(make_policy(seed=1), folder)
    for merge in (True, False):
        with refused("does not name the base" if case == "memory" else "their weights differ"):
            load_policy(adapter, merge_adapter=merge)
    if case == "changed":  # in another precision the bytes differ anyway
        assert load_policy(adapter, dtype="bfloat16").trainable_parameters()


# ---- fingerprints ----


def test_a_fingerprint_follows_every_bit_of_every_weight():
    model = make_model()
    before = fingerprint(model)
    assert before == fingerprint(make_model()) != fingerprint(make_model(seed=1))
    assert before != fingerprint(make_model(dtype="bfloat16"))
    for weight in model.parameters():
        place = weight.data.reshape(-1).view(torch.int32)[-1:]
        place ^= 1
        assert fingerprint(model) != before
        place ^= 1
    assert fingerprint(model) == before


def test_a_tokenizers_fingerprint_follows_what_it_writes_and_not_how_it_was_used():
    used, templated, added = make_tokenizer(), make_tokenizer("chat"), make_tokenizer()
    used(["a", "the cat"], padding=True, truncation=True, max_length=1)
    templated.chat_template += " "
    added.add_tokens(["dogs"])
    kinds = [make_tokenizer(kind) for kind in ("no_pad", "pad", "pad_is_eos", "chat", "closing")]
    same = [used, make_tokenizer("pads_right")]
    assert len({*map(tokenizer_fingerprint, [*kinds, templated, added, *same])}) == 7


# ---- model cards, as the hub reads them ----


def read(path):
    """The front matter of a card as YAML, and its text."""
    _, front, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


# ---- what is saved is the policy: tried before the first step, and at the end ----


def tied_by_hand(policy):
    policy.model.lm_head.weight = policy.model.get_input_embeddings().weight


def with_a_bias(policy):
    policy.model.lm_head = torch.nn.Linear(32, 96)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (tied_by_hand, r"model .*differ: lm_head.weight.*config.tie_word_embeddings"),
        (with_a_bias, r"model .*differ: lm_head.bias"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(change, words, tmp_path):
    policy = make_policy()
    change(policy)
    with refused(words):
        letters_trained(tmp_path / "run", make_task(), model=policy, check=True)
    assert [path.name for path in tmp_path.iterdir()] == []


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(0, 90, 9)[None]).logits


ADAPTERS = [
    {"target_modules": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"trainable_token_indices": [1, 2]},
]


@pytest.mark.parametrize("options", ADAPTERS, ids=str)
def test_an_adapter_on_tied_embeddings_is_saved_as_it_is(options, tmp_path):
    """Whatever of the two layers it changes, model/ and the adapter alone are the policy of the run."""
    save_policy(make_policy(tie_word_embeddings=True), tmp_path)
    policy = adapted_by_peft(load_policy(tmp_path), init_lora_weights=False, **options)
    with torch.no_grad():
        for weight in policy.trainable_parameters():
            weight += 0.1 * torch.arange(weight.numel()).cos().view_as(weight)
    save_policy(policy, tmp_path / "model")
    checkpoint = _written(policy, tmp_path / "checkpoint")
    SavedModel(policy).check(_written(policy, tmp_path / "trial"))
    expected = logits_of(policy.model)
    for folder in (tmp_path / "model", checkpoint):
        loaded = logits_of(load_policy(folder).model)
        torch.testing.assert_close(loaded, expected, atol=1e-4, rtol=1e-4)
    base = logits_of(load_policy(tmp_path).model)
    assert not torch.allclose(expected, base, atol=0.1)


CHANGED = {
    "repetition_penalty": 1.5,
    "temperature": 0.3,
    "num_beams": 3,
    "bad_words_ids": [[5], [6, 7]],
    "an_unknown_one": 3,
}


DRAWN = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.mark.parametrize(("stop", "drawn"), [(None, None), (("<pad>",), DRAWN)])
def test_plain_generate_draws_as_the_policy_and_ends_where_completions_were_learnt_to_end(
    stop, drawn, tmp_path
):
    """Of the base's settings only those of the ends are left; the tokenizer may know another end."""
    from transformers import GenerationConfig

    policy = make_policy()
    policy.eos_ids = (1, 5)
    policy.ask(PromptArguments(stop=stop))
    settings = GenerationConfig(eos_token_id=5, max_length=30)
    vars(settings).update(CHANGED)
    policy.model.generation_config = settings
    before = settings.to_dict()
    save_policy(policy, tmp_path, **({} if drawn is None else {"distribution": drawn}))
    assert policy.model.generation_config is settings and settings.to_dict() == before
    saved = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    assert {*saved.pop("eos_token_id")} == ({1, 5} if stop is None else {1, 2, 5})
    drawn = drawn or {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # from all tokens
    assert saved == GenerationConfig(do_sample=True, max_length=30, **drawn).to_diff_dict()


@pytest.mark.parametrize(("lora", "relative"), [(0, True), (2, False)])
def test_what_is_shipped_names_no_directory_of_this_machine(
    lora, relative, saved, tmp_path, monkeypatch
):
    base = shutil.copytree(saved(), tmp_path / "my models" / "base")
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(run)
    model = "../my models/base" if relative else str(base)
    letters_trained(run / "out", make_task(), model=model, lora_r=lora, max_steps=1)
    for file in (run / "out" / "model").rglob("*.*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file
    cards = [*(run / "out" / "model").rglob("README.md")]
    assert len(cards) == 1 + (lora > 0)
    assert not any("base_model" in read(card)[0] for card in cards)
    if lora:  # its base is found beside it, in the run
        folder = run / "out" / "model" / "adapter"
        assert not read_json(folder / "adapter_config.json")["base_model_name_or_path"]
        alone = load_policy(folder).model
        assert torch.equal(logits_of(alone), logits_of(load_policy(run / "out").model))
        shutil.copytree(folder, run / "elsewhere")
        with refused("does not name the base"):
            load_policy(run / "elsewhere")


def test_names_of_the_hub_stay_and_command_lines_lose_their_directories(tmp_path):
    policy = adapted(make_policy())
    policy.model.peft_config["default"].base_model_name_or_path = "owner/name"
    lines = [
        "tokenrl train --task '/home/me/my data/rows.jsonl' --model=/home/me/base",
        "see ~/x/y.py:f, 1/2, a/b, https://a.b/c/d.html.",
    ]
    card = Card("t", {"teacher": "/home/me/a b/teacher"}, lines, "owner/name")
    save_policy(policy, tmp_path, card=card)
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    front, text = read(tmp_path / "README.md")
    assert config["base_model_name_or_path"] == front["base_model"] == "owner/name"
    for line in (
        "| teacher | teacher |",
        "tokenrl train --task 'rows.jsonl' --model=base",
        "see y.py:f, 1/2, a/b, https://a.b/c/d.html.",
    ):
        assert line in text
