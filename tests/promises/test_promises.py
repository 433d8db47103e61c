"""Every promise holds for every capability, also where two meet: a row of `covering()` is a run of several.

A promise is a function of a workshop, a row and a patch. `python tests/promises/test_promises.py` prints the matrix.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest

sys.path[:0] = map(str, Path(__file__).parents[1:3])  # where this is the program

import pyarrow.parquet as parquet  # noqa: E402
from refusals import refused  # noqa: E402

from tests.promises.capabilities import CAPABILITIES, REFUSED, covering, pair, pairs  # noqa: E402
from tests.resume.killing import Moment, equal, left  # noqa: E402
from tokenrl.cli import COMMANDS, main  # noqa: E402
from tokenrl.flags import parse  # noqa: E402
from tokenrl.lab import measure_bias  # noqa: E402
from tokenrl.lab.compare.equality import check_equal  # noqa: E402
from tokenrl.language.training import check, loop  # noqa: E402
from tokenrl.language.training.learner import Learner  # noqa: E402
from tokenrl.runs.metric_table import metric_of  # noqa: E402
from tokenrl.runs.reader import read_run  # noqa: E402
from tokenrl.runs.side_by_side import differences  # noqa: E402

ROWS = covering()
THIRD = Moment("runs/session.py:record", 3)


def rows_of(directory):
    """The metrics of training, by step."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{n: x for n, x in row.items() if not n.startswith("eval_")} for row in lines]


def completions_of(directory, step):
    return parquet.read_table(directory / f"completions/step_{step:06d}.parquet").to_pylist()


def goes_on_after_a_kill(workshop, row, patch):
    directory, codes = workshop.run(row, "killed", moments=[THIRD])
    assert codes == {-9}
    assert workshop.run(row, "killed", "--resume", "auto")[1] == {0}, workshop.nursery.said
    equal(left(directory), left(workshop.whole(row)), workshop.nursery.said)


def goes_on_after_its_end_with_its_own_code_alone(workshop, row, patch):
    """The evaluation at the end of a run leaves nothing behind; with other code the run does not go on."""
    directory, codes = workshop.run(row, "ended", "--max-steps", "3")
    assert codes == {0}
    text = (workshop.folder / "mine.py").read_text()
    with workshop.with_file("mine.py", text + "\n# changed\n"):
        assert workshop.run(row, "ended", "--resume", "auto")[1] == {2}
    assert "module mine" in workshop.nursery.said
    assert workshop.run(row, "ended", "--resume", "auto")[1] == {0}, workshop.nursery.said
    equal(left(directory), left(workshop.whole(row)), workshop.nursery.said)


def learns_the_same_beside_rude_code_and_other_evaluations(workshop, row, patch):
    """What user code does to its arguments and to its libraries changes no number."""
    options = (
        () if "counting reward" in row else ("--eval-every", "1")
    )  # which spend what it counts
    with workshop.with_file("rude"):
        directory, codes = workshop.run(row, "rude", *options)
    assert codes == {0}, workshop.nursery.said
    assert rows_of(directory) == rows_of(workshop.whole(row))


def makes_the_update_in_two_processes(workshop, row, patch):
    directory, codes = workshop.run(row, "shared", "--max-steps", "3", processes=2)
    if codes == {2}:
        assert "start one process" in workshop.nursery.said
        return
    assert codes == {0}, workshop.nursery.said
    here, there = (rows_of(path)[1] for path in (directory, workshop.whole(row)))
    assert here.keys() == there.keys()
    for name in there.keys() - {"padding"}:
        assert here[name] == pytest.approx(there[name], rel=1e-3, abs=1e-5), name


def tells_a_failure_of_code(workshop, row, patch):
    with workshop.with_file("fails"):
        _, codes = workshop.run(row, "failed")
    printed = workshop.nursery.said.rpartition("tokenrl: ")[2]
    assert codes <= {1, 2} and "Traceback" not in printed
    assert "told why" in printed or "abstained from every completion" in printed


def executes_no_code_of_a_stranger(workshop, row, patch):
    run = workshop.whole(row)
    patch.setenv("XDG_CONFIG_HOME", str(workshop.folder / "stranger"))
    patch.chdir(workshop.folder)
    with refused("names code that is not executed: .*mine.py"):
        parse("train", COMMANDS["train"], ["--config", str(run), "--output-dir", "theirs"])


def shows_a_verdict_what_its_code_is(workshop, row, patch):
    """Other code within an arm is refused; between arms that of the reward is, and that of an estimator is listed."""
    run = read_run(workshop.whole(row))
    hashes = run.config["hashes"]
    fields = {text.rpartition(":")[0] for text in map(str, run.config.values())}
    assert "module mine" in hashes or not fields & {"mine.py"}
    for name in hashes:
        edited = replace(run, config={**run.config, "hashes": {**hashes, name: "0"}})
        with refused("Runs of one arm differ in their seeds alone|have the same task, reward"):
            check_equal([("a", run), ("a", edited)])
        assert list(differences({"a": run, "b": edited}).index) == [f"hash of {name}"]


def names_its_metrics_in_the_table(workshop, row, patch):
    for metrics in rows_of(workshop.whole(row)):
        for name in metrics:
            assert name == "step" or metric_of(name).meaning, name


def declares_its_bias(workshop, row, patch):
    patch.chdir(workshop.folder)
    args = parse("train", COMMANDS["train"], workshop.words(row, "none")[1:])
    verdict = measure_bias(args.estimator)
    assert verdict.ok, verdict


