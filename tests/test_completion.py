"""Shell completion: what bash offers after the script of `tokenrl --print-completion bash` was read."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tokenrl.cli import main
from tokenrl.core import PRESETS

# What bash itself does for a word: it calls the function that `complete -F` named for the program.
ASK = r"""
eval "$(cat script)"
set -- tokenrl "$@"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
# compopt, which marks names of files, only works while a key is handled
$(complete -p tokenrl | grep -oP "(?<=-F )\\S+") 2>errors
printf '%s\n' "${COMPREPLY[@]}"
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shell")


@pytest.fixture
def offered(folder, capsys):
    """What is offered after the words of a command line, the last of which is unfinished."""
    with pytest.raises(SystemExit) as exit:
        main(["--print-completion", "bash"])
    assert not exit.value.code
    (folder / "script").write_text(capsys.readouterr().out)
    (folder / "data.jsonl").touch()

    def ask(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "--norc", "-c", ASK, "bash", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return sorted(done.stdout.split())

    return ask


def test_commands_flags_and_values_are_offered(offered):
    assert offered("re") == ["report", "reward-model"]
    assert offered("lab", "") == ["--help", "-h", "exact", "measure"]
    assert offered("train", "--prompts") == ["--prompts-per-step"]
    assert offered("sft", "--estimator") == []  # each command has its own flags
    assert set(PRESETS) <= set(offered("train", "--estimator", ""))
    assert offered("train", "--quiet", "--estimator", "gs") == ["gspo"]
    assert offered("control", "--agent", "c") == ["classic"]
    assert offered("train", "--task", "da") == ["data.jsonl"]


@pytest.mark.parametrize(
    "command, flags", [("lab exact", "--figure --json"), ("lab measure", "--probes --layers")]
)
def test_the_second_word_of_lab_decides_its_flags(command, flags, offered):
    found = {flag for flag in offered(*command.split(), "--") if flag in flags.split()}
    assert found == set(flags.split())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts(shell, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert not exit.value.code and "reward-model" in script and "prompts-per-step" in script
    assert "compopt" not in script


@pytest.mark.parametrize("shell", [["tcsh"], []])
def test_a_shell_without_a_script_is_refused(shell, capsys):
    assert main(["--print-completion", *shell]) == 2
    assert "one of bash, zsh, fish" in capsys.readouterr().err
