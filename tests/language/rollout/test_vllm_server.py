"""The recipe that lets a server sample: what it asks of one, and what each fault of a server does to a run."""

from __future__ import annotations

import contextlib
import json
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Timer

import pytest
import torch
from folders import RECIPES
from peft import set_peft_model_state_dict
from refusals import refused, stopped
from safetensors.torch import load_file
from tiny_models import letter_task, letters, letters_trained, vowel_reward

from tokenrl.language.policy.model import add_lora, wrap
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.runs.metrics import read_metrics

RECIPE = RECIPES / "language" / "vllm_server.py"
LOAD, UNLOAD, COMPLETE = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"
KEY, BY_NAME = "a-key-of-the-test", f"{RECIPE}:VllmServer"


class Engine(runpy.run_path(str(RECIPE))["VllmServer"]):
    patience, pause, largest = 2.0, 0.01, 10**6


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
                "prompt_token_ids": body["prompt"],
                "token_ids": ids[mask].tolist(),
                "logprobs": {"token_logprobs": logprobs[mask].tolist()},
                "finish_reason": "length" if is_cut else "stop",
            }
            for ids, mask, logprobs, is_cut in zip(
                rows.completion_ids, rows.mask, rows.sampling_logprobs, rows.truncated, strict=True
            )
        ]


