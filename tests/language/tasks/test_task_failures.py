"""Tasks whose own code raises: one paragraph, and nothing is trained."""

from __future__ import annotations

import sys

import pytest

from tokenrl.cli import main
from tokenrl.errors import Refused, Stopped
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import PromptTask, find_task


class Rows:
    """Rows that are read one by one; reading any but the first raises."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index:
            raise self.error
        return {"prompt": f"p{index}"}


def zero(completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize("error", [SystemExit(0), OSError("disk")], ids=repr)
def test_a_task_that_raises_is_refused(error):
    kind = type(error).__name__
    said = rf"task 'mine' was read, and it raised {kind}: .*\(test_task_failures.py, line"
    with pytest.raises(Refused, match=said):
        find_task(TaskArguments(task=PromptTask("mine", Rows(error), [{"prompt": "a"}], zero)))
    with pytest.raises(Refused, match="The task was read, and it raised"):
        find_task(
            TaskArguments(
                task=PromptTask("mine", [{"prompt": "a"}], Rows(error), zero), eval_size=3
            )
        )
    with pytest.raises(Stopped, match="training prompts could not be read: it raised") as caught:
        PromptStream(Rows(error), 0).draw_prompts(4)
    assert caught.value.__cause__ is error


FILE = """
import sys

class Task:
    name, reward, max_completion_length = "mine", "exact_match", 4
    eval_prompts = [{"prompt": "a"}]

    @property
    def train_prompts(self):
        RAISES

def make():
    RAISES

read = Task()
"""


@pytest.mark.parametrize("raises", ["sys.exit(0)", "raise OSError('no')"])
@pytest.mark.parametrize("name", ["make", "read"])
def test_so_is_one_in_a_file(tmp_path, monkeypatch, capsys, name, raises):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(FILE.replace("RAISES", raises))
    assert main(["train", "--task", f"mine.py:{name}", "--output-dir", "run", "--quiet"]) == 2
    said = capsys.readouterr().err
    how = "was called without arguments" if name == "make" else "was read"
    assert f"task 'mine.py:{name}' {how}, and it raised " in said and "(mine.py, line" in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()
