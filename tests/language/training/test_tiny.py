"""A new tiny model for any data; and what a run prints as next works, for every kind of data."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import quickly

import tokenrl
from tokenrl.cli import main
from tokenrl.language.policy.model import load_policy
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.tools import assistant_message
from toy_tasks.models import EOS, UNKNOWN, model_for_rows

SMALL = "--max-steps 1 --prompts-per-step 2 --num-generations 2 --eval-size 2 --eval-generations 1 --cpu"
PYTHON = """
from tokenrl import PromptTask

def same(completions, answer, **_): return [float(text == a) for text, a in zip(completions, answer)]
def brief(completions, completion_ids): return [-float(len(ids)) for ids in completion_ids]
def chatty(completions, answer): return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]

rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(10)]
task = PromptTask("plus", rows[:7], rows[7:], same, 3)
"""
TWO = "--reward own.py:same own.py:brief --reward-weights 1 0.5"
KINDS = {
    "toy task": "train --task sort_digits",
    "file": f"train --task plain.jsonl {TWO}",
    "Python file": "train --task own.py:task --max-completion-length 2",
    "chat": "train --task chat.jsonl --reward own.py:chatty",
    "text as chat": "train --task plain.jsonl --reward own.py:chatty --chat --system-prompt Add",
    "columns": f"train --task columns.jsonl --prompt-template {{question}}= {TWO}",
    "demonstrations": "sft --task chat.jsonl --max-steps 1",
    "chosen column": f"sft --task plain.jsonl --completion-column answer {TWO} --eval-size 2 --max-steps 1",
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The current directory holds data of several forms."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    Path("own.py").write_text(PYTHON)
    plain = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(10)]
    forms = {"plain": plain, "columns": [], "chat": []}
    for row in plain:
        turns = [("user", row["prompt"]), ("assistant", row["answer"])]
        messages = [{"role": role, "content": content} for role, content in turns]
        forms["chat"].append({"messages": messages})
        forms["columns"].append({"question": row["prompt"][:-1], "answer": row["answer"]})
    for name, rows in forms.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "kind", quickly(KINDS, {"toy task", "Python file", "text as chat", "chosen column"})
)
def test_what_a_run_prints_as_next_works(kind, data, monkeypatch, capsys):
    small = SMALL.split() if KINDS[kind].startswith("train") else []
    assert main([*shlex.split(KINDS[kind]), *small, "--model", "tiny", "--output-dir", "run"]) == 0
    first, again = re.findall(r"^next +tokenrl (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert main(shlex.split(again)) == 0
    rewarded = kind != "demonstrations"
    assert main(["evaluate", "--model", "run"]) == (0 if rewarded else 2)
    # advise, of a run that learnt nothing
    assert first.startswith("sample") or main(shlex.split(first)) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1+1=\n2+x=\n"), "utf-8"))
    assert main(["sample", "--model", "run"]) == 0
    printed = capsys.readouterr()
    assert re.search("tokenrl: as in the run of run: .*task ", printed.err)
    assert printed.out.startswith("prompt     1+1=\n") and printed.out.count("completion ") == 8
    assert ("reward " in printed.out) == rewarded == ("without rewards" not in printed.err)
    assert kind == "toy task" or not rewarded or "answer 2\nreward " in printed.out


def test_a_tiny_model_knows_the_characters_of_all_rows_and_is_the_same_again():
    rows = [{"prompt": "ab", "answer": 70}, {"prompt": "c", "answer": {"d": ["é"]}, "note": None}]
    chat = [{"prompt": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]
    model, tokenizer = model_for_rows(rows, 3, texts=["!"], room=10)
    assert set(tokenizer.get_vocab()) == {"<eos>", UNKNOWN, *'abcd70é!{}[]": '}
    assert (
        model.config.max_position_embeddings == 10 + len('cé!{"d": ["é"]}')
        and tokenizer.chat_template is None
    )
    again = model_for_rows(rows[::-1], 3, texts=["!"])[0]
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(model_for_rows(rows, 4)[0].lm_head.weight, model.lm_head.weight)
    tokenizer = model_for_rows(chat)[1]
    assert set(tokenizer.get_vocab()) == {"<eos>", UNKNOWN, *"hiyo\n"}
    ids = tokenizer.apply_chat_template(chat[0]["prompt"], return_dict=False)
    assert tokenizer.decode(ids) == "hi\nyo\n"
    assert "\n" in model_for_rows(rows, chat=True)[1].get_vocab()


def test_a_run_with_a_tiny_model_is_made_of_all_its_rows_and_continues_to_the_same_bits(data):
    settings = {"task": "own.py:task", "model": "tiny", "stop": "#", "dtype": "float64"}
    settings |= {"prompts_per_step": 2, "num_generations": 2, "base_seed": 1}
    settings |= {"eval_every": 0, "cpu": True, "quiet": True}
    whole = tokenrl.train(**settings, max_steps=2, output_dir="whole")
    tokenrl.train(**settings, max_steps=1, output_dir="parts")
    parts = tokenrl.train(**settings, max_steps=2, output_dir="parts", resume="auto")
    pairs = zip(whole.policy.model.parameters(), parts.policy.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) and ours.dtype == torch.float64 for ours, theirs in pairs)
    saved = load_policy("whole")
    # 8 is in held-out rows only
    assert set(saved.tokenizer.get_vocab()) == {"<eos>", UNKNOWN, *"0123456789+=#"}
    assert saved.context == 1024 + len("9+1=10#")
    assert json.loads(Path("whole/config.json").read_text())["model"] == "tiny"


def test_tiny_is_a_directory_of_that_name_where_there_is_one_and_no_model_to_evaluate(
    data, saved, capsys
):
    for command in ("evaluate --task own.py:task --model tiny", "sample --model tiny --prompt a"):
        assert main(shlex.split(command)) == 2
        assert "tiny is a new model, to be trained" in capsys.readouterr().err
    Path("tiny").symlink_to(saved())
    settings = {"task": "own.py:task", "max_steps": 1, "eval_generations": 0, "quiet": True}
    result = tokenrl.train(model="tiny", output_dir="run", **settings)
    assert result.policy.source == "tiny" and result.policy.size == load_policy(str(saved())).size


class Shop:
    """An environment with a tool."""

    def reset(self, **row):
        """Begin."""

    def price(self, item: str) -> str:
        """Return a price.

        Args:
            item: what is sold.
        """
        return "3"


def test_a_tiny_model_for_tools_writes_calls_and_reads_them(tmp_path):
    user = {"role": "user", "content": "tea?"}
    call = {"name": "price", "arguments": {"item": "tea"}}
    text = f"<tool_call>{json.dumps(call)}</tool_call>"
    rows = [{"prompt": [user], "completion": text}]
    sft = tokenrl.sft(
        task=rows, environment=Shop, model="tiny", max_steps=1, output_dir=tmp_path, quiet=True
    )
    policy, tools = sft.policy, Environments(Shop).reset(rows, [0])[0].tools
    prompt = policy.encode([user])
    ids = policy.tokenizer(text + EOS, add_special_tokens=False).input_ids
    message = assistant_message(policy.tokenizer, ids, prompt, text, tools)
    assert message["tool_calls"] == [{"type": "function", "function": call}]
    assert (
        policy.encode([user, message, {"role": "tool", "content": "3"}])[: len(prompt + ids)]
        == prompt + ids
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"a": [1, {"b": True}]}, '{"a": [1, {"b": true}]}'),
        ([None, "x"], '[null, "x"]'),
        (({"ä": 1.5},), '[{"ä": 1.5}]'),
        ("x\ny", "x\ny"),
        (["x\ny"], '["x\\ny"]\n'),
    ],
)
def test_a_tiny_model_can_write_nested_answers_as_json(answer, text):
    tokenizer = model_for_rows([{"prompt": "?", "answer": answer}])[1]
    assert {*text} <= {*tokenizer.get_vocab()}
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_messages_count_without_their_keys_but_with_those_of_calls():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    vocabulary = {*model_for_rows([{"prompt": turns[:1], "completion": turns[1:]}])[1].get_vocab()}
    assert {*json.dumps([call])} <= vocabulary and not vocabulary & {*"hk"}


def test_evaluate_and_sample_warn_of_characters_that_the_tokenizer_lacks(data, capsys):
    assert (
        main(f"train --task plain.jsonl {TWO} --model tiny {SMALL} --output-dir run".split()) == 0
    )
    rows = [{"prompt": f"{n}+é=", "answer": "1"} for n in range(10)]
    Path("other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lost = r"The tokenizer loses \d+ of \d+ characters of prompts \([\d.]+%\): 'é'"
    capsys.readouterr()
    for command in (
        f"evaluate --model run --task other.jsonl {TWO}",
        "sample --model run --prompt é+1=",
        f"train --model run --task other.jsonl {TWO} {SMALL} --output-dir again",
    ):
        assert main(command.split()) == 0
        printed = capsys.readouterr()
        assert re.search(lost, " ".join((printed.err + printed.out).split())), command
    assert main(["sample", "--model", "run", "--prompt", "1+1="]) == 0
    assert "loses" not in capsys.readouterr().err