class Dripping(dict):
    """An answer that is sent byte by byte, for longer than anybody waits."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body, self.headers["Authorization"]))
            status, answer = self.server.answer(self.path, body)
        if status:
            self.send_response(status)
            self.end_headers()
            for part in [" "] * 60 if isinstance(answer, Dripping) else [json.dumps(answer)]:
                with contextlib.suppress(OSError):
                    self.wfile.write(part.encode())
                time.sleep(0.1 * (part == " "))

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
    task = letter_task(vowel_reward)
    letters_trained(folder, task, **(shape | {"learning_rate": 0.1} | options))
    return read_metrics(folder / "metrics.jsonl")[1:]


def test_each_step_samples_from_a_new_version_of_the_adapter_beside_those_of_others(fake, tmp_path):
    other = Engine(adapted())
    rows = trained(tmp_path / "run", temperature=0.7, top_k=3)
    assert max(row["sampling/logp_difference/max"] for row in rows) < 1e-5
    assert list(fake.adapters) == other.names
    loaded, dropped, sampled = (
        [body for asked, body, _ in fake.asked if asked == path]
        for path in (LOAD, UNLOAD, COMPLETE)
    )
    names = [body["lora_name"] for body in loaded[1:]]
    assert [int(name.partition("-")[2]) for name in names] == [*range(1, len(names) + 1)]
    assert [body["lora_name"] for body in dropped] == names
    assert not any(Path(body["lora_path"]).exists() for body in loaded[1:])
    steps = [(body["model"], body["seed"]) for body in sampled if body["temperature"]]
    assert len(set(steps)) == 12 and len({name for name, _ in steps}) == 3
    assert {key for *_, key in fake.asked} == {f"Bearer {KEY}"}
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)
    other.close()


def test_a_step_is_sampled_while_the_update_of_the_step_before_is_made(fake, tmp_path):
    """The version of each step is the one before, whose adapter may be lost; evaluations have the last."""

    fake.spoil = lambda answer: fake.adapters.clear() if fake.number == 10 else None
    rows = trained(tmp_path / "run", sync_every=2, max_steps=5, generator=BY_NAME)
    bodies = [body for asked, body, _ in fake.asked if asked == COMPLETE]
    versions = [int(body["model"].partition("-")[2]) for body in bodies]
    requests = {
        (version, body["seed"])  # once, though it may be asked again
        for version, body in zip(versions, bodies, strict=True)
        if body["temperature"]
    }
    first = versions[0]
    counts = Counter(version - first for version, _ in requests)
    assert counts == {0: 8, 1: 4, 2: 4, 3: 4} and versions[-1] == first + 5
    assert len({seed for _, seed in requests}) == 20
    gaps = [row["sampling/logp_difference/max"] for row in rows]
    assert gaps[0] < 1e-5 < min(gaps[1:]) and not fake.adapters


@pytest.mark.parametrize("status", [404, 429, 503, 0])
def test_after_a_failure_or_a_new_start_the_run_goes_on_as_it_was(fake, tmp_path, status):
    rows = trained(tmp_path / "plain")
    fake.number = 0

    def spoil(answer):
        if fake.number == 10:
            if status == 404:
                fake.adapters.clear()
            return status, {}
        return None

    fake.spoil = spoil
    assert trained(tmp_path / "run") == rows


def test_a_continuation_goes_on_with_the_saved_adapter(fake, tmp_path):
    rows = trained(tmp_path / "whole")
    trained(tmp_path / "parts", max_steps=2)
    assert trained(tmp_path / "parts", resume="auto") == rows


def completion(**changes):
    """An answer whose first completion is changed."""

    def spoilt(answer):
        answer["choices"][0] |= changes
        return 200, answer

    return spoilt


def fewer(answer):
    return 200, answer | {"choices": answer["choices"][1:]}


ONE = {"token_logprobs": [-1.0]}
UNUSABLE = [
    (fewer, "not 4 completions of the prompt"),
    (completion(prompt_token_ids=[0]), "not 4 completions of the prompt"),
    (completion(token_ids=[999], logprobs=ONE), "completion_ids must be from 0 to"),
    (completion(token_ids=[2, 2], logprobs=ONE), "no log-probability for some tokens"),
    (
        completion(token_ids=[2], logprobs={"token_logprobs": [None]}),
        "no log-probability for some tokens",
    ),
    (completion(token_ids=[2], logprobs=ONE, finish_reason="length"), "truncated must be True"),
    (lambda answer: (200, answer | {"model": "base"}), "answers 'base' instead of '"),
    (completion(finish_reason="abort"), "ended a completion by 'abort'"),
    (lambda answer: (400, {"error": "odd" + KEY}), r"answers 'code 400: .*odd\(key\)"),
    (lambda answer: (404, {"error": "lost"}), "answers 'code 404: .*lost"),
    (lambda answer: (500, {"error": "dead"}), r"no answer of .* in 2 s .*dead.* --resume auto"),
    (lambda answer: (0, {}), r"no answer of .* in 2 s \(RemoteDisconnected"),
    (lambda answer: time.sleep(2.5), r"no answer of .* in 2 s \("),
    (lambda answer: (200, Dripping(answer)), r"no answer of .* in 2 s \(TimeoutError"),
    (lambda answer: (200, answer | {"more": "x" * 2**20}), "sends more than 1,000,000 bytes"),
]


@pytest.mark.parametrize(("change", "words"), UNUSABLE)
def test_an_answer_that_cannot_be_used_stops_the_run_and_says_what_it_is(
    fake, tmp_path, change, words
):
    fake.spoil = lambda answer: change(answer) if fake.number > 10 else None
    with stopped(words):
        trained(tmp_path / "run")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("VLLM_API_KEY", "a-secret\nkey", "VLLM_API_KEY holds a line break"),
        ("VLLM_SERVER_URL", "http://me:a-secret@127.0.0.1:9", "must be like http://host:8000"),
        ("VLLM_SERVER_URL", "https://a-secret", "must be like http://host:8000"),
        ("VLLM_SERVER_URL", "http://no.such.host.invalid:9", "names no host"),
    ],
)
def test_a_wrong_address_or_key_is_refused_at_once_and_not_shown(
    fake, monkeypatch, variable, value, words
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=words) as caught:
        Engine(adapted())
    assert "a-secret" not in str(caught.value) and not fake.asked


def test_an_interrupt_does_not_wait_for_a_server_that_hangs(fake, monkeypatch):
    engine = Engine(adapted())
    engine.patience = 600.0
    monkeypatch.setattr(engine, "complete", lambda request: engine.ask(COMPLETE, request))
    fake.spoil = lambda answer: time.sleep(2)
    Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    sampling = Sampling(4, 2, step=1)
    with pytest.raises(KeyboardInterrupt):
        engine.sample([[2], [3]], sampling, uniforms("training", sampling, range(2)))
    assert engine.patience <= 5 and not engine.sockets
    engine.close()


def test_a_server_of_another_base_is_refused(fake, tmp_path):
    with torch.no_grad():
        for p in fake.policy.model.parameters():
            p.mul_(1.5)
    with stopped("differ from the trainer's by"):
        trained(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_r": 0}, "set lora_r"),
        ({"stop": ["a"]}, "no stop"),
        ({"temperature": 3.0, "generator": BY_NAME}, "samples from 0.01 to 2"),
    ],
)
def test_what_is_not_sent_is_refused(fake, tmp_path, options, words):
    with refused(words):
        trained(tmp_path / "run", **options)


def test_a_server_that_loads_no_adapters_is_refused_before_the_first_step(fake, tmp_path):
    fake.answer = lambda path, body: (404, {"detail": "Not Found"})
    with refused(r"does not load .*Not Found.*--enable-lora"):
        trained(tmp_path / "run")


def test_a_server_that_does_not_start_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_SERVER_URL", raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with refused("the server has ended; its log: "):
        trained(tmp_path / "run")
    assert not list(tmp_path.glob("tokenrl-*"))
