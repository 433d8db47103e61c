"""Makes the tables and figures of the study again from the raw tables; or everything, from nothing.

    python recipes/study/rebuild.py                   tables of README.md and figures, in seconds
    python recipes/study/rebuild.py --from-nothing    says how long the runs take, makes them, then the same
    python recipes/study/rebuild.py --parts 1_sort_digits    the runs of one part, then the same

The runs of a part are those of `tokenrl compare --config recipes/study/PART.yaml`; killed and started again,
they go on where they were. The raw tables hold one row for each run, and the curves of its evaluations. The
verdicts are computed from them by the same code as in `tokenrl compare`. A task without tables is left out.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tyro
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

import tokenrl
from tokenrl.lab import judge_scores, measure_gradients
from tokenrl.language import load_task, warm_started_base
from tokenrl.runs import read_run

STUDY = Path(__file__).parent
TABLES = STUDY / "tables"
TASKS = ("sort_digits", "reverse_text")
MARGIN = 0.02
COLOURS = {"better": "#007a58", "worse": "#c24e00", "equivalent": "#0072b2", "undecided": "#77777f"}


class Part(NamedTuple):
    """A comparison, judged from its raw tables."""

    family: Any
    runs: pd.DataFrame
    curves: pd.DataFrame


def run(part: str) -> None:
    """Make the runs of a comparison that are not there yet, and keep its raw tables."""
    found: Any = tokenrl.compare(**yaml.safe_load((STUDY / f"{part}.yaml").read_text()))
    folder, table = TABLES / part, found.table
    folder.mkdir(parents=True, exist_ok=True)
    seconds = [read_run(found.output_dir / path).summary.get("wall_seconds") for path in table.runs["path"]]
    table.runs.assign(seconds=seconds).to_csv(folder / "runs.csv", index=False)
    table.curves[table.curves["role"] != "tuning"].to_csv(folder / "curves.csv", index=False)
    shutil.copy(found.output_dir / "comparison.json", folder)


@cache
def read(part: str) -> Part:
    """Judge a comparison from its raw tables."""
    runs, curves = (pd.read_csv(TABLES / part / f"{name}.csv") for name in ("runs", "curves"))
    ours, again = runs[runs["role"] == "comparison"], runs[runs["role"] == "itself"]
    itself = {task: of.set_index("seed")["area"].to_dict() for task, of in again.groupby("problem")}
    (family,) = judge_scores(ours, metric="area", margin=MARGIN, itself=itself).families
    return Part(family, ours, curves[curves["role"] == "comparison"])


def rates(axes: Axes, task: str) -> str:
    """Question 1: the differences to rloo, filled at each arm's own rate, hollow at one rate for all."""
    parts = [read(part) for part in (f"1_{task}", f"1_{task}_fixed") if (TABLES / part).exists()]
    chosen, rows = parts[0].runs.groupby("arm")["learning_rate"].first(), []
    greedy = judge_scores(parts[0].runs, metric="area_greedy").families[0].against_reference
    for each in zip(*(part.family.arms for part in parts), strict=True):
        arm = each[0].arm
        cells = [f"`{arm}`", tokenrl.Estimator.preset(arm).bias_status, f"{chosen[arm]:g}"]
        for scores, part in zip(each, parts, strict=True):
            against = part.family.against_reference.get(scores.arm)
            told = (against.apart, against.verdict) if against else ("", "reference")
            cells += [f"{scores.mean:.3f}", *told]
        rows.append([*cells, greedy[arm].apart if arm in greedy else ""])
    axes.axvspan(-MARGIN, MARGIN, color="#dcdce0", lw=0)
    axes.axvline(0, color="#5f5f66", lw=1)
    for part, up, fill in zip(parts, (0.14, -0.14), (True, False), strict=False):
        for place, one in enumerate(part.family.against_reference.values()):
            colour, ends = COLOURS.get(one.verdict, "black"), one.adjusted
            axes.plot([ends.low, ends.high], [place - up] * 2, color=colour, lw=2 if fill else 1)
            axes.plot(one.mean.value, place - up, "o", color=colour, mfc=colour if fill else "white", ms=7)
    others = list(parts[0].family.against_reference)
    axes.set_yticks(range(len(others)), others)
    axes.set_ylim(len(others) - 0.5, -0.5)
    at_one = " (filled), all at 2e-4 (hollow)" * (len(parts) - 1)
    axes.set_title(f"{task}: each arm at its own best rate{at_one}", loc="left", size=10)
    axes.set_xlabel("area minus that of rloo (grey: within the margin)")
    heads = ["arm", "declared bias", "own rate", "area", "against rloo", "verdict"]
    heads += ["area at 2e-4", "against rloo", "verdict"] * (len(parts) - 1)
    return table([*heads, "greedy area against rloo, own rate (exploratory)"], rows)


