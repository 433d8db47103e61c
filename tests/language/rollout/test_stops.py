"""Stop strings: a completion ends with the token that completes one, and its probability is what it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from refusals import refused
from tiny_models import PROMPTS, completions, llama_decoder, make_policy, make_tokenizer

from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.policy.stops import StopStrings
from tokenrl.language.rollout.decoding import LOOK_EVERY

STOPS = [(" t",), ("at ", "\n "), ("ne t", "é"), ("\n\n", "at"), ("on the mat and",), ("😀", "o")]


def fast(backend, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def newlines():
    """Five tokens, in which two line breaks can be written as one token, as two, or across a token's end."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<eos>": 0, "a": 1, "Ċ": 2, "ĊĊ": 3, "aĊ": 4, "Ċa": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return fast(backend, eos_token="<eos>")


def sentencepiece():
    """As Llama 2 writes text: spaces as pieces, other characters as bytes, a first space stripped."""
    from tokenizers import Tokenizer, models, normalizers

    pieces = "<s> ▁t t ▁ ▁on o n ▁the he mat ▁mat ▁and at ne e ▁▁ a".split()  # noqa: SIM905
    pieces += [f"<0x{byte:02X}>" for byte in dict.fromkeys("é😀\nhmd".encode())]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = llama_decoder()
    return fast(backend, bos_token="<s>")


TOKENIZERS = {"byte-level": make_tokenizer, "newlines": newlines, "sentencepiece": sentencepiece}


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def length_by_definition(tokenizer, ids, stops, eos=()):
    """Tokens up to the first after which the whole text holds a stop string, or that is an EOS."""
    for n in range(1, len(ids) + 1):
        if ids[n - 1] in eos or any(stop in text_of(tokenizer, ids[:n]) for stop in stops):
            return n, True
    return len(ids), False


def first_end(strings, ids, row=0):
    """What `length_by_definition` returns, as the tokens of a row are drawn one by one."""
    alive = torch.tensor([row])
    for t in range(ids.shape[1]):
        if bool(strings.ended(ids, alive, t)):
            return t + 1, True
    return ids.shape[1], False


@pytest.mark.parametrize("stops", STOPS, ids=map(str, STOPS))
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_end_is_the_first_token_whose_text_holds_a_stop_string(kind, stops):
    tokenizer = TOKENIZERS[kind]()
    # special and partial tokens too
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(tokenizer), (60, 40), generator=draws)
    planted = torch.tensor(tokenizer(stops[0], add_special_tokens=False).input_ids)
    for row in range(0, 60, 4):  # a long string hardly comes about by chance
        ids[row, 1 + row // 4 :][: len(planted)] = planted[: 39 - row // 4]
    strings = StopStrings(tokenizer, stops)
    lengths = [first_end(strings, ids, row) for row in range(60)]
    expected = [length_by_definition(tokenizer, row, stops) for row in ids.tolist()]
    assert lengths == expected
    alphabet = {*text_of(tokenizer, list(range(len(tokenizer))))}
    assert min(expected)[0] < 40 or not any({*stop} <= alphabet for stop in stops)


@pytest.mark.parametrize(("generations", "look_every"), [(0, 1), (6, 1), (6, 5)])
def test_rows_are_those_without_stop_strings_up_to_their_ends(generations, look_every, monkeypatch):
    monkeypatch.setitem(LOOK_EVERY, "cpu", look_every)
    policy = make_policy()
    stops = (" t", "og", "12", "a")
    options = {"num_generations": generations, "max_completion_length": 12}
    prompts = [policy.encode(prompt) for prompt in PROMPTS]
    endless = completions(policy, prompts, **options)
    policy.ask(PromptArguments(stop=stops))
    rollout = completions(policy, prompts, **options)
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    inside = 0
    for row, ids in enumerate(endless.completion_ids.tolist()):
        whole = ids[: int(endless.mask[row].sum())]
        n, ended = length_by_definition(policy.tokenizer, whole, stops, policy.eos_ids)
        assert rollout.mask[row].tolist() == [t < n for t in range(rollout.mask.shape[1])]
        assert rollout.completion_ids[row, :n].tolist() == whole[:n]
        assert bool(rollout.truncated[row]) == (not ended)
        text = text_of(policy.tokenizer, whole[:n])
        cuts = [text.find(stop) for stop in stops if stop in text]
        assert texts[row] == text[: min(cuts, default=None)]
        inside += bool(cuts) and not text.endswith(stops)
    assert inside or not generations  # some are completed in the middle of a token
    assert 0 < rollout.truncated.sum() < len(rollout) or not generations


def test_the_name_of_a_special_token_ends_as_eos_does():
    policy = make_policy()
    policy.ask(PromptArguments(stop=("<pad>",)))
    assert policy.tokenizer.pad_token_id not in policy.eos_ids
    rollout = completions(policy, [[5, 6]], num_generations=200, max_completion_length=12)
    last = rollout.completion_ids.gather(1, rollout.mask.sum(dim=1, keepdim=True) - 1).squeeze(1)
    by_pad = last == policy.tokenizer.pad_token_id
    assert by_pad.any() and not rollout.truncated[by_pad].any()
    assert not (rollout.completion_ids == policy.tokenizer.pad_token_id)[rollout.mask][:-1].all()
    with refused(r"'<eos>' is a special token.* Give '<eos>' alone"):
        policy.ask(PromptArguments(stop=("a<eos>",)))
    with refused("stop holds ''"):
        PromptArguments(stop=("a", ""))


def test_what_came_long_before_still_counts():
    """Bytes of one run spoil each other unless all make characters; special tokens have no text."""
    tokenizer = sentencepiece()

    def pieces(text, *, between=()):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return [*itertools.chain.from_iterable((i, *between) for i in ids[:-1]), ids[-1]]

    stray = pieces("é")[1:]  # the second byte of a character alone
    for ids, strings, expected in (
        (pieces("😀" * 8 + "é"), ("é", "ne t"), 34),  # the last 13 tokens begin inside a character
        (stray + pieces("é" * 12), ("é", "one t"), None),  # the last 14 tokens are characters
        (pieces("o" * 40 + "one t", between=[0] * 30), ("one t",), 45 + 30 * 44),
    ):
        length, is_ended = length_by_definition(tokenizer, ids, strings)
        assert (length if is_ended else None) == expected
        assert first_end(StopStrings(tokenizer, strings), torch.tensor([ids])) == (length, is_ended)
