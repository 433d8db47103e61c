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
from command_line import completes
from folders import read_json, write_rows
from tiny_environments import Safe
from tiny_models import quickly

import tokenrl
from tokenrl.cli import main
from tokenrl.language.policy.model import load_policy
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.tools import assistant_message
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.supervised.base import make_tiny, vocabulary_of
from tokenrl.language.tasks.task import PromptTask, own_task
from toy_tasks.models import EOS, UNKNOWN

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
    "chat": "train --task chat.jsonl --reward own.py:chatty",
    "text as chat": "train --task plain.jsonl --reward own.py:chatty --chat --system-prompt Add",
    "columns": f"train --task columns.jsonl --prompt-template {{question}}= {TWO}",
    "demonstrations": "sft --task chat.jsonl --max-steps 1",
    "chosen column": f"sft --task plain.jsonl --completion-column answer {TWO} --eval-size 2 --max-steps 1",
}


@pytest.fixture
def data(workplace, cache):
    """The current directory holds data of several forms."""
    Path("own.py").write_text(PYTHON)
    forms = {"plain": [], "columns": [], "chat": []}
    for n in range(10):
        user, answer = f"{n}+1=", str(n + 1)
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        forms["plain"].append({"prompt": user, "answer": answer})
        forms["chat"].append({"messages": messages})
        forms["columns"].append({"question": f"{n}+1", "answer": answer})
    for name, rows in forms.items():
        write_rows(f"{name}.jsonl", rows)


@pytest.mark.parametrize("kind", quickly(KINDS, {"text as chat", "chosen column"}))
def test_what_a_run_prints_as_next_works(kind, data, monkeypatch, capsys):
    small = SMALL.split() if KINDS[kind].startswith("train") else []
    completes(*shlex.split(KINDS[kind]), *small, "--model", "tiny", "--output-dir", "run")
    first, again = re.findall(r"^next +tokenrl (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert main(shlex.split(again)) == 0
    rewarded = kind != "demonstrations"
    assert main(["evaluate", "--model", "run"]) == (0 if rewarded else 2)
    # advise, of a run that learnt nothing
    assert first.startswith("sample") or main(shlex.split(first)) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1+1=\n2+x=\n"), "utf-8"))
    completes("sample --model run")
    printed = capsys.readouterr()
    assert re.search("tokenrl: as in the run of run: .*task ", printed.err)
    assert printed.out.startswith("prompt     1+1=\n") and printed.out.count("completion ") == 8
    assert ("reward " in printed.out) == rewarded == ("without rewards" not in printed.err)
    assert not rewarded or "answer 2\nreward " in printed.out


def test_a_tiny_model_is_made_of_all_rows_and_made_again_as_its_run_continues(data):
    settings = {"task": "own.py:task", "model": "tiny", "stop": "#", "dtype": "float64"}
    settings |= {"prompts_per_step": 2, "num_generations": 2, "base_seed": 1}
    settings |= {"eval_every": 0, "cpu": True, "quiet": True}
    tokenrl.train(**settings, max_steps=1, output_dir="run")
    run = tokenrl.train(**settings, max_steps=2, output_dir="run", resume="auto")
    assert {p.dtype for p in run.policy.model.parameters()} == {torch.float64} and run.steps == 2
    saved = load_policy("run")
    # 8 is in held-out rows only
    assert set(saved.tokenizer.get_vocab()) == {"<eos>", UNKNOWN, *"0123456789+=#"}
    assert saved.context == 1024 + len("9+1=10#")
    assert read_json("run/config.json")["model"] == "tiny"


def test_a_tiny_model_takes_the_characters_of_every_column():
    rows = [{"prompt": f"{n}>", "answer": "a", "organism": "xyz"} for n in range(4)]
    policy = make_tiny(SftArguments(model="tiny"), own_task(PromptTask("t", rows[:3], rows[3:])))
    assert {*policy.tokenizer.get_vocab()} == {EOS, UNKNOWN, *"0123>axyz"}
    assert vocabulary_of(policy) == ", a vocabulary of 11 tokens"


def test_a_tiny_model_for_tools_writes_calls_and_reads_them(tmp_path):
    user = {"role": "user", "content": "count to ten"}
    call = {"name": "turn", "arguments": {"digit": 7}}
    text = f"<tool_call>{json.dumps(call)}</tool_call>"
    rows = [{"prompt": [user], "completion": text}]
    options = {"environment": Safe, "model": "tiny", "max_steps": 1, "quiet": True}
    task = PromptTask("safe", rows, rows, None, 8, demonstrations=rows)
    policy = tokenrl.sft(task=task, output_dir=tmp_path, **options).policy
    tools, prompt = Environments(Safe).reset(rows, [0])[0].tools, policy.encode([user])
    ids = policy.tokenizer(text + EOS, add_special_tokens=False).input_ids
    message = assistant_message(policy.tokenizer, ids, prompt, text, tools)
    assert message["tool_calls"] == [{"type": "function", "function": call}]
    written = policy.encode([user, message, {"role": "tool", "content": "7"}])
    assert written[: len(prompt + ids)] == prompt + ids
