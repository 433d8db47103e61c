"""Tasks whose own code raises: one paragraph, and nothing is trained."""

from __future__ import annotations

import sys

import pytest

from tokenrl.cli import main

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
    assert f"task 'mine.py:{name}' was read, and it raised " in said and "(mine.py, line" in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()