def tries_its_update_in_a_check(workshop, row, patch):
    """The numbers of a check are those of the first step; where a critic learns first, it updates the policy too."""
    records = []
    step = check.training_step
    patch.setattr(check, "training_step", lambda *args: records.append(step(*args)) or records[-1])
    patch.chdir(workshop.folder)
    assert main([*workshop.words(row, "checked"), "--check"]) in (0, 2)
    (record,) = records
    first = rows_of(workshop.whole(row))[1]
    of_policy = ("loss", "grad_norm", "grad_clipped", "padding", "clip_ratio")
    for name, value in record.metrics.items():
        if name.startswith("sampling/") or (name in of_policy and "critic first" in row):
            continue
        assert value == first[name] or math.isnan(value), name
    assert (record.metrics["grad_norm"] > 0) == ("best of n" not in row)


def shows_the_weights_of_its_gradient(workshop, row, patch):
    """The weights of tokens in tables are in proportion to the gradient by the log-probabilities, by autograd.

    In the third step, where prompts are weighted, old rows are replayed, and the critic has learnt alone.
    """
    latest = []
    scored = []
    divide, score, make = Learner.micro_batches, Learner.score, loop.training_step

    def divided(self, rows, *args, **options):
        for index in divide(self, rows, *args, **options):
            latest[:] = [rows, index]
            yield index

    def with_gradient(self, part):
        scores = score(self, part)
        scores.logprobs.retain_grad()
        rows, index = latest
        is_shown = rows.valid | ~rows.replayed
        numbers = is_shown.cumsum(0)[index] - 1  # in the table
        scored.append((numbers.tolist(), scores.logprobs))
        return scores

    patch.setattr(loop, "training_step", lambda *args: scored.clear() or make(*args))
    patch.setattr(Learner, "micro_batches", divided)
    patch.setattr(Learner, "score", with_gradient)
    patch.chdir(workshop.folder)
    directory = workshop.folder / f"shown {'-'.join(row)}"
    assert main([*workshop.words(row, directory), "--max-steps", "3"]) == 0
    if "best of n" in row:
        assert not scored
        return
    table = completions_of(directory, 3)
    ratios = []
    learnt = set()
    for numbers, logprobs in scored:
        if learnt & {*numbers}:
            break  # a later pass has other weights
        learnt |= {*numbers}
        for number, gradient in zip(numbers, logprobs.grad, strict=True):
            tokens = table[number].get("tokens/weight")
            for weight, slope in zip(tokens or (), gradient.tolist(), strict=False):
                if not math.isnan(weight) and abs(weight) > 1e-4:
                    ratios.append(slope / weight)
        if "several updates" in row:
            break  # a later update has other ratios, and other rows
    assert ratios and ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)
    assert ratios[0] < 0


def counts_nothing_twice(workshop, row, patch):
    """The mean reward of a step is that of its new completions which have one."""
    directory = workshop.whole(row)
    for step, metrics in enumerate(rows_of(directory)[1:], 1):
        new = [row for row in completions_of(directory, step) if not row.get("replayed")]
        rewards = [row["reward"] for row in new if row["reward"] is not None]
        assert metrics["reward"] == pytest.approx(fmean(rewards), rel=1e-6)


PROMISES = [
    goes_on_after_a_kill,
    goes_on_after_its_end_with_its_own_code_alone,
    learns_the_same_beside_rude_code_and_other_evaluations,
    makes_the_update_in_two_processes,
    tells_a_failure_of_code,
    executes_no_code_of_a_stranger,
    shows_a_verdict_what_its_code_is,
    names_its_metrics_in_the_table,
    declares_its_bias,
    tries_its_update_in_a_check,
    shows_the_weights_of_its_gradient,
    counts_nothing_twice,
]


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("row", ROWS, ids=[f"row{number}" for number in range(len(ROWS))])
def test_a_promise_holds_where_capabilities_meet(workshop, row, promise, monkeypatch):
    assert promise(workshop, row, monkeypatch) is None


def test_each_two_capabilities_meet_once_or_are_refused():
    met = {pair(*each) for row in ROWS for each in combinations(row, 2)}
    assert met >= {*pairs()}
    slots = {name: each.slot for name, each in CAPABILITIES.items()}
    others = {pair(a, b) for a, b in combinations(slots, 2) if slots[a] != slots[b]}
    assert others - met == {*REFUSED}
    code = (Path(__file__).with_name("mine.py")).read_text()
    assert all(each.code in code for each in CAPABILITIES.values())


@pytest.mark.slow
@pytest.mark.parametrize("names", REFUSED, ids="-".join)
def test_a_pair_that_cannot_meet_is_refused_in_words(workshop, names):
    assert workshop.run(names, "refused")[1] == {2}
    assert REFUSED[names] in " ".join(workshop.nursery.said.split())


class Matrix:
    """Counts for each capability, by promise, in how many of its rows the promise holds, as pytest tests it."""

    def __init__(self):
        self.held = {}

    def pytest_runtest_logreport(self, report):
        _, bracket, words = report.nodeid.partition("[row")
        if report.when == "call" and bracket:
            number, _, promise = words.rstrip("]").partition("-")
            self.held[int(number), promise] = report.passed

    def print(self):
        names = [promise.__name__ for promise in PROMISES]
        for number, name in enumerate(names, 1):
            print(f"{number:3} {name.replace('_', ' ')}")
        width = max(map(len, CAPABILITIES))
        print(" " * width, *(f"{number:>6}" for number in range(1, len(names) + 1)))
        for capability in CAPABILITIES:
            rows = [number for number, row in enumerate(ROWS) if capability in row]
            cells = [f"{sum(self.held[row, name] for row in rows)}/{len(rows)}" for name in names]
            print(f"{capability:{width}}", *(f"{cell:>6}" for cell in cells))


if __name__ == "__main__":
    matrix = Matrix()
    pytest.main([__file__, "-m", "slow", "-k", "where_capabilities_meet"], plugins=[matrix])
    matrix.print()