def entropy(axes: Axes, task: str) -> str:
    """Question 3: one curve R = -a exp(H) + b for all arms, and what each arm leaves over."""
    family, _, curves = read(f"1_{task}")
    curves, labels = curves.query("samples > 0 and entropy == entropy"), [arm.arm for arm in family.arms]
    over = {}
    basis = np.column_stack([-np.exp(curves["entropy"]), np.ones(len(curves))])
    for score in ("reward_greedy", "reward"):
        (a, b), *_ = np.linalg.lstsq(basis, curves[score], rcond=None)
        left = curves[score] - basis @ (a, b)
        over[score] = left.groupby([curves["arm"], curves["path"]]).mean()
    heats = np.linspace(curves["entropy"].min(), curves["entropy"].max(), 100)
    axes.plot(heats, b - a * np.exp(heats), color="black", lw=1)
    error, rows = float(np.sqrt((left**2).mean())), []
    last = curves[curves["samples"] == curves["samples"].max()].groupby("arm")["entropy"].mean()
    for arm in labels:
        found = {score: interval(of[arm], 0.05 / len(labels)) for score, of in over.items()}
        _, low, high = found["reward"]
        says = "on the curve" if low > -MARGIN and high < MARGIN else "undecided"
        says = "off the curve" if low > MARGIN or high < -MARGIN else says
        words = {score: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one) for score, one in found.items()}
        rows.append([f"`{arm}`", f"{last[arm]:.3f}", words["reward"], says, words["reward_greedy"]])
        each = curves[curves["arm"] == arm].groupby("samples")[["entropy", "reward"]].mean()
        axes.plot(each["entropy"], each["reward"], "o-", ms=3, lw=1, label=arm)
    axes.set_title(f"{task}: R = {b:.2f} - {a:.2f} exp(H), error {error:.3f}", loc="left", size=10)
    axes.set_xlabel("entropy H of a token, nats")
    axes.set_ylabel("held-out sampled reward R")
    axes.legend(fontsize=8, frameon=False)
    heads = ["arm", "entropy at the end", "reward left over", "verdict", "greedy reward left over"]
    return table(heads, rows)


def measure(task: str) -> None:
    """Question 6: measure the noise of every arm, at the start of a task and half way."""
    (family, runs, _), rows = read(f"1_{task}"), []
    half: dict[str, Any] = {"learning_rate": float(runs[runs["arm"] == "rloo"]["learning_rate"].iloc[0])}
    half |= {"output_dir": f"runs/study/6_half_way/{task}", "overwrite": True, "quiet": True}
    tokenrl.train(task=task, max_steps=50, eval_every=50, lr_scheduler_type="constant", **half)
    for policy, model in (("start", warm_started_base(load_task(task))), ("half way", half["output_dir"])):
        how: dict[str, Any] = {"num_prompts": 512, "prompts_per_step": 16, "num_generations": 8}
        how |= {"estimators": tuple(arm.arm for arm in family.arms)}
        for one in measure_gradients(task=task, model=str(model), **how).estimators:
            cells = {"policy": policy, "arm": one.estimator, "bias": one.declared, "noise": one.noise.value}
            rows.append(cells | {"low": one.noise.low, "high": one.noise.high, "cosine": one.cosine.value})
    pd.DataFrame(rows).to_csv(TABLES / f"1_{task}" / "noise.csv", index=False)


