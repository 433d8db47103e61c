"""Comparisons from the command to the report: made, locked, repeated, killed, on Ray; and their page."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import completes
from folders import read_json
from made_runs import WALK as PLANNED, compared, planned, rising, write_missing, write_run
from refusals import refused, stopped

import tokenrl
from tokenrl.cli import main
from tokenrl.errors import Interrupted
from tokenrl.files import model_directory as verified, write_json
from tokenrl.lab.compare import execution, loop
from tokenrl.lab.compare.execution import _write_settings
from tokenrl.lab.compare.loop import judge_directory
from tokenrl.runs.console import Console

SHORT = {"seeds": 2, "max_steps": 3, "num_envs": 4, "eval_every": 1, "eval_episodes": 4}
WALK = PLANNED | SHORT | {"arms": ("reinforce", "reinforce_timestep_mean")}


def tables_of(folder):
    """What the seeds determine."""
    return [(folder / name).read_bytes() for name in ("comparisons.csv", "runs.csv")]


def metrics(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("metrics.jsonl"))
    }


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "walk"
    return tokenrl.compare(**WALK, output_dir=folder), folder


@pytest.mark.slow
def test_a_comparison_leaves_plan_runs_tables_and_report(walk):
    comparison, folder = walk
    assert comparison.exit_code == 0
    assert comparison.judgement.verdicts() == {("walk", WALK["arms"][1]): "descriptive"}
    files = {"plan.json", "runs.csv", "comparisons.csv", "comparison.json", "report.html"}
    assert files <= set(os.listdir(folder))
    assert not any(path.stat().st_size for path in folder.rglob("*.log")), "nothing was printed"
    assert set(comparison.runs["state"]) == {"finished"}
    assert set(comparison.runs["samples"]) == {3 * 4}
    starts = {text.split(b"\n")[0] for name, text in metrics(folder).items() if "seed_0" in name}
    assert len(starts) == 1, "before training all arms are the same"


@pytest.mark.slow
def test_repeated_or_reported_it_runs_nothing_and_finds_the_same(walk):
    _, folder = walk
    before = tables_of(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}
    tokenrl.compare(**WALK, output_dir=folder)
    completes("report", str(folder))
    assert tables_of(folder) == before
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.jsonl")} == times
    with refused("another comparison"):
        tokenrl.compare(**{**WALK, "max_steps": 5}, output_dir=folder)


def test_a_comparison_is_locked_as_long_as_it_makes_its_runs(tmp_path, monkeypatch):
    settings = {**WALK, "output_dir": str(tmp_path / "found")}
    locked = "Another process works on the comparison"

    def execute(runs, root, **options):
        write_missing(runs, root)
        with refused(locked):
            tokenrl.compare(**settings)

    monkeypatch.setattr(loop, "execute", execute)
    assert set(tokenrl.compare(**settings).runs["state"]) == {"finished"}


def test_several_problems_are_planned_before_the_first_and_each_has_its_directory(
    workplace, monkeypatch, refusal
):
    monkeypatch.setattr(loop, "execute", write_missing)
    flags = "--arms reinforce a2c --seeds 2 --max-steps 3 --num-envs 4 --output-dir all --env walk"
    assert "CartPole-v7" in refusal("compare", *flags.split(), "CartPole-v7")
    assert not Path("all").exists()
    completes(f"compare {flags} bandit")
    assert {path.parent.name for path in Path("all").glob("*/report.html")} == {"walk", "bandit"}
    with refused("one task or one environment"):
        tokenrl.compare(env=("walk", "bandit"))


@pytest.fixture
def halves(workplace, monkeypatch):
    """Comparisons m0 and m1 of two seeds each that have ended, and `gathered(**options)` of all four seeds."""
    monkeypatch.setattr(loop, "execute", lambda *args, **options: None)
    hashes = {"data": "1", "base model": "2", "module mine": "3"}
    for first in (0, 2):
        plan = planned(WALK | {"first_seed": first, "output_dir": f"m{first // 2}"})
        for run in plan.runs({}):
            path = workplace / f"m{first // 2}" / run.path
            write_run(path, **rising(0.5)(run.seed), config={"hashes": hashes})
            _write_settings(run, workplace / f"m{first // 2}")
    sources = ("m0", "m1")

    def gathered(**options):
        return tokenrl.compare(
            **WALK | {"seeds": 4, "collect": sources, "output_dir": "all"} | options
        )

    return gathered


def test_runs_of_other_machines_are_copied_and_go_on_being_ordinary_runs(halves, said):
    planned(WALK | {"output_dir": "m2"})  # none of its runs has ended
    comparison = halves(quiet=False, collect=("m0", "m1", "m2"))
    assert set(comparison.runs["state"]) == {"finished"}
    printed = said()
    for name, count in (("m0", 4), ("m1", 4), ("m2", 0)):
        assert f"{count} of 8 runs copied from {name}" in printed
    assert not list(Path("all").rglob("manifest.json")), "its files may change"
    (run, *_) = Path("all").glob("runs/walk/*/seed_3")
    assert main(["report", str(run)]) == 0 and verified(run) == run


@pytest.mark.parametrize("name", ["data", "base model", "module mine"])
@pytest.mark.parametrize("where", ["m1", "all"])
def test_runs_with_other_code_data_or_models_are_refused_by_name(halves, name, where):
    """Whether they come from elsewhere or were made here; hashes that only some runs have say nothing."""
    if where == "all":
        halves()
    arm = "reinforce_timestep_mean"
    file = Path(where) / "runs/walk" / arm / "seed_2/config.json"
    config = read_json(file)
    write_json(file, config | {"hashes": config["hashes"] | {"module more": "4"}})
    if where == "all":
        halves()
    write_json(file, config | {"hashes": config["hashes"] | {name: "another"}})
    first = "runs/walk/reinforce/seed_0"
    words = f"{first} and all/runs/walk/{arm}/seed_2 cannot be compared, as they differ in hash of {name}"
    with refused(words):
        halves()
    if where == "all":
        with refused(words):
            judge_directory("all")


@pytest.mark.parametrize("name", ["run", "link", "pipe"])
def test_a_run_of_another_machine_with_a_link_or_a_pipe_is_refused(halves, workplace, name):
    """Whatever they lead to stays as private as it is."""
    private, run = workplace / "private", Path("m1/runs/walk/reinforce/seed_2")
    private.mkdir(0o700)
    if name == "run":
        run = run.rename(private / "run")
        Path("m1/runs/walk/reinforce/seed_2").symlink_to(run)
    elif name == "link":
        (run / "link").symlink_to(private)
    else:
        os.mkfifo(run / "pipe")
    with refused("is a link, a pipe or a device.*leave m1 out of collect"):
        halves()
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_copied_run_is_as_private_as_it_was(halves):
    run = Path("m1/runs/walk/reinforce/seed_2")
    (run / "config.json").chmod(0o600)
    halves()
    assert (Path("all") / run.relative_to("m1") / "config.json").stat().st_mode & 0o777 == 0o600


def test_runs_with_other_settings_are_not_collected(halves):
    file = Path("m1/runs/walk/reinforce/seed_2.json")
    write_json(file, read_json(file) | {"max_grad_norm": 7})
    with refused(
        "was made with other settings than this comparison has: max_grad_norm is 7 there and None here"
    ):
        halves()


class Sleeper:
    """A run that signals this process, and ends once it is asked to."""

    def __init__(self, words, log, environment):
        self.code = None
        os.kill(os.getpid(), signal.SIGTERM)

    def poll(self):
        return self.code

    def terminate(self):
        self.code = -15


def test_an_interrupted_comparison_lets_its_runs_save_and_begins_no_more(
    tmp_path, monkeypatch, said
):
    plan = planned(WALK | {"seeds": 3, "output_dir": str(tmp_path)})
    runs = plan.runs({})
    for run in runs[:2]:
        write_run(tmp_path / run.path, **rising(0.5)(run.seed))
    monkeypatch.setattr(execution, "start_process", Sleeper)
    with pytest.raises(Interrupted, match="SIGTERM: the runs under way were saved") as stopped:
        execution.execute(runs, tmp_path, workers=1, console=Console())
    assert stopped.value.exit_code == 143
    printed = said()
    assert f"run 3/6 {tmp_path / runs[2].path}: failed (exit code -15" in printed.replace("\n", "")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_half_way_and_started_again_it_finds_the_same_bit_for_bit(tmp_path):
    flags = (
        "--env walk --arms reinforce reinforce_timestep_mean --seeds 3 --max-steps 40 --num-envs 8"
    )
    words = [sys.executable, "-m", "tokenrl", "compare", *flags.split()]
    words.append("--output-dir")
    for number, ended in ((signal.SIGKILL, 1), (signal.SIGTERM, 3)):
        process = subprocess.Popen(
            [*words, "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=-1
        )
        while (
            len(list(tmp_path.glob("*/runs/*/*/*/summary.json"))) < ended and process.poll() is None
        ):
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), errors
        assert b"Traceback" not in errors
    for name in ("killed", "whole"):
        subprocess.run([*words, name], cwd=tmp_path, check=True, capture_output=True, timeout=900)
    assert tables_of(tmp_path / "whole") == tables_of(tmp_path / "killed")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


@pytest.mark.slow
def test_ray_finds_the_same_as_local_processes(walk, tmp_path):
    pytest.importorskip("ray")
    tokenrl.compare(**WALK, workers=2, output_dir=tmp_path / "walk", executor="ray")
    assert tables_of(tmp_path / "walk") == tables_of(walk[1])
    assert metrics(tmp_path / "walk") == metrics(walk[1])


def test_without_ray_its_own_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused("Install it with pip install ray, set RAY_ADDRESS"):
        tokenrl.compare(**WALK, output_dir=tmp_path / "walk", executor="ray")


@pytest.mark.slow
def test_a_run_that_breaks_is_counted_and_its_words_are_told(workplace, capsys):
    (workplace / "broken.py").write_text(
        "def reward(prompts, completions, **_):\n    raise KeyError('nothing')\n"
    )
    with stopped("KeyError: 'nothing'"):
        tokenrl.compare(
            task="sort_digits",
            reward="broken.py:reward",
            arms=("rloo", "grpo"),
            seeds=2,
            max_steps=1,
            eval_size=8,
            workers=2,
            output_dir="broken",
        )
    assert (
        "failed (exit code 2; broken/runs/sort_digits/rloo/seed_0.log)" in capsys.readouterr().out
    )


def test_a_dry_run_makes_nothing(tmp_path, said):
    tokenrl.compare(
        **WALK | {"quiet": False, "seeds": 6}, dry_run=True, output_dir=tmp_path / "dry"
    )
    assert "that a difference of 1.4 standard deviations of a paired difference" in said()
    assert not (tmp_path / "dry").exists()


@pytest.mark.drawn
def test_the_page_shows_the_verdict_first_and_every_difference(tmp_path):
    arms = {"reinforce": rising(0.5), "a2c": rising(0.6), "rloo": rising(0.52)}
    comparison = compared(tmp_path, arms, margin=0.05)
    completes("report", str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    headings = ["What was compared", "Differences", "<b>reward</b>", "<h2>Arms"]
    positions = [page.index(text) for text in (comparison.words.headline, *headings)]
    assert positions == sorted(positions)
    for text in ("better, +0.09", "equivalent, +0.0", "0 of 6 runs", "Student-t"):
        assert text in page, text
    assert "http://" not in page.replace("http://www.w3.org", "") and "src=" not in page
    assert str(tmp_path) not in page.split("The plan")[0], "a page can be given away"
