"""The recipe that lets a server sample: what it asks of one, and what each fault of a server does to a run."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path

import pytest
import torch
from folders import RECIPES
from peft import set_peft_model_state_dict
from refusals import stopped
from safetensors.torch import load_file
from tiny_models import letter_task, letters, letters_trained, vowel_reward

from tokenrl.errors import Refused, Stopped
from tokenrl.language.policy.model import add_lora, wrap
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.runs.metrics import read_metrics

RECIPE = RECIPES / "language" / "vllm_server.py"
LOAD, UNLOAD, COMPLETE = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"
KEY, BY_NAME = "a-key-of-the-test", f"{RECIPE}:VllmServer"


class Engine(runpy.run_path(str(RECIPE))["VllmServer"]):
    patience, pause, largest = 2.0, 0.01, 2**20


def adapted():
    """The policy of the run and of the server, with an adapter."""
    policy = wrap(*letters(64), source="letters")
    add_lora(policy, r=2)
    return policy


class Fake(ThreadingHTTPServer):
    """Answers the recipe as vLLM does: it samples from a base with the adapter of a name.

    Attributes:
        asked: the path, the body and the key of each request.
        number: requests for completions so far.
        spoil: takes the answer to one, and may return a status and another answer; the status 0 hangs up.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.policy, self.lock = adapted(), threading.Lock()
        self.adapters, self.asked, self.number = {}, [], 0
        self.spoil = lambda answer: None

    def answer(self, path, body):
        name = body.get("lora_name") or body["model"]
        if path == LOAD and name not in self.adapters:
            self.adapters[name] = load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
            return 200, {}
        if path == LOAD:
            return 400, {"error": f"The lora adapter '{name}' has already been loaded."}
        if path == UNLOAD:
            return 200 if self.adapters.pop(name, None) else 404, {}
        self.number += 1
        if name not in self.adapters:
            return 404, {}
        answer = {"model": name, "choices": self.choices(body)}
        return self.spoil(answer) or (200, answer)

    def choices(self, body):
        set_peft_model_state_dict(self.policy.model, self.adapters[body["model"]])
        sampling, draws = Sampling(body["max_tokens"], body["n"]), None
        if body["temperature"]:
            names = ("top_k", "top_p", "min_p", "temperature")
            options = {name: body[name] for name in names}
            sampling = Sampling(body["max_tokens"], body["n"], **options)
            generator = torch.Generator().manual_seed(body["seed"])
            draws = torch.rand(body["n"], body["max_tokens"], generator=generator)
        rows = TransformersGenerator(self.policy).generate([body["prompt"]], sampling, draws)
        return [
            {
                "index": index,
                "prompt_token_ids": body["prompt"],
                "token_ids": ids[mask].tolist(),
                "logprobs": {"token_logprobs": logprobs[mask].tolist()},
                "finish_reason": "length" if is_cut else "stop",
            }
            for index, (ids, mask, logprobs, is_cut) in enumerate(
                zip(
                    *(rows.completion_ids, rows.mask, rows.sampling_logprobs, rows.truncated),
                    strict=True,
                )
            )
        ]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body, self.headers["Authorization"]))
            status, answer = self.server.answer(self.path, body)
        if status:
            parts = [json.dumps(answer).encode()] if isinstance(answer, dict) else answer
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.end_headers()
                for part in parts:
                    self.wfile.write(part)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def fake(monkeypatch):
    """A server that runs meanwhile, on a machine whose proxy does not answer."""
    with Fake() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setenv("VLLM_SERVER_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        yield server
        server.shutdown()


def trained(folder, **options):
    """The rows of metrics.jsonl of a run of three steps with four requests each; an evaluation has two."""
    shape = {"model": letters(64), "generator": Engine, "lora_r": 2, "eval_generations": 0}
    shape["eval_every"] = 1
    task = letter_task(vowel_reward)
    letters_trained(folder, task, **(shape | {"learning_rate": 0.1} | options))
    return read_metrics(folder / "metrics.jsonl")[1:]


def test_each_step_samples_from_a_new_version_of_the_adapter_beside_those_of_others(fake, tmp_path):
    other = Engine(adapted())
    rows = trained(tmp_path / "run", temperature=0.7, top_k=3)
    assert max(row["sampling/logp_difference/max"] for row in rows) < 1e-5
    assert list(fake.adapters) == other.names
    loads = [body for path, body, _ in fake.asked if path == LOAD][1:]
    names = [body["lora_name"] for body in loads]
    assert [int(name.partition("-")[2]) for name in names] == [*range(1, len(names) + 1)]
    assert [body["lora_name"] for path, body, _ in fake.asked if path == UNLOAD] == names
    assert not any(Path(body["lora_path"]).exists() for body in loads)
    sampled = [body for path, body, _ in fake.asked if path == COMPLETE and body["temperature"]]
    assert len({(body["model"], body["seed"]) for body in sampled}) == 12
    assert len({body["model"] for body in sampled}) == 3
    assert {key for *_, key in fake.asked} == {f"Bearer {KEY}"}
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)
    other.close()


