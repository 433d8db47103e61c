"""Runs that a program made by itself, and scores of any program: what is judged, what is listed, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean

import pytest
from command_line import completes
from folders import read_json
from made_runs import FINISHED, noise, rising, write_run
from refusals import refused, stopped

from tokenrl.cli import main
from tokenrl.files import write_json
from tokenrl.lab import judge_recorded, judge_scores
from tokenrl.runs.directory import RunDirectory

NOISE = (-0.03, 0.01, 0.02, -0.01, 0.03, -0.02)
USUAL = {
    "kind": "train",
    "task": "sort_digits",
    "reward": "rewards.py:right",
    "reward_weights": [],
    "estimator": {"baseline": "mine.py:half", "scale": "none"},
    "learning_rate": 0.1,
    "target_kl": None,
    "eval_split": None,
    "max_steps": 50,
    "eval_every": 10,
    "hashes": {
        "data": "1",
        "base model": "2",
        "reward": "right 3",
        "module rewards": "4",
        "module mine": "5",
    },
}


@pytest.fixture
def kinds(workplace):
    """Makes six runs of each kind, which end at .5 and at .7; `changes` are those of a kind, or of a run of it."""

    def make(**changes):
        for kind, end in (("old", 0.5), ("new", 0.7)):
            for seed, shift in enumerate(NOISE):
                own = changes.get(kind, {}) | changes.get(f"{kind}{seed}", {})
                config = USUAL | {"seed": seed, "threads": 1, "output_dir": f"{kind}{seed}"} | own
                run = rising(end + shift * (1 + (kind == "new")))(seed)
                write_run(Path(f"{kind}{seed}"), config=config, **run)
        return [f"old{seed}" for seed in range(6)], [f"new{seed}" for seed in range(6)]

    return make


def changed(**hashes):
    return {"hashes": USUAL["hashes"] | {n.replace("_", " "): x for n, x in hashes.items()}}


def test_the_candidate_is_judged_and_what_differs_is_listed(kinds, capsys):
    """A setting that is null on one side differs too, as does the code that an estimator names."""
    edited = {"learning_rate": 0.2, "target_kl": 0.1, **changed(module_mine="6")}
    old, new = kinds(new=edited, new2={"threads": 4})
    judged = judge_recorded(old, new)
    (difference,) = judged.judgement.families[0].differences
    gaps = []
    for seed, shift in enumerate(NOISE):
        before, after = (
            fmean(rising(end + shift * factor)(seed)["rewards"][1:])
            for end, factor in ((0.5, 1), (0.7, 2))
        )
        gaps.append(after - before)
    assert difference.verdict == "better"
    assert difference.adjusted.value == pytest.approx(fmean(gaps))
    listed = judged.settings.to_dict("index")
    assert listed == {
        "learning_rate": {"baseline": "0.1", "candidate": "0.2"},
        "target_kl": {"baseline": "None", "candidate": "0.1"},
        "hash of module mine": {"baseline": "5", "candidate": "6"},
    }
    runs = f"judge --baseline {' '.join(old)} --candidate {' '.join(new)} --json verdict.json"
    codes = [main(f"{runs} --require {words}:candidate".split()) for words in ("better", "worse")]
    assert codes == [0, 3]
    record = read_json(Path("verdict.json"))
    assert record["settings"] == listed and record["schema"] == 1
    assert (record["comparisons"][0]["verdict"], record["comparisons"][0]["pairs"]) == ("better", 6)
    printed = capsys.readouterr().out
    assert "candidate is better than baseline" in printed and "hash of module mine" in printed


def test_each_score_of_a_comparison_can_decide(kinds):
    old, new = kinds(new={"learning_rate": 0.2})
    ends = {"area": 0.2 * 0.9, "reward": 0.2, "area_greedy": 0.2 * 0.9, "reward_greedy": 0.2}
    for metric, gap in ends.items():
        judgement = judge_recorded(old, new, metric=metric).judgement
        assert judgement.metric == metric
        found = judgement.families[0].differences[0].adjusted.value
        assert found == pytest.approx(gap, abs=0.005), metric
    with refused("metric was given as 'loss'; it must be one of area, reward"):
        judge_recorded(old, new, metric="loss")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (changed(data="0"), "hash of data: 1 and 0"),
        (changed(base_model="0"), "hash of base model"),
        (changed(reward="right 0"), "hash of reward"),
        (changed(module_rewards="0"), "hash of module rewards"),
        (changed(module_other="0"), "hash of module other"),
        ({"reward": "rewards.py:wrong"}, "reward: rewards.py:right and rewards.py:wrong"),
        ({"reward_weights": [2.0]}, "reward_weights"),
        ({"eval_split": "test"}, "eval_split: None and test"),
        ({"eval_every": 5}, "eval_every"),
        ({"max_steps": 60}, "max_steps"),
        ({"kind": "control", "env": "walk"}, "kind: train and control"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds_that_are_measured_by_other_things_are_refused(kinds, changes, words):
    old, new = kinds(old=changed(module_other="1"), new=changed(module_other="1") | changes)
    with refused(f"old0 and new0 cannot be compared, as they differ in {words}"):
        judge_recorded(old, new)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.3}, "as they differ in learning_rate: 0.1 and 0.3. Runs of one arm"),
        (changed(module_mine="0"), "as they differ in hash of module mine: 5 and 0. Runs of one"),
        ({"target_kl": 0.1}, "differ in target_kl: None and 0.1"),
        ({"seed": 2}, "seed 2, is there a second time"),
        ({"kind": "sft"}, "new3 holds no run of train or control"),
    ],
    ids=["a setting", "code", "a setting that was null", "a seed twice", "another command"],
)
def test_runs_of_one_kind_differ_in_their_seeds_alone(kinds, changes, words):
    with refused(words):
        judge_recorded(*kinds(new3=changes))


@pytest.mark.parametrize("kind", ["old", "new"])
def test_runs_that_have_not_ended_are_no_failures(kinds, kind):
    runs = kinds(new={"learning_rate": 0.2})
    judge_recorded(*runs)
    write_json(Path(f"{kind}1/summary.json"), {"exit_reason": "SIGTERM", "steps": 20})
    with refused(f"{kind}1 has not ended: SIGTERM stopped it"):
        judge_recorded(*runs)
    directory = RunDirectory(Path(f"{kind}1"), may_hold_run=True)
    with refused(f"{kind}1 has not ended: It is under way"):
        judge_recorded(*runs)
    directory.release()
    os.remove(f"{kind}1/summary.json")
    judged = judge_recorded(*runs).judgement.families[0]
    failed = {arm.arm: arm.failed for arm in judged.arms}
    names = {"old": "baseline", "new": "candidate"}
    assert failed == {name: (1,) if key == kind else () for key, name in names.items()}, (
        "a run that was killed broke off"
    )


def test_a_run_that_ended_early_counts_with_its_last_evaluation(workplace):
    """As in a comparison: the baseline ends after 20 of 50 steps, at the reward at which the candidate stays."""
    names = {"old": [], "new": []}
    for kind, count in (("old", 3), ("new", 6)):
        for seed in range(6):
            ends = {"exit_reason": "callback", "steps": 10 * (count - 1)}
            rewards = [0.0, 0.3, *[0.6 + noise(seed)] * 4][:count]
            names[kind].append(f"{kind}{seed}")
            config = USUAL | {"seed": seed}
            write_run(Path(names[kind][-1]), rewards, summary=FINISHED | ends, config=config)
    (difference,) = (
        judge_recorded(names["old"], names["new"], margin=0.01).judgement.families[0].differences
    )
    assert set(difference.differences.values()) == {0.0}


def test_what_cannot_be_judged_is_refused(kinds, refusal):
    old, new = kinds()
    with refused("of both: --baseline RUN"):
        judge_recorded(old, [])
    for kind in (old, new):
        for run in kind:
            write_json(Path(run, "summary.json"), {"exit_reason": "failed", "error": "No memory."})
            os.remove(f"{run}/metrics.jsonl")
            Path(run, "metrics.jsonl").write_text('{"step": 0}\n')
    with stopped("Nothing can be judged: no run has area. No memory."):
        judge_recorded(old, new)
    assert "Runs that exist are judged by tokenrl judge" in refusal(
        "compare", "--baseline", *old, "--candidate", *new
    )
    runs = ["--baseline", *old, "--candidate", *new]
    assert "and not both" in refusal("judge", *runs, "--scores", "scores.csv")
    assert "and not both" in refusal("judge")
    assert "'no.csv' cannot be read" in refusal("judge", "--scores", "no.csv")


def test_scores_of_another_program_are_judged_from_a_file(workplace, capsys):
    rows = [
        (arm, seed, "" if (arm, seed) == ("b", 7) else end + noise(seed, 0.002 * (1 + end)))
        for arm, end in (("a", 0.5), ("b", 0.9))
        for seed in range(8)
    ]
    lines = [f"{arm},{seed},{score},{score == ''}" for arm, seed, score in rows]
    Path("scores.csv").write_text("\n".join(["arm,seed,accuracy,failed", *lines]))
    words = "judge --scores scores.csv --metric accuracy --margin 0.02 --require better:b"
    completes(words)
    printed = capsys.readouterr().out
    table = [(arm, seed, score or 0.0) for arm, seed, score in rows]
    marked = [{"arm": a, "seed": s, "score": x, "failed": (a, s) == ("b", 7)} for a, s, x in table]
    (family,) = judge_scores(marked, margin=0.02).families
    assert family.headline() in printed and family.sentences()[0] in printed
    assert main([*words.split()[:-1], "worse:b"]) == 3
