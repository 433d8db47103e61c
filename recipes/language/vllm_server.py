"""Train with a sampling server: `vllm serve` samples, and gets a LoRA adapter after each step.

    python recipes/language/vllm_server.py                                 starts a server, and stops it
    python recipes/language/vllm_server.py --url http://127.0.0.1:8000     takes one that runs
    python recipes/language/vllm_server.py --sync-every 2                  it samples while updates are made
    export VLLM_SERVER_URL=http://127.0.0.1:8000                           the same for a run of your own:
    tokenrl train ... --lora-r 8 --generator recipes/language/vllm_server.py:VllmServer

Look for a rising reward, and for log-probabilities of the server that stay those of the trainer. The class can
be copied alone. Each version of the adapter has a name of its own with an id of the run: an answer names what
sampled it, nothing that was cached of another version is read, and runs can share a server. A server that is
started again gets the adapter again. `recipes/pages/guides/scaling.md` starts a server by hand. VLLM_API_KEY is
sent as its key. Only adapters are sent: on a CPU vLLM's own transfer of all weights fails.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[vllm]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import copy
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import fmean
from tempfile import mkdtemp

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence

import tokenrl
from tokenrl.language import Abilities, Rollout, load_task, warm_started_base
from tokenrl.runs import read_run

OPTIONS = "--enable-lora --max-loras=2 --logprobs-mode=processed_logprobs --generation-config=vllm"
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}


class VllmServer:
    """An engine for `generator=`: a server of vLLM samples from the base model with the policy's adapter.

    What it raises reaches the user as `Refused` before the first step, and as `Stopped` later.

    Attributes:
        patience: the most seconds until a whole answer, and until a server has started.
        pause: seconds between two tries.
        largest: the most bytes of an answer.
    """

    patience, pause, largest = 600.0, 2.0, 2**28

    abilities = Abilities(
        exact=False,
        agrees=True,
        distributed=False,
        min_p_last=False,
        temperatures=(0.01, 2.0),
        options=("temperature", "top_k", "top_p", "min_p"),
    )

    def __init__(self, policy, rows_at_once=None):
        if not policy.has_adapter or policy.stops:
            raise ValueError("an adapter is sent, and no stop strings: set lora_r, and no stop")
        self.policy, self.process = policy, None
        self.run, self.version, self.names = secrets.token_hex(4), 0, []
        self.announced, self.ahead, self.pool = [], (None, None), ThreadPoolExecutor(1)
        self.lines = []  # the sockets of requests under way
        self.folder = Path(mkdtemp(prefix="tokenrl-"))
        self.host = os.environ.get("VLLM_SERVER_URL", "").removeprefix("http://").rstrip("/")
        self.key = os.environ.get("VLLM_API_KEY", "").strip()
        try:
            if "@" in self.host:  # what stands before it is a secret, so it is not shown
                raise ValueError(
                    "VLLM_SERVER_URL must be like http://host:8000, without a password"
                )
            if not self.host:
                self.start()
            self.sync(policy)
        except BaseException:
            self.close()
            raise

    def start(self):
        """Start a server of the policy's base, which the first request waits for."""
        base = copy.deepcopy(self.policy.model).unload()
        base.save_pretrained(self.folder / "base")
        self.policy.tokenizer.save_pretrained(self.folder / "base")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        rank = max(8, self.policy.model.peft_config["default"].r)
        options = f"--host=127.0.0.1 --port={port} --max-lora-rank={rank} {OPTIONS}".split()
        options += ["--enforce-eager"] * (base.device.type == "cpu")
        options += [f"--model={self.folder}/base", f"--dtype={base.dtype}".replace("torch.", "")]
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options],
                env=ON_CPU | os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C ends the run, which stops the server
            )
        self.host = f"127.0.0.1:{port}"

    def ask(self, path, body):
        """Return the status of an answer and its text; ask again while the server has none, is busy or fails."""
        began = time.monotonic()
        while True:
            if self.process and self.process.poll() is not None:
                log = (self.folder / "log").read_text().splitlines()[-5:]
                raise RuntimeError(f"the server has ended; its log: {' | '.join(log)}")
            try:
                status, text = self.exchange(path, body, began + self.patience - time.monotonic())
                if self.key:
                    text = text.replace(self.key, "(key)")  # a server may repeat what it got
                if status < 500 and status != 429:
                    return status, text
            except (OSError, HTTPException) as error:
                text = repr(error)
                if self.version == 1 and isinstance(error, socket.gaierror):
                    raise ValueError(f"{self.host} names no host ({text})") from error
            if time.monotonic() + self.pause > began + self.patience:
                raise RuntimeError(
                    f"no answer of {self.host}{path} in {self.patience:g} s ({text[:300]}); look into the log of the "
                    "server, start it again, and continue the run with --resume auto"
                )
            time.sleep(self.pause)

    def exchange(self, path, body, seconds):
        """Send a request, and return the status of the answer and its text.

        A server that sends a byte now and then keeps each wait short, so a timer hangs up after `seconds`.
        """
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        with closing(HTTPConnection(self.host, timeout=max(1.0, seconds))) as connection:
            connection.connect()  # without a proxy
            line = connection.sock
            until = time.monotonic() + connection.timeout
            late = threading.Timer(connection.timeout, self.hang_up, [line])
            self.lines.append(line)
            late.start()
            try:
                connection.request("POST", path, json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read(self.largest)
            finally:
                # the timer may have hung up and not have ended
                is_late = time.monotonic() >= until
                late.cancel()
                self.lines.remove(line)
        if len(text) == self.largest:
            raise RuntimeError(f"{self.host}{path} answers with {self.largest} bytes or more")
        if answer.length or is_late:  # the length is what is left
            raise TimeoutError(f"of the answer {len(text)} bytes were there in time, and not all")
        return answer.status, text.decode()

    def hang_up(self, *lines):
        """End what is exchanged on these sockets, also for a thread that waits there; of all without any."""
        for line in lines or [*self.lines]:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def sync(self, policy):
        """Send the adapter as a new version, and drop the last but one, which nothing samples from any more."""
        self.version += 1
        name = f"{self.run}-{self.version}"
        policy.model.save_pretrained(self.folder / name, save_embedding_layers=False)
        self.load(name)
        self.names.append(name)
        self.drop(self.names[:-2])

    def drop(self, names):
        """Drop versions of the adapter."""
        for name in names:
            self.ask("/v1/unload_lora_adapter", {"lora_name": name})
            shutil.rmtree(self.folder / name)
            self.names.remove(name)

    def load(self, name):
        """Load a version of the adapter; that it is there already is no fault."""
        adapter = {"lora_name": name, "lora_path": str(self.folder / name)}
        status, text = self.ask("/v1/load_lora_adapter", adapter)
        if status != 200 and "already been loaded" not in text:
            raise RuntimeError(
                f"{self.host} does not load {adapter} ({text}); start the server with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, where it can read the path"
            )

    def announce(self, prompts):
        """Note the prompts of the step after the next one, so that they are sampled during the update."""
        self.announced = prompts

    def generate(self, prompt_ids, sampling, draws):
        """Return what was sampled ahead, or sample now; begin with what was announced for the next step."""
        if not sampling.step:  # an evaluation is of the present weights
            return self.sample(prompt_ids, sampling, draws)
        ids, answer = self.ahead
        rollout = answer.result() if ids == prompt_ids else self.sample(prompt_ids, sampling, draws)
        rows = [row for _, row in self.announced]
        ids = self.policy.encode_all(
            [row["prompt"] for row in rows],
            max_completion_length=sampling.max_completion_length,
            truncate=sampling.truncate_prompts,
            tools=[row.get("tools") for row in rows],
        )
        # with other random numbers than those of this step
        answer = self.pool.submit(self.sample, ids, sampling, 1 - draws) if ids else None
        self.announced, self.ahead = [], (ids, answer)
        return rollout

    def sample(self, prompt_ids, sampling, draws):
        """Sample as `tokenrl.language.Generator` says. Each prompt is a request with a seed of its own."""
        size = sampling.group_size
        common = {
            "model": self.names[-1], "n": size, "max_tokens": sampling.max_completion_length,
            "temperature": 0 if draws is None else sampling.temperature, "top_k": sampling.top_k,
            "top_p": sampling.top_p, "min_p": sampling.min_p, "stop_token_ids": self.policy.ends,
            "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        seeds = torch.zeros(len(prompt_ids)) if draws is None else draws[::size, 0] * 2**53
        requests = [
            common | {"prompt": list(prompt), "seed": seed}
            for prompt, seed in zip(prompt_ids, seeds.long().tolist(), strict=True)
        ]
        with ThreadPoolExecutor(32) as pool:
            try:
                rows = [row for group in pool.map(self.complete, requests) for row in group]
            except BaseException:  # such as Ctrl-C, which does not wait for the others
                self.patience = 0.0
                self.hang_up()
                pool.shutdown(cancel_futures=True)
                raise
        tokens = pad_sequence([table for table, _ in rows], True)  # [N, T, 2]
        lengths = torch.tensor([len(table) for table, _ in rows])
        index = torch.arange(len(prompt_ids)).repeat_interleave(size)
        prompts = [torch.tensor(list(ids)) for ids in prompt_ids]
        return Rollout(
            prompt_ids=pad_sequence(prompts, True, 0, "left")[index],
            prompt_mask=pad_sequence([ids >= 0 for ids in prompts], True, False, "left")[index],
            prompt_index=index,
            completion_ids=tokens[:, :, 0].long(),
            mask=torch.arange(tokens.shape[1]) < lengths[:, None],
            sampling_logprobs=tokens[:, :, 1].float(),
            truncated=torch.tensor([not is_ended for _, is_ended in rows]),
        )

    def complete(self, request):
        """Return a table of ids and log-probabilities [T, 2] for each completion, and whether it ended."""
        status, text = self.ask("/v1/completions", request)
        if status == 404:  # the server was started again
            self.load(request["model"])
            status, text = self.ask("/v1/completions", request)
        answer = json.loads(text) if status == 200 else {"model": f"code {status}: {text[:300]}"}
        if answer["model"] != request["model"]:
            versions = f"{answer['model']!r} instead of {request['model']!r}"
            raise ValueError(f"{self.host} answers {versions}")
        choices = answer["choices"]
        if [c["prompt_token_ids"] for c in choices] != [request["prompt"]] * request["n"]:
            raise ValueError(f"{self.host} gives not {request['n']} completions of the prompt")
        if sorted(c["index"] for c in choices) != [*range(request["n"])]:
            raise ValueError(
                f"{self.host} repeats completions of the prompt, and leaves out others"
            )
        rows = []
        for c in choices:
            logprobs = c["logprobs"]["token_logprobs"]
            if len(logprobs) != len(c["token_ids"]) or None in logprobs:
                raise ValueError(f"{self.host} gives no log-probability for some tokens")
            table = torch.tensor([c["token_ids"], logprobs], dtype=torch.float64).T
            if c["finish_reason"] not in ("stop", "length"):
                raise ValueError(f"{self.host} ended a completion by {c['finish_reason']!r}")
            rows.append((table, c["finish_reason"] == "stop"))
        return rows

    def close(self):
        """Stop the server that was started here; let another one drop the adapter."""
        self.patience = min(5.0, self.patience)
        self.hang_up()  # while it samples ahead
        if self.process:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)  # what it may have left
        else:
            with suppress(RuntimeError, OSError):
                self.drop([*self.names])
        shutil.rmtree(self.folder)


def main(
    url: str = "",
    sync_every: int = 1,
    max_steps: int = 30,
    output_dir: Path = Path("runs/vllm_server"),
) -> None:
    """Train sort_digits with an adapter of rank 8.

    Args:
        url: Address of a server of the base model, whose directory is printed first. By default one is started.
        sync_every: With 2 a step is sampled while the update of the step before is made.
        max_steps: Number of training steps.
        output_dir: Directory of the run.
    """
    os.environ |= {"VLLM_SERVER_URL": url} if url else {}
    base = warm_started_base(load_task("sort_digits"))
    print(f"base model: {base}")
    result = tokenrl.train(
        model=str(base), task="sort_digits", lora_r=8,
        estimator="rloo" + ",importance=sequence" * (sync_every > 1), generator=VllmServer,
        learning_rate=1e-3, sync_every=sync_every, max_steps=max_steps, output_dir=output_dir, overwrite=True,
    )  # fmt: skip
    gaps = read_run(output_dir).series("sampling/logp_difference/mean")[1]
    if result.exit_reason != "finished":  # it was interrupted
        return
    before, after = (x["reward"] for x in (result.eval_before, result.eval_after))
    print(f"held-out reward {before:.3f} before, {after:.3f} after {max_steps} steps")
    print(f"nats per token between server and trainer: {fmean(gaps):.1e}, at most {max(gaps):.1e}")


if __name__ == "__main__":
    tyro.cli(main)
