"""Output that cannot be written: no run is lost over it, and a command that is all output says so."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from tokenrl.cli import main
from tokenrl.errors import Stopped
from tokenrl.runs.output import UNREAD, Output, printing

GOES_ON = "nothing more can be printed"


def python(code, *, shell="{}", **options):
    """Run code in a process of its own, in a shell that says where its output goes."""
    command = shell.format('"$PYTHON" -c "$CODE"')
    environment = os.environ | {"PYTHON": sys.executable, "CODE": code}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


def command(arguments, shell):
    code = f"import sys; from tokenrl.__main__ import main; sys.argv[1:] = {arguments!r}; sys.exit(main())"
    return python(code, shell=shell)


def run(shell, *, needed=False):
    """Print 3,000 lines, as a run does; the last words go to stderr and the exit code is 7."""
    return python(
        "import sys\n"
        "from tokenrl.runs.output import *\n"
        "open_closed_streams()\n"
        f"with printing(needed={needed}):\n"
        "    for line in range(3000): print('a line of some length, so that a pipe is filled', line)\n"
        "    print('the end', file=sys.stderr)\n"
        "sys.exit(7)",
        shell=shell,
    )


@pytest.mark.parametrize("shell", ["{} >/dev/full", "{} | head -1", "{} | true"])
def test_a_run_goes_on_without_its_output_and_says_so_once(shell):
    done = run(shell)
    assert done.returncode == 7
    assert done.stderr.count(GOES_ON) == 1 and done.stderr.count("\n") == 2 and "the end\n" in done.stderr


@pytest.mark.parametrize(
    "shell", ["{} >/dev/full 2>/dev/full", "{} 2>&1 | true", "{} >&- 2>&-", "{} <&- >&-"]
)
def test_a_run_goes_on_where_nothing_can_be_said(shell):
    done = run(shell)
    assert done.returncode == 7 and done.stdout == "" and done.stderr in ("", "the end\n")


def test_what_is_needed_and_read_no_more_ends_quietly():
    done = run("{} | head -1", needed=True)
    assert done.returncode == UNREAD == 141
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize("unbuffered", ["", "PYTHONUNBUFFERED=1"])
def test_what_is_needed_and_cannot_be_written_stops(unbuffered):
    done = command(["--help"], unbuffered + " {} >/dev/full")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "tokenrl: The output could not be written ([Errno 28] No space left on device)"
    )


def test_the_help_of_a_training_is_needed():
    done = command(["train", "--help"], "{} >/dev/full")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "could not be written" in done.stderr


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import os; from tokenrl.runs.output import open_closed_streams; open_closed_streams()\n"
        f"file = open({str(tmp_path / 'f')!r}, 'w')\n"
        "os.write(1, b'noise'); os.write(2, b'noise'); print('noise')\n"
        "assert os.get_inheritable(1) and input is not None"
    )
    assert python(code, shell="{} <&- >&- 2>&-").returncode == 0
    assert (tmp_path / "f").read_text() == ""


def test_a_terminal_that_is_gone_ends_no_run(tmp_path):
    ours, theirs = os.openpty()
    code = (
        "import sys, time, pathlib\n"
        "from tokenrl.runs.console import Console\n"
        "from tokenrl.runs.output import undisturbed\n"
        "with undisturbed(quiet=False):\n"
        "    console = Console()\n"
        "    with console.progress(3) as progress:\n"
        "        assert console.rich.is_terminal\n"
        "        progress.update(1, {'reward': 1.0})\n"
        "        pathlib.Path('begun').touch()\n"
        "        while pathlib.Path('begun').exists(): time.sleep(0.01)\n"
        "        time.sleep(0.3)\n"  # the line is drawn again by a thread
        "        progress.update(2, {'reward': 1.0})\n"
        "    console.warn('lost')\n"
        "pathlib.Path('ended').touch()"
    )
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path,
        env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, os.read(ours, 10_000)
    os.close(ours)
    (tmp_path / "begun").unlink()
    assert process.wait() == 0 and (tmp_path / "ended").exists()


def test_characters_that_the_encoding_lacks_are_escaped():
    code = "from tokenrl.runs.output import printing\nwith printing(needed=False): print('0.9 ± 0.1')"
    done = python(code, shell="PYTHONIOENCODING=ascii {}")
    assert (done.returncode, done.stdout) == (0, "0.9 \\xb1 0.1\n")


def test_a_stream_without_a_descriptor_is_given_up_after_its_first_error():
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError("broken")

    failures = []
    output = Output(Broken(), failures.append)
    assert [output.write("a"), output.write("bc")] == [1, 2] and len(failures) == 1
    assert str(output.lost) == "broken"


def test_streams_come_back_and_an_error_of_the_block_passes_through(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), printing(needed=True):
        print("said")
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "said\n"


def test_an_error_of_another_file_is_not_taken_for_one_of_the_output():
    with pytest.raises(OSError, match="No space left"), printing(needed=True), open("/dev/full", "w") as full:
        full.write("a")
    with pytest.raises(Stopped, match="output could not be written"), open("/dev/full", "w") as full:
        before, sys.stdout = sys.stdout, full
        try:
            with printing(needed=True):
                print("a")
        finally:
            sys.stdout = before


def test_a_working_directory_that_was_deleted_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "x").rmdir()
    assert main(["lab", "exact"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "The current working directory cannot be used" in said
    assert main(["--version"]) == 0
