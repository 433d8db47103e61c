"""What each token of logged completions carried, beside the model, the advantages and the text."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from test_training import share_of_a
from tiny_models import (
    LETTERS,
    letter_task,
    letters,
    letters_trained,
    llama_decoder,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenrl.language.policy.stops import pieces
from tokenrl.runs.metrics import read_completions
from tokenrl.runs.reader import read_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step with two updates, a KL and a mean over the tokens of each row."""
    folder = tmp_path_factory.mktemp("tokens") / "run"
    task = letter_task(share_of_a, train_prompts=[{"prompt": text} for text in LETTERS])
    options = {
        "estimator": "grpo,beta=0.1",
        "num_iterations": 2,
        "max_steps": 1,
        "log_completions": 1,
    }
    return letters_trained(folder, task, eval_every=0, share_seed=False, **options)


def test_the_numbers_are_those_of_the_model_and_of_the_estimator(trained):
    rows = read_completions(trained.output_dir / "completions" / "step_000001.parquet")
    rows = [row for row in rows if row["tokens/text"] is not None]
    assert len(rows) == 8
    model, tokenizer = letters()
    weights = []
    for number, row in enumerate(rows):
        table = trained.tokens(row=number)
        ids = tokenizer(row["prompt"]).input_ids
        completion = tokenizer.convert_tokens_to_ids([*map(str, table["text"])])
        logits = model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        expected = logprobs[range(len(completion)), completion]
        assert table["logprob"].to_list() == pytest.approx(expected.tolist(), abs=1e-5)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        assert table["entropy"].to_list() == pytest.approx(entropy.tolist(), abs=1e-5)
        assert table["k1"].abs().max() < 1e-5  # the reference is the start
        assert table["weight"].to_list() == pytest.approx(
            [row["advantage"] / len(table)] * len(table)
        )
        text = "".join(table["text"][~table["special"]])
        assert text == row["completion"]
        weights.append(abs(row["advantage"]))
        assert (table["ratio"] - 1).abs().max() > 1e-3  # the first update has moved it
    assert max(weights) > 1


def test_what_was_not_kept_is_refused(trained):
    with refused("No completions of step 7 were kept"):
        trained.tokens(7)
    with refused("has the tokens of 8 completions"):
        read_run(trained.output_dir).tokens(1, 8)


def test_tokens_that_make_a_character_together_have_it_at_the_last():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<eos>"])
    backend.train_from_iterator(["the cat"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    text = "the cat \u00e9 \U0001f600 sat"
    parts = pieces(tokenizer, [*tokenizer(text).input_ids, 0])
    assert "".join(parts) == text + "<eos>" and parts.count("") == 4


def test_so_they_have_where_a_part_of_a_character_spoils_the_text_before_it():
    """A run of bytes that is not whole is written as replacements from its beginning on."""
    alphabet = ["<unk>", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = dict(zip(alphabet, range(len(alphabet)), strict=True))
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.decoder = llama_decoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "a\u65e5\u672c\u8a9ea" + "\u00e9" * 12 + "\U0001f600a"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text and parts[1:7] == ["", "", "\u65e5", "", "", "\u672c"]
    assert pieces(tokenizer, [*ids[:3], *ids[:1]]) == ["a", "", "", "\ufffd\ufffda"]
