"""What follows other tokens is encoded as following them: demonstrations, turns, answers, preferences."""

from __future__ import annotations

from functools import cache

import pytest
from refusals import refused
from tiny_models import SENTENCES, llama_decoder, make_model

from tokenrl.language.policy.model import wrap
from tokenrl.language.supervised.fit import encode_demonstrations

TEXTS = [
    *SENTENCES,
    "3+4=7\n1+1=2 3+4= 7 (a) b.",
    "user: hi assistant: yes no",
    "[INST] hi [/INST] yes",
]
TEMPLATES = {
    "line": "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    "space": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "inst": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "special": "{% for m in messages %}<s>{{ m.role + '\n' + m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{{ 'assistant\n' }}{% endif %}",
}


def tokenizer_of(kind):
    """A tokenizer that puts a space, or a BOS too, in front of each text that it is given alone."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback="legacy" in kind))
    if "metaspace" in kind:
        scheme = "first" if "first" in kind else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif "legacy" in kind:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = llama_decoder()
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("[^▁]▁"), "isolated")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="space" in kind)
        backend.decoder = decoders.ByteLevel()
    options = {"vocab_size": 220, "special_tokens": special, "show_progress": False}
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(**options))
    if "whole" in kind:  # as Mistral's, trained on words
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if "bos" in kind:
        backend.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 0)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


KINDS = [
    "metaspace",
    "metaspace bos",
    "metaspace first whole bos",
    "legacy bos",
    "byte level with space",
    "byte level bos",
]


@cache
def policy_of(kind, template=None):
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES.get(template)
    return wrap(make_model("llama", vocab_size=max(tokenizer.get_vocab().values()) + 1), tokenizer)


def read(policy, ids):
    return policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("3+4=", "7"),
        ("3+4= ", "7"),
        ("3+4=", " 7"),
        ("1+1", "=2"),
        ("(a", ")"),
        ("the c", "at sat"),
        ("count to ten:", " one two\nthree"),
        ("a\n", "b"),
        ("the cat", "\n"),
        ("the", ""),
        ("", "the cat"),
    ],
)
def test_prompt_and_demonstration_read_as_written(kind, prompt, completion):
    policy = policy_of(kind)
    ((before, ids),) = encode_demonstrations(policy, [{"prompt": prompt, "completion": completion}])
    assert before == policy.encode(prompt) and ids[-1] == policy.tokenizer.eos_token_id
    bare = [i for i in (*before, *ids) if i not in (0, 1)]
    assert read(policy, bare).removeprefix(" " * ("space" in kind)) == prompt + completion
    assert ids.count(0) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_of_a_chat_read_as_the_template_writes_them(kind, template):
    policy, messages = policy_of(kind, template), [{"role": "user", "content": "hi"}]
    ((before, ids),) = encode_demonstrations(policy, [{"prompt": messages, "completion": "yes"}])
    assert before == policy.encode(messages)
    whole = policy.tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "yes"}], tokenize=False
    )
    written = read(policy, policy.tokenizer(whole, add_special_tokens=False).input_ids)
    expected = written[: written.rindex("yes") + 3]
    if (
        template == "inst" and kind == "byte level bos"
    ):  # its text reads as given, without the space
        expected = expected.replace(" yes", "yes")
    assert read(policy, before + ids[:-1]) == expected
    begun = [*messages, {"role": "assistant", "content": "y"}]
    ((before, ids),) = encode_demonstrations(policy, [{"prompt": begun, "completion": "es"}])
    assert read(policy, before + ids[:-1]).endswith("yes")


@pytest.mark.parametrize("kind", KINDS)
def test_later_turns_of_text_read_as_written(kind):
    policy = policy_of(kind)
    row = policy.encode("3+4=")
    for text in ("7\n", "1+1=", "2", " yes"):
        before = read(policy, row)
        row += policy.reply_ids(
            [{"role": "user", "content": text}], ended=False, chat=False, before=row
        )
        assert read(policy, row) == before + text


def test_a_demonstration_that_cannot_follow_its_prompt_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "3+4=": 1, "7": 2, "3+4=7": 3}  # several are written with spaces between
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    policy = wrap(make_model("llama"), tokenizer)
    with refused(r"The demonstration of row 0.*cannot write '7'.*Give the prompt"):
        encode_demonstrations(policy, [{"prompt": "3+4=", "completion": "7"}])
    assert policy.reply_ids(
        [{"role": "user", "content": "7"}], ended=False, chat=False, before=[1]
    ) == [2]
