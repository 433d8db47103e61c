"""Shell completion: tyro's script knows the commands, their flags and the values of choices."""

import pytest

from tokenrl.cli import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert not exit.value.code
    assert all(word in script for word in ("reward-model", "prompts-per-step", "probes", "gspo", "classic"))


def test_a_shell_without_a_script_is_refused(capsys):
    for shell in (["tcsh"], []):
        assert main(["--print-completion", *shell]) == 2
        assert "one of bash, zsh, fish" in capsys.readouterr().err