def noise(axes: Axes, task: str) -> str:
    """Question 6: the noise of each arm beside its area, with the rank correlation over arms."""
    family, rows = read(f"1_{task}").family, []
    measured = pd.read_csv(TABLES / f"1_{task}" / "noise.csv").set_index(["policy", "arm"])
    for arm in family.arms:
        here, before = measured.loc[("half way", arm.arm)], measured.loc[("start", arm.arm)]
        cells = [f"`{arm.arm}`", here["bias"], f"{before['noise']:.3g}"]
        rows.append([*cells, "{noise:.3g} [{low:.3g}, {high:.3g}]".format(**here), f"{arm.mean:.3f}"])
        axes.plot(here["noise"], arm.mean, "o", color="#0072b2" if here["bias"] == "exact" else "#c24e00")
        axes.annotate(arm.arm, (here["noise"], arm.mean), (5, 4), textcoords="offset points", fontsize=8)
    heard = [measured.loc[("half way", arm.arm), "noise"] for arm in family.arms]
    found = rank_correlation(np.array(heard), np.array([arm.mean for arm in family.arms]))
    axes.set_title(
        "{}: rank correlation {:+.2f} [{:+.2f}, {:+.2f}]".format(task, *found), loc="left", size=10
    )
    axes.set_xlabel("noise of a step's gradient half way: variance / squared signal (blue: unbiased)")
    axes.set_ylabel("area at its own rate")
    return table(["arm", "declared bias", "noise at the start", "noise half way", "area"], rows)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return Spearman's correlation with a 95 % interval from 10,000 resamplings of the arms."""
    rng, found = np.random.default_rng(0), []
    for _ in range(10_000):
        take = rng.integers(0, len(x), len(x))
        if len(set(x[take])) > 1 and len(set(y[take])) > 1:
            found.append(np.corrcoef(stats.rankdata(x[take]), stats.rankdata(y[take]))[0, 1])
    return float(stats.spearmanr(x, y)[0]), *(float(end) for end in np.quantile(found, [0.025, 0.975]))


def interval(values: Sequence[float], alpha: float) -> tuple[float, float, float]:
    """Return the mean of some runs with its Student-t interval."""
    mean = float(np.mean(values))
    half = float(stats.sem(values) * stats.t.ppf(1 - alpha / 2, len(values) - 1))
    return mean, mean - half, mean + half


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def rebuild(page: Path, figures: Path) -> None:
    """Write the tables of the page between its marks, and the figures, of the tasks that have raw tables."""
    text, tasks = page.read_text(), [task for task in TASKS if (TABLES / f"1_{task}").exists()]
    figures.mkdir(exist_ok=True)
    for number, make in ((1, rates), (3, entropy), (6, noise)):
        figure = Figure((6 * len(tasks) + 1, 4.6), layout="constrained")
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            mark, body = f"<!-- table {number} {task} -->\n", make(axes, task)
            axes.spines[["top", "right"]].set_visible(False)
            assert mark in text, f"the page has no {mark}"
            before, _, after = text.partition(mark)
            text = f"{before}{mark}{body}\n" + re.sub(r"\A(\|.*\n)*", "", after)
        figure.savefig(figures / f"{number}_{make.__name__}.png", dpi=110, metadata={"Software": None})
    page.write_text(text)


def main(from_nothing: bool = False, parts: tuple[str, ...] = ()) -> None:
    """Rebuild the study.

    Args:
        from_nothing: make all runs first; those that are there in runs/study are kept.
        parts: make the runs of these parts first, such as 1_sort_digits.
    """
    if from_nothing:
        seconds = [pd.read_csv(path)["seconds"].sum() for path in TABLES.glob("*/runs.csv")]
        print(f"The runs took {sum(seconds) / 3600:.1f} hours of one processor where the tables were made.")
        parts = tuple(sorted(path.stem for path in STUDY.glob("*.yaml")))
    for part in parts:
        run(part)
        if part.removeprefix("1_") in TASKS:
            measure(part.removeprefix("1_"))
    rebuild(STUDY / "README.md", STUDY / "figures")


if __name__ == "__main__":
    tyro.cli(main)
