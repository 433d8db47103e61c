"""Kills runs at random moments, continues them, and compares them with a run that was not killed.

The processes of a run are forked from one that has imported everything, so that they start at once. Each
counts its calls of functions of tokenrl, by file and by function, and sends itself signals at chosen ones.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as parquet
from folders import read_json

from tests.states import state_of

FORK = get_context("forkserver")
TRAININGS = ["control.training", "language.preferences.fit", "language.training.loop"]
TRAININGS += ["language.supervised.sft"]
FORK.set_forkserver_preload(
    ["peft", "transformers", *(f"tokenrl.{training}" for training in TRAININGS)]
)
PATIENCE = {8.0: signal.SIGTERM, 40.0: signal.SIGALRM}
"""Seconds after the first failure at which a launcher asks the other processes to end, and at which it kills
them. One that waits for the first contact with another ends when it is asked; later ones must end unasked."""
REWARD = """
def sorted_digits(prompts, completions, **_):
    return [sum(a <= b for a, b in zip(c, c[1:])) / 6 + len(set(c)) / 60 for c in completions]
"""
TRAIN = """train --task sort_digits --reward rewards.py:sorted_digits --quiet --max-steps 9
--prompts-per-step 4 --num-generations 4 --eval-size 8 --eval-every 3 --save-every 2 --log-completions 2
--learning-rate 1e-3"""


class Moment(NamedTuple):
    """When a process of a run sends itself a signal: at the `number`-th call in a place.

    Attributes:
        place: a file of tokenrl ("runs/session.py") or a function in it ("runs/session.py:record").
        number: counts the calls in that place, from 1.
        signal: the signal.
        rank: which process.
    """

    place: str
    number: int
    signal: int = signal.SIGKILL
    rank: int = 0


class Nursery:
    """A folder in which command lines run."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log.txt"

    def run(self, argv: list[str], *moments: Moment) -> int:
        """Run a command line in one process; return its exit code, or minus the signal that killed it."""
        return self.run_all(argv, *moments)[0]["code"]

    def run_all(
        self,
        argv: list[str],
        *moments: Moment,
        processes: int = 1,
        of_rank: Sequence[list[str]] = (),
        counts: bool = True,
    ) -> list[dict]:
        """Run a command line; return of each process its exit `code`, and its `calls` by place.

        `of_rank` are further words for each process. Without `counts` calls are counted only to find moments, as
        that takes most of the time of a run.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        files = [self.folder / f"calls{rank}.json" for rank in range(processes)]
        world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
        world |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": True}
        children = []
        for rank, file in enumerate(files):
            file.write_text("{}")
            own = {**world, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            signals = {
                (each.place, each.number): each.signal for each in moments if each.rank == rank
            }
            words = [*argv, *of_rank[rank]] if of_rank else argv
            arguments = self.folder, words, signals, own, file, counts or bool(signals)
            children.append(FORK.Process(target=live, args=arguments))
            children[-1].start()
        wait_for(children)
        return [
            {"code": child.exitcode, "calls": read_json(file)}
            for child, file in zip(children, files, strict=True)
        ]

    @property
    def said(self) -> str:
        """The end of what the runs have printed."""
        return self.log.read_text()[-3000:]


def wait_for(children: list[Any]) -> None:
    """Wait for processes as a launcher does, which ends all once one has failed."""
    late, failed = dict(PATIENCE), None
    while alive := [child for child in children if child.exitcode is None]:
        failed = failed or (time.monotonic() if any(child.exitcode for child in children) else None)
        if failed and late and time.monotonic() - failed > min(late):
            signum = late.pop(min(late))
            for child in alive:
                os.kill(child.pid, signum)
        time.sleep(0.01)


def live(
    folder: Path,
    argv: list[str],
    moments: dict[Any, int],
    world: dict[str, Any],
    file: Path,
    counts: bool,
) -> None:
    """Run a command line in this process, which has just been forked, and end it with the exit code."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TOKENRL_CACHE": str(folder / "cache")}
    os.environ |= {name: str(value) for name, value in world.items()}
    import torch

    from tokenrl.cli import main as tokenrl
    from tokenrl.runs import markup

    torch.set_num_threads(1)
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and "/tokenrl/" in (file := frame.f_code.co_filename):
            file = file.rpartition("/tokenrl/")[2]
            for place in (file, f"{file}:{frame.f_code.co_name}"):
                calls[place] += 1
                if signum := moments.get((place, calls[place])):
                    text = f"{signal.Signals(signum).name} in {file}:{frame.f_code.co_name}\n"
                    os.write(1, text.encode())
                    os.kill(os.getpid(), signum)

    if counts:
        sys.setprofile(count)
    else:  # drawing takes a third of a tiny run
        markup.svg = lambda *_: "<svg></svg>"
    code = 70
    try:
        code = tokenrl(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        file.write_text(json.dumps(calls))
        os._exit(code)


def left(run: Path) -> dict[str, object]:
    """What a run has left: all that it has computed, without the time that it took."""
    newest = max((run / "checkpoints").iterdir())
    summary = read_json(run / "summary.json")
    warm = run / "warm_start" / "metrics.jsonl"
    return {
        "warm start": warm.read_bytes() if warm.exists() else b"",
        "metrics": (run / "metrics.jsonl").read_bytes(),
        "weights": {
            path.name: path.read_bytes() for path in (run / "model").rglob("*.safetensors")
        },
        "state": state_of(newest),
        "summary": {name: value for name, value in summary.items() if "second" not in name},
        "steps": [
            json.loads(line)["step"] for line in (run / "timings.jsonl").read_text().splitlines()
        ],
        "completions": {
            path.name: str(parquet.read_table(path).to_pylist())  # as text, where NaN equals NaN
            for path in sorted((run / "completions").glob("*.parquet"))
        },
    }


def check_killed_runs_end_equal(
    nursery: Nursery,
    folder: Path,
    argv: list[str],
    kills: int,
    seed: int,
    *,
    processes=1,
    places=("",),
) -> None:
    """Kill runs, continue them to their end, and compare each with a run that was not killed.

    A moment is a random call of a function in a random file of tokenrl, so that a save, an evaluation and an
    update are hit as often as the rest; `places` are the folders whose files are meant. Every second run is
    asked to end (SIGTERM) where it could be killed. Of several processes one is killed, and the others must
    end too.
    """
    chance = random.Random(seed)
    whole = folder / "whole"
    ended = nursery.run_all([*argv, "--output-dir", str(whole)], processes=processes)
    assert all(each["code"] == 0 for each in ended), nursery.said
    expected = left(whole)
    killed, number, codes = 0, 0, [-9]
    while killed < kills or any(codes):
        run, moments = folder / f"run{number}", []
        if killed < kills:
            rank = chance.randrange(processes)
            calls = ended[rank]["calls"]
            files = sorted(name for name in calls if ":" not in name and name.startswith(places))
            file = chance.choice(files)
            signum = signal.SIGTERM if killed % 2 else signal.SIGKILL
            moments = [Moment(file, chance.randint(1, calls[file]), signum, rank)]
        again = [*argv, "--output-dir", str(run), "--resume", "auto"]
        codes = [each["code"] for each in nursery.run_all(again, *moments, processes=processes)]
        killed += any(codes)
        assert {-9, -15, 143} & {*codes} or not any(codes), nursery.said
        since = re.split("SIG(?:KILL|TERM) in ", nursery.said)[-1]
        # Before the first step only the main process speaks; if it is the one that was killed, none does.
        refused = "tokenrl: Before the first step: Another process" in since
        refused = refused or "tokenrl:" not in since
        assert {*codes} <= {0, 1, 143, -9, -15} | ({2} if refused else set()), (codes, nursery.said)
        if not any(codes):
            equal(left(run), expected, nursery.said)
            number += 1


def equal(found: dict[str, object], expected: dict[str, object], said: str = "") -> None:
    """Compare what two runs have left; `said` is what they have printed."""
    for name in expected:
        assert found[name] == expected[name], f"{name} differs: {said}"
