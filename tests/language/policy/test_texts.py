"""Prompts that no context can hold, prompts with special tokens, and what is printed for people."""

from __future__ import annotations

import io
import pickle
import time
from pathlib import Path

import pytest
from tiny_models import make_model, make_policy, make_task, make_tokenizer

from tokenrl import evaluate, load_policy, sample, train
from tokenrl.cli import main
from tokenrl.errors import Refused
from tokenrl.language.inspect.chat import Completion, show
from tokenrl.language.policy.texts import LONG, check_characters, special_texts
from tokenrl.runs.console import harmless

QUICK = {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "eval_generations": 0, "cpu": True}
ENDLESS = "the cat sat on the mat. " * 210_000  # 5 million characters, 10 seconds to tokenize


def test_a_prompt_of_five_million_characters_is_refused_in_a_second(saved, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "a"}, {"prompt": ENDLESS}]
    began = time.process_time()
    with pytest.raises(Refused, match=r"row 0 has 5,040,000 characters.*more than the 64 tokens"):
        sample(model=str(saved(kind="chat")), prompt=(ENDLESS,))
    with pytest.raises(Refused, match=r"row 1 has 5,040,000 characters"):
        train(model=make_policy(), task=make_task([row["prompt"] for row in rows]),
              output_dir=tmp_path / "run", max_completion_length=4, quiet=True, **QUICK)  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO(ENDLESS + "\n"))
    assert main(["sample", "--model", str(saved(kind="chat"))]) == 0  # the next line may be shorter
    assert "characters" in capsys.readouterr().err
    assert time.process_time() - began < 5


def test_only_texts_that_cannot_fit_are_refused_by_their_characters():
    tokenizer = make_tokenizer()
    longest = max(map(len, tokenizer.get_vocab()))
    chat = [{"role": "user", "content": "a" * LONG}, {"role": "user", "content": [{"text": "b" * LONG}]}]
    for prompt, room, fits in (
        ("a" * (longest * 50_000), 50_000, True),
        ("a" * (longest * 50_000 + 1), 50_000, False),
        ("a" * LONG, 1, True),  # short enough to be tokenized, and then refused with its number of tokens
        ("a" * 10 * LONG, None, True),
        (chat, 10, False),
    ):
        if fits:
            check_characters(tokenizer, prompt, room, "The prompt")
        else:
            with pytest.raises(Refused, match="The prompt has"):
                check_characters(tokenizer, prompt, room, "The prompt")


def test_special_tokens_in_a_prompt_are_named_with_the_first_row():
    tokenizer = make_tokenizer("chat")
    rows = ["the cat", "a <eos> b", [{"role": "user", "content": "x<pad>"}]]
    (said,) = special_texts(tokenizer, rows)
    assert 'row 1 contains "<eos>"' in said and "and 1 more rows" in said
    assert not special_texts(tokenizer, ["the <eo s>", [{"role": "<eos>", "content": "cat"}]])
    assert tokenizer("a <eos> b").input_ids.count(tokenizer.eos_token_id) == 1  # as the message says
    tokenizer.split_special_tokens = True
    assert not special_texts(tokenizer, rows)


def test_sample_evaluate_and_train_warn_of_special_tokens_once(saved, tmp_path, capsys):
    model, words = str(saved(kind="chat")), 'contains "<eos>"'
    assert main(["sample", "--model", model, "--prompt", "a <eos> b", "<eos>", "--num-generations", "0"]) == 0
    assert capsys.readouterr().err.count(words) == 1
    task = make_task(["a <eos> b", "the cat"])
    evaluate(model=model, task=task, num_generations=0)
    assert capsys.readouterr().err.count(words) == 1
    train(model=model, task=task, output_dir=tmp_path / "run", **QUICK)
    assert " ".join(capsys.readouterr().out.split()).count(words) == 1


def test_what_a_model_writes_cannot_change_the_terminal(capsys):
    text = "a\tb\nc\x1b[31m\x07\r\x00\x9b\u202e\u2066 é 日本　👩‍💻"
    shown = r"c\x1b[31m\x07\r\x00\x9b\u202e\u2066 é 日本　👩‍💻"
    assert harmless(text) == f"a\tb\n{shown}"
    show("\x1b]0;title\x07", [Completion(text, 1.0)], chat=False)
    out = capsys.readouterr().out
    assert shown in out and out.isprintable() is False and "\x1b" not in out and "\x07" not in out


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_model_that_is_a_program_is_refused_and_not_run(tmp_path):
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    for protocol in (2, 4):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "hacked"), protocol))
        with pytest.raises(
            Refused, match=r"No causal language model could be loaded.*could run as a program"
        ) as error:
            load_policy(folder)
        assert "\n" not in str(error.value) and not (tmp_path / "hacked").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "hacked").exists()  # so the file would have run
