"""Tiny runs of capabilities, each in a process of its own that is forked from one which has imported everything."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from folders import write_rows

from tests.promises.capabilities import CAPABILITIES
from tests.resume.killing import Moment, Nursery
from tokenrl.language.policy.model import wrap
from tokenrl.language.policy.saving import save_policy
from toy_tasks.models import TinyModel

BASE = """train --task rows.jsonl --model start --max-steps 4 --prompts-per-step 4 --num-generations 4
--max-completion-length 5 --eval-size 4 --eval-generations 1 --save-every 1 --log-completions 1
--learning-rate 0.01 --lr-scheduler-type constant --threads 1 --cpu --seed 3 --quiet"""
WORDS = "the cat|a dog|count to ten|sat on the mat|one two|on|ten nine|the log and|seven|a mat|dog and cat|six"
Row = tuple[str, ...]


class Workshop:
    """A folder with data, code and a model, in which runs of capabilities are made; each whole run once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.nursery = Nursery(folder)
        shutil.copy(Path(__file__).with_name("mine.py"), folder / "mine.py")
        write_rows(folder / "rows.jsonl", [{"prompt": text} for text in WORDS.split("|")])
        letters = tuple(sorted({*WORDS}))
        log = [
            {"prompt": text, "completion": words, "logprobs": [-4.0] * (len(words) + 1)}
            for text in WORDS.split("|")
            for words in ("a", "on", text[:3], text[1:5])
        ]
        rewarded = [{**row, "reward": len({*row["completion"]}) / 5} for row in log]
        write_rows(folder / "log.jsonl", log)
        write_rows(folder / "rewarded.jsonl", rewarded)
        model, tokenizer = TinyModel(letters, layers=1, hidden=32, heads=2)(0)
        with torch.no_grad():  # so that completions differ, and end at all lengths
            model.lm_head.weight.mul_(30)
        save_policy(wrap(model, tokenizer), folder / "start")

    def words(self, row: Row, directory: Path | str) -> list[str]:
        """The command of a run with the capabilities of a row."""
        words = BASE.split()
        if "reward" not in [CAPABILITIES[name].slot for name in row]:
            words += ["--reward", "mine.py:reward"]
        if "counting reward" not in row:  # whose state evaluations would spend
            words += ["--eval-every", "2"]
        for name in row:
            words += CAPABILITIES[name].flags.split()
        return [*words, "--output-dir", str(directory)]

    def run(self, row: Row, name: str, *options: str, moments: Sequence[Moment] = (), processes=1):
        """Make a run with further flags; return its directory and the exit codes of its processes."""
        directory = self.folder / f"{name} {'-'.join(row)}"
        words = [*self.words(row, directory), *options]
        self.nursery.log.unlink(missing_ok=True)
        ended = self.nursery.run_all(words, *moments, processes=processes, counts=False)
        return directory, {each["code"] for each in ended}

    def whole(self, row: Row) -> Path:
        """The directory of a run that nothing disturbed."""
        directory = self.folder / f"whole {'-'.join(row)}"
        if not (directory / "summary.json").exists():
            assert self.run(row, "whole")[1] == {0}, self.nursery.said
        return directory

    @contextmanager
    def with_file(self, name: str, text: str = ""):
        """A block in which a file lies in the folder, or has other text."""
        file = self.folder / name
        before = file.read_text() if file.exists() else None
        file.write_text(text)
        yield
        file.unlink() if before is None else file.write_text(before)