def test_a_step_is_sampled_while_the_update_of_the_step_before_is_made(fake, tmp_path):
    """The version of each step is the one before, whose adapter may be lost; evaluations have the last."""

    fake.spoil = lambda answer: fake.adapters.clear() if fake.number == 10 else None
    rows = trained(tmp_path / "run", sync_every=2, max_steps=4, generator=BY_NAME)
    bodies = [body for asked, body, _ in fake.asked if asked == COMPLETE]
    versions = [int(body["model"].partition("-")[2]) for body in bodies]
    requests = {
        (version, body["seed"])  # once, though it may be asked again
        for version, body in zip(versions, bodies, strict=True)
        if body["temperature"]
    }
    first = versions[0]
    counts = Counter(version - first for version, _ in requests)
    assert counts == {0: 8, 1: 4, 2: 4} and versions[-1] == first + 4
    assert len({seed for _, seed in requests}) == 16
    gaps = [row["sampling/logp_difference/max"] for row in rows]
    assert gaps[0] < 1e-5 < min(gaps[1:]) and not fake.adapters


@pytest.mark.parametrize("status", [429, pytest.param(0, marks=pytest.mark.slow)])
def test_after_a_failure_a_new_start_or_a_continuation_the_run_goes_on_as_it_was(
    fake, tmp_path, status
):
    rows = trained(tmp_path / "plain", max_steps=2)
    fake.number = 0

    fake.spoil = lambda answer: (status, {}) if fake.number == 10 else None
    trained(tmp_path / "run", max_steps=1)
    assert trained(tmp_path / "run", resume="auto", max_steps=2) == rows


def completion(**changes):
    """An answer whose first completion is changed."""

    def spoilt(answer):
        answer["choices"][0] |= changes
        return 200, answer

    return spoilt


def fewer(answer):
    return 200, answer | {"choices": answer["choices"][1:]}


def dripping():
    """A byte now and then, without an end: each wait for it is short."""
    while True:
        time.sleep(0.05)
        yield b" "


ONE = {"token_logprobs": [-1.0]}
UNUSABLE = [
    (fewer, "not 4 completions of the prompt"),
    (completion(token_ids=[2, 2], logprobs=ONE), "no log-probability for some tokens"),
    (completion(finish_reason="abort"), "ended a completion by 'abort'"),
    (lambda answer: (200, answer | {"model": "base"}), "answers 'base' instead of '"),
    (lambda answer: (400, {"error": "odd" + KEY}), r"answers 'code 400: .*odd\(key\)"),
    (lambda answer: (500, {"error": "dead"}), r"no answer of .* in 2 s .*dead.* --resume auto"),
    (lambda answer: time.sleep(2.5), r"no answer of .* in 2 s \("),
    (completion(index=1), "repeats completions of the prompt, and leaves out others"),
    (lambda answer: (200, dripping()), r"no answer of .* in 2 s \(.*in time, and not all"),
    (lambda answer: (200, repeat(b" " * 2**16)), r"answers with \d+ bytes or more"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "words"), UNUSABLE)
def test_an_answer_that_cannot_be_used_stops_the_run_and_says_what_it_is(
    fake, tmp_path, change, words
):
    fake.spoil = lambda answer: change(answer) if fake.number > 10 else None
    with stopped(words):
        trained(tmp_path / "run")


def test_ctrl_c_waits_for_no_server_that_drips(fake):
    engine = Engine(adapted())
    engine.patience = 60.0

    def drip(answer):
        if fake.number == 1:
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        return 200, dripping()

    fake.spoil = drip
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[2, 3]] * 3, Sampling(4, 2), torch.rand(6, 4))
    assert time.monotonic() - began < 20
    engine.close()


def another_base(fake, monkeypatch):
    with torch.no_grad():
        for p in fake.policy.model.parameters():
            p.mul_(1.5)


def without_adapters(fake, monkeypatch):
    fake.answer = lambda path, body: (404, {"detail": "Not Found"})


def no_host(fake, monkeypatch):
    monkeypatch.setenv("VLLM_SERVER_URL", "http://no.such.host.invalid:9")


def password(fake, monkeypatch):
    monkeypatch.setenv("VLLM_SERVER_URL", "http://me:secret@127.0.0.1:9")


def no_program(fake, monkeypatch):
    monkeypatch.delenv("VLLM_SERVER_URL")
    monkeypatch.setattr(sys, "executable", "/bin/false")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (another_base, {}, "differ from the trainer's by"),
        (without_adapters, {}, r"does not load .*Not Found.*--enable-lora"),
        (no_program, {}, "the server has ended; its log: "),
        (no_host, {}, "names no host"),
        (password, {}, r"^(?!.*secret).*without a password"),
        (without_adapters, {"lora_r": 0}, "set lora_r"),
        (without_adapters, {"temperature": 3.0, "generator": BY_NAME}, "samples from 0.01 to 2"),
    ],
)
def test_a_server_or_a_setting_that_does_not_fit_ends_the_run_and_leaves_nothing_behind(
    fake, tmp_path, monkeypatch, change, options, words
):
    change(fake, monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises((Refused, Stopped), match=words):
        trained(tmp_path / "run", **options)
    assert not list(tmp_path.glob("tokenrl-*"))
