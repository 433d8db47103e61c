"""Computes the cells of the study's tables again from the raw tables, and says which of them do not hold.

    python recipes/study/verify.py     each row of the tables of questions, in a minute

It shares nothing with `tokenrl compare`: intervals are scipy's, and simulated for questions 7, 12 and 13
(`intervals.py`). The function of a question yields the label of a row, with its next cells that are not empty.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from intervals import (
    MARGIN,
    Interval,
    at_best_rates_of_others,
    at_one_rate,
    at_own_rates,
    bases_at_large,
    chosen,
    fit_curve,
    half_widths,
    pairs_needed,
    peak,
    resampled,
    side,
    student,
)
from printed import manifest, sections, wrong_rows
from survival import formulas

TABLES = Path(__file__).parent / "tables"
LANGUAGE = ("1_sort_digits", "1_reverse_text")
"""The parts of question 1 that questions 3, 6 and 10 take up again."""
CLIPS = ("none", ".2", ".2/.28", "CISPO", "sequence")  # the arms of question 5, as planned
Numbers = Iterator[tuple[str, ...]]


@cache
def runs(part: str) -> pd.DataFrame:
    """Return the runs of a part without those for tuning; an arm keeps the settings that name it."""
    table = pd.read_csv(TABLES / part / "runs.csv").query("role == 'comparison'")
    arms = table["arm"].str.rpartition(":")[2]
    return table.assign(arm=arms.str.replace(",(optimizer|learning_rate)=.*", "", regex=True))


@cache
def curves(part: str) -> pd.DataFrame:
    """Return the evaluations of these runs but the first, with the arm and seed of each."""
    table = pd.read_csv(TABLES / part / "curves.csv").query("samples > 0").drop(columns="arm")
    return table.merge(runs(part)[["path", "arm", "seed"]], on="path")


def by_seed(table: pd.DataFrame, metric: str = "area") -> pd.DataFrame:
    """Return the scores of runs by seed, with a column for each arm in the order of the plan."""
    return table.pivot(index="seed", columns="arm", values=metric)[table["arm"].unique()]


def gaps(scores: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """Return the score of each other arm minus that of the reference, the first by default, by seed."""
    reference = reference or scores.columns[0]
    return scores.drop(columns=reference).sub(scores[reference], axis="index")


def against(gaps: pd.DataFrame | Mapping[str, pd.Series]) -> dict[str, Interval]:
    """Return the interval of each difference; they are one family."""
    return {arm: student(gaps[arm], len(gaps.keys())) for arm in gaps}


def cells(mean: float, gaps: Mapping[str, Interval], margin: float = MARGIN, form: str = ".3f"):
    """Yield the cells of rloo, which is the reference, and of the other arms."""
    yield "rloo", f"reference, {mean:{form}}"
    yield from ((arm, gap.cell(margin)) for arm, gap in gaps.items())


def tuned(*parts: str, margin: float = MARGIN, form: str = ".3f") -> Numbers:
    """Questions 1 and 8: the differences to rloo of parts, each arm at its own rate."""
    for part in parts:
        rates, areas = (by_seed(runs(part), metric) for metric in ("learning_rate", "area"))
        for arm, cell in cells(areas["rloo"].mean(), against(gaps(areas)), margin, form):
            yield arm, f"{cell}, at {rates[arm].mean():g}"


def division() -> Numbers:
    """Question 2: the area with the division by the standard deviation minus that without, in every cell."""
    tables = {}
    for kind in ("adamw_8", "adamw_2", "sgd_8", "sgd_2"):
        optimiser, _, size = kind.partition("_")
        for task, table in runs(f"2_{kind}").groupby("problem", sort=False):
            tables[f"{optimiser}, G = {size}, {task.rpartition(':')[2]}"] = table
    areas, ends = (
        {label: gaps(by_seed(table, metric))["grpo"] for label, table in tables.items()}
        for metric in ("area", "reward")
    )
    for label, table in tables.items():
        rates = (f"{x:g}" for x in by_seed(table, "learning_rate").mean())
        yield label, *rates, against(areas)[label].cell(), against(ends)[label].text()


def entropy() -> Numbers:
    """Question 3: what each arm leaves over of the one curve of all arms, and how its own slope differs."""
    for part in LANGUAGE:
        table = curves(part).dropna(subset="entropy")
        left = table["reward"] - np.polyval(fit_curve(table), np.exp(table["entropy"]))
        runs_of_arms = table.assign(left=left).groupby(["arm", "seed"])
        means = runs_of_arms["left"].mean().unstack(0)
        slopes = -pd.Series({run: fit_curve(rows)[0] for run, rows in runs_of_arms}).unstack(0)
        steeper = against(gaps(slopes, "rloo"))
        for arm, gap in against(means).items():
            verdict = "on the curve" if gap.verdict() == "equivalent" else "undecided"
            slope = f"rloo has {slopes['rloo'].mean():.2f}"
            slope = steeper[arm].text() if arm in steeper else slope
            yield arm, f"{gap.text()} {verdict}", slope


def last_entropy(part: str) -> pd.DataFrame:
    """Return the entropy at the last evaluation by seed and arm."""
    table = curves(part)
    return by_seed(table[table["samples"] == table["samples"].max()], "entropy")


def signs() -> Numbers:
    """Question 4: area and pass@8 with positive and negative advantages weighted."""
    for part in ("4_sort_digits", "4_countdown"):
        passed = pd.read_csv(TABLES / part / "pass8.csv").query("arm != 'base'")
        passed = passed.assign(arm=passed["arm"].str.rpartition(":")[2])
        for scores in (by_seed(runs(part)), by_seed(passed, "pass@8")):
            yield from cells(scores["rloo"].mean(), against(gaps(scores)))
        yield from ((arm, f"{last:.3f}") for arm, last in last_entropy(part).mean().items())


def clipping() -> Numbers:
    """Question 5: the area of each way to clip, minus that without a ratio."""
    areas, rates, ends = {}, {}, {}
    for updates in (2, 4, 8):
        part, names = f"5_updates_{updates}", [f"{updates} updates, {name}" for name in CLIPS]
        rate, area = (by_seed(runs(part), metric) for metric in ("learning_rate", "area"))
        areas |= gaps(area.set_axis(names, axis=1)).items()
        rates |= dict(zip(names, rate.mean(), strict=True))
        last = gaps(last_entropy(part).set_axis(names, axis=1), names[1])
        ends |= {name: student(gap).text() for name, gap in last.items()}
    verdicts = against(areas)
    for label, rate in rates.items():
        verdict = verdicts[label].cell() if label in verdicts else "reference"
        yield label, f"{rate:g}", verdict
        if label in ends:
            yield label, ends[label]


def noise() -> Numbers:
    """Question 6: the noise of each arm at two policies."""
    for part in LANGUAGE:
        table = pd.read_csv(TABLES / part / "noise.csv")
        for x in table[~table["arm"].str.contains(" ")].itertuples():
            start = f"{x.noise:.3g}"
            yield x.arm, start if x.policy == "start" else f"{start} [{x.low:.3g}, {x.high:.3g}]"


def lora() -> Numbers:
    """Question 7: the best rate of each rank, and area and reward at the end against all weights."""
    samples = [np.arange(6), *np.random.default_rng(0).integers(0, 6, (10_000, 6))]  # six seeds
    full = runs("7_lora").query("arm == 'rloo'")
    for alpha, part in {"alpha = 2 rank": "7_lora", "alpha = 32": "7_lora_factor"}.items():
        arms, peaks = {}, {}
        for arm, of_arm in pd.concat([full, runs(part)]).groupby("arm", sort=False):
            by_rate = of_arm.drop_duplicates("path").pivot(index="learning_rate", columns="seed")
            label = re.sub(r"rloo,lora_r=(\d+).*", rf"rank \1, {alpha}", arm)
            arms[label] = np.array([by_rate["area"], by_rate["reward"]])
            means = (arms[label][0][:, seeds].mean(1) for seeds in samples)
            peaks[label] = np.array([peak(by_rate.index, areas) for areas in means])
        areas, ends = (
            dict(at_best_rates({arm: kinds[:n] for arm, kinds in arms.items()})) for n in (1, 2)
        )
        for label, best in peaks.items():
            if label != "rloo" or part == "7_lora":
                ratio = resampled(best / peaks["rloo"])
                row = label.replace("rloo", "all weights")
                yield row, resampled(best), ratio, areas[label], ends[label]


def at_best_rates(arms: Mapping[str, np.ndarray]) -> Numbers:
    """Return the cells of rloo and of the other arms, at the rates that are best in other units."""
    return cells(at_best_rates_of_others(arms["rloo"]).mean(), chosen(arms))


def zero_gaps() -> pd.DataFrame:
    """Return rloo minus constant baselines by base and seed, each at the rate best on the other seeds."""
    table = pd.read_csv(TABLES / "zero" / "runs.csv", dtype={"arm": str})
    folders = table["model"].str.split("/").str[3]
    table["base"] = folders.str.replace(r"_(?=\d)", " ", regex=True)
    areas = table.pivot_table("area", ["base", "arm", "learning_rate"], "seed")
    best = {}
    for run, by_rate in areas.groupby(["base", "arm"]):
        complete = by_rate.dropna(axis="columns")
        best[run] = pd.Series(at_best_rates_of_others(complete.to_numpy()[None]), [*complete])
    scores = pd.DataFrame(best).T.rename_axis(["base", "arm"])
    return scores.xs("rloo", level="arm") - scores.drop(index="rloo", level="arm")


def zero() -> Numbers:
    """Question 9: for each base what was measured and predicted, and the difference that came of it."""
    table = zero_gaps()
    for base in pd.read_csv(TABLES / "zero" / "noise.csv").itertuples():
        label = f"{base.task} {base.base}"
        gap = student(table.loc[label, "0"])
        predicted = side(1 - base.high, 1 - base.low)
        outcome = {1: "right", 0: "open", -1: "wrong"}[predicted * side(gap.low, gap.high)]
        ratio = Interval(base.ratio, base.low, base.high).text(".2f")
        outcome = outcome if predicted else "none made"
        yield label, f"{base.reward:.2f}", f"{base.constant:.2f}", ratio, gap.text(), outcome
    for task in ("sort_digits", "reverse_text"):
        of_task = table.xs("0", level=1).filter(like=task, axis=0)
        mean, variances = bases_at_large(of_task.to_numpy())
        spreads = (f"{x:.3f}" for x in np.sqrt(variances[[0, 2]]))
        yield task, f"{mean.text()}, {mean.verdict()}", *spreads
    measured = pd.read_csv(TABLES / "zero" / "noise_pretrained.csv").iloc[0]
    from_0 = Interval(*measured[["ratio", "low", "high"]]).text(".2f")
    ratios = from_0, f"{measured['ratio_1_2']:.2f}"
    for rewards, constant, ratio in zip(("0 and 1", "1 and 2"), ("0", "-1"), ratios, strict=True):
        gap = student(table.loc[("pretrained", constant)].dropna(), 2)
        sign = "ahead: right" if gap.low > 0 else "behind: right"
        yield rewards, ratio, gap.text(), sign


def unclipped() -> Numbers:
    """Question 10: differences to rloo without clipping, and what became of each verdict and gap of question 1."""
    for part in ("10_sort_digits", "10_reverse_text", "10_sgd"):
        clipped = LANGUAGE[part == "10_reverse_text"]
        old, new = (gaps(by_seed(runs(name))) for name in (clipped, part))
        verdicts = against(old)
        yield from tuned(part)
        for arm, gap in against(new).items():
            fate = "stays" if gap.verdict() == verdicts[arm].verdict() else "changed"
            yield arm, "open" if gap.verdict() == "undecided" else fate
        if part != "10_sgd":
            yield from ((arm, x.text()) for arm, x in against((new - old).dropna()).items())


def learned() -> Numbers:
    """Question 11: gold at the end, where gold is greatest, and what the weight of the KL changes."""
    table = pd.read_csv(TABLES / "11_learned" / "curves.csv")
    table["d"] = np.sqrt(table["kl"].clip(lower=1e-4))  # an estimate of a KL near 0 can be negative
    by_run = table.groupby(["beta", "arm", "seed"], sort=False)
    ends = by_run["gold"].apply(lambda values: values.iloc[-2:].mean()).unstack("seed").T
    turns = table.loc[by_run["gold"].idxmax()].set_index(["beta", "arm", "seed"]).unstack("seed")
    differences = {key: ends[key] - ends[key[0], "rloo"] for key in ends if key[1] != "rloo"}
    judged = against(differences)
    for beta, arm in ends:
        row = f"{arm}, {beta:g}"
        yield row, f"{ends[beta, arm].mean():.2f}"
        if arm == "rloo":
            yield row, "reference"
        else:
            pairs = pairs_needed(differences[beta, arm])
            yield row, judged[beta, arm].cell(0.25), str(pairs)
        if beta != 0.001:
            yield row, student(ends[beta, arm] - ends[0.001, arm], 4).text(".2f")
            continue
        for measure, form in (("step", ".1f"), ("d", ".2f")):
            of_arms = turns[measure].loc[beta].T
            gap = student(of_arms[arm] - of_arms["rloo"], 6).text(form)
            yield row, f"{of_arms[arm].mean():.3g}" + (f", {gap}" if arm != "rloo" else "")


def by_unit(part: str) -> dict[str, np.ndarray]:
    """Return for each arm its area by rate and unit (a base or a task), the mean of its runs, [1, rates, units]."""
    table = runs(part).assign(unit=runs(part)["problem"].str.rpartition(", ")[0])
    return {
        arm: of_arm.pivot_table("area", "learning_rate", "unit").to_numpy()[None]
        for arm, of_arm in table.groupby("arm", sort=False)
    }


def units(*parts: str) -> Numbers:
    """Questions 12 and 13: differences to rloo by base or task, and at which ends of the grid rates are best."""
    for part in parts:
        arms = by_unit(part)
        wider = [0, *half_widths(arms.values(), times=2)]
        for (arm, cell), half in zip(at_best_rates(arms), wider, strict=True):
            row, best = f"{arm}, {part[3:]}", arms[arm][0].argmax(0)
            yield row, cell
            if "undecided" in cell:
                yield row, f"± {half:.3f}"
            yield row, f"{(best == 0).sum()} + {(best == len(arms[arm][0]) - 1).sum()}"


def by_base(part: str) -> pd.DataFrame:
    """Return areas of question 14 or 16 by base and arm, from the evaluations of each run."""
    table = pd.read_csv(TABLES / part / "curves.csv").query("samples > 0")
    sizes = r",num_generations=(\d+),prompts_per_step=\d+"
    table["arm"] = table["arm"].str.replace(sizes, r" \1", regex=True)
    return table.groupby(["base", "arm"])["reward"].mean().unstack()[table["arm"].unique()]


def against_eights(comparisons: int, *parts: str) -> Numbers:
    """Questions 14 and 16: the differences to groups of eight of parts; the comparisons of a part share 5 %."""
    for part in parts:
        areas = by_base(part)
        yield areas.columns[0], f"reference, {areas.iloc[:, 0].mean():.3f}"
        for arm, gap in gaps(areas).items():
            yield arm, student(gap, comparisons).cell()


def groups() -> Numbers:
    """Question 14: differences to groups of eight; 64 prompts beside eight with the same baseline; two arms by rate."""
    tasks = ("sort_digits", "reverse_text", "countdown")
    yield from against_eights(9, *(f"14_{task}" for task in tasks))
    areas = by_base("14_factors").join(by_base("14_sort_digits"))
    for baseline in ("reinforce_baseline", "reinforce_running_mean", "reinforce"):
        yield from beside(baseline, areas[f"{baseline} 8"], areas[f"{baseline} 1"])
    for task in tasks:
        yield from at_rates(task)


def at_rates(task: str) -> Numbers:
    """Question 14: eight prompts beside 64 at each rate, and at the best rate of each arm or of each base."""
    table = pd.concat([runs(f"14_{task}"), runs(f"14_rates_{task}")])
    arms = [
        table[table["arm"].str.startswith(arm)].pivot_table("area", "base", "learning_rate")
        for arm in ("rloo,num_generations=8,", "reinforce_running_mean,")
    ]
    for rate in arms[0]:
        yield from beside(f"{task}, {rate:g}", *(of_arm[rate] for of_arm in arms))
    areas = dict(zip(("eight", "one"), (of_arm.to_numpy().T[None] for of_arm in arms), strict=True))
    for name, score in (("best of the arm", at_one_rate), ("best of each base", at_own_rates)):
        row = f"{task}, {name}"
        means = (f"{score(of_arm).mean():.3f}" for of_arm in areas.values())
        yield row, *means, chosen(areas, score)["one"].text(".3f")


def beside(row: str, eight: pd.Series, one: pd.Series) -> Numbers:
    """Yield the mean areas of runs with eight and with 64 prompts, and their difference, of bases [n]."""
    yield row, f"{eight.mean():.3f}", f"{one.mean():.3f}", student(one - eight).text(".3f")


def curriculum() -> Numbers:
    """Question 15: differences to uniform prompts by seed, of sampled and of greedy completions."""
    for part in ("15_uneven", "15_countdown"):
        for metric in ("area", "area_greedy"):
            areas = by_seed(runs(part), metric)
            for arm, cell in cells(areas["rloo"].mean(), against(gaps(areas))):
                yield f"{arm}, {part[3:]}", cell


AGENTS = ("8_cartpole", "8_acrobot", "8_cartpole_default", "8_acrobot_default")
QUESTIONS = {
    "1": partial(tuned, *LANGUAGE, "1_countdown", "1_shifted"),
    "2": division,
    "3": entropy,
    "4": signs,
    "5": clipping,
    "6": noise,
    "7": lora,
    "8": partial(tuned, *AGENTS, margin=25, form=".1f"),
    "9": zero,
    "10": unclipped,
    "11": learned,
    "12": partial(units, "12_sort_digits", "12_reverse_text", "12_countdown"),
    "13": partial(units, "13_molecules"),
    "14": groups,
    "15": curriculum,
    "16": partial(against_eights, 4, "16_fifty", "16_target_length"),
    "17": lambda: formulas(pd.read_csv(TABLES / "17_formulas" / "runs.csv")),
}
"""What computes the cells of each question."""


def main() -> None:
    """Verify the questions of the study."""
    wrong = []
    if manifest(TABLES) != (TABLES / "manifest.csv").read_text():
        wrong.append("manifest.csv does not list the raw tables as they are")
    texts = sections(TABLES.parent / "questions.md")
    for question, numbers in QUESTIONS.items():
        wrong += wrong_rows(question, texts[question], numbers())
    if wrong:
        raise SystemExit("\n".join(wrong))
    print("Each row that was computed holds.")


if __name__ == "__main__":
    tyro.cli(main)
