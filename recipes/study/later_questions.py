"""The numbers of questions 9 to 13, computed from the raw tables as in `first_questions.py`."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import count

import numpy as np
import pandas as pd
from first_questions import (
    RLOO,
    TABLES,
    Numbers,
    against,
    at_best_rates,
    clipping,
    division,
    entropy,
    gaps,
    pair,
    pass_at_8,
    runs,
    scores,
    tuned,
)
from intervals import (
    Interval,
    around,
    at_best_rates_of_others,
    chosen,
    differences,
    half_width,
    half_widths,
    prose,
    student,
)
from scipy import stats


@cache
def zero_runs() -> pd.DataFrame:
    """Return the runs of question 9, with the name of the base in the place of its folder."""
    table = pd.read_csv(TABLES / "zero" / "runs.csv", dtype={"arm": str})
    folders = table["model"].str.split("/").str[3]
    return table.assign(base=folders.str.replace(r"_(?=\d)", " ", regex=True))


def zero_gaps(constant: str = "0") -> pd.DataFrame:
    """Return rloo minus a constant baseline by base and seed, each at the rate best on the other seeds."""
    areas = zero_runs().pivot_table("area", ["base", "arm", "learning_rate"], "seed")
    best = {}
    for run, by_rate in areas.groupby(["base", "arm"]):
        complete = by_rate.dropna(axis="columns")
        best[run] = pd.Series(at_best_rates_of_others(complete.to_numpy()[None]), [*complete])
    table = pd.DataFrame(best).T
    return table.xs(RLOO, level=1) - table.xs(constant, level=1)


def side(low: float, high: float) -> int:
    """Return on which side of 0 an interval lies: 1, -1, or 0 if it contains 0."""
    return int(low > 0) - int(high < 0)


def bases_at_large(table: np.ndarray) -> tuple[Interval, np.ndarray, Interval]:
    """Split differences by base and seed, [bases, seeds], as zero_sort_digits.yaml says.

    Returns:
        The interval of the mean; the variances of bases, of seeds and of the rest; and the ratio of the first to the
        last with its 95 % interval.
    """
    bases, seeds = table.shape
    mean, of_base, of_seed = table.mean(), table.mean(1), table.mean(0)
    rest = table - of_base[:, None] - of_seed + mean
    freedom = np.array([bases - 1, seeds - 1, (bases - 1) * (seeds - 1)])
    sums = [seeds * (of_base - mean) ** 2, bases * (of_seed - mean) ** 2, rest**2]
    squares = np.array([part.sum() for part in sums]) / freedom
    total = squares[0] + squares[1] - squares[2]
    degrees = total**2 / (squares**2 / freedom).sum()
    if total < squares[0]:
        total, degrees = squares[0], freedom[0]
    half = stats.t.ppf(1 - 0.05 / 4, degrees) * np.sqrt(total / table.size)
    variances = np.append(np.maximum(squares[:2] - squares[2], 0) / (seeds, bases), squares[2])
    quantiles = stats.f.ppf([0.975, 0.025], freedom[0], freedom[2])
    low, high = (squares[0] / squares[2] / quantiles - 1) / seeds
    ratio = Interval(variances[0] / variances[2], low, high)
    return around(mean, half), variances, ratio


def zero() -> Numbers:
    """Question 9: for each base what was measured and predicted, and the difference that came of it."""
    table = zero_gaps()
    for base in pd.read_csv(TABLES / "zero" / "noise.csv").itertuples():
        label = f"{base.task} {base.base}"
        gap = student(table.loc[label])
        predicted = side(1 - base.high, 1 - base.low)
        outcome = {1: "right", 0: "open", -1: "wrong"}[predicted * side(gap.low, gap.high)]
        yield label, f"{base.reward:.2f}"
        yield label, f"{base.constant:.2f}"
        yield label, f"{base.ratio:.2f} [{base.low:.2f}, {base.high:.2f}]"
        yield label, gap.signed()
        yield label, outcome if predicted else "none made"
    for task in ("sort_digits", "reverse_text"):
        of_task = table.filter(like=task, axis="index")
        sizes = sorted(of_task.mean(axis="columns").abs())
        yield "", f"by {prose(sizes[0])} to {prose(sizes[-1])}."
        mean, variances, ratio = bases_at_large(of_task.to_numpy())
        base, _, rest = map(prose, np.sqrt(variances))
        sign = "+" if mean.mean > 0 else ""
        yield task, f"{sign}{mean.text()}, {mean.verdict()}"
        yield task, base
        yield task, rest
        yield "", f"{prose(ratio.mean, 1)} [{prose(ratio.low, 1)}, {ratio.high:.0f}] times"
    noise = pd.read_csv(TABLES / "zero" / "noise_pretrained.csv").iloc[0]
    from_0 = Interval(noise["ratio"], noise["low"], noise["high"]).text(2)
    ratios = from_0, prose(noise["ratio_1_2"], 2)
    for rewards, constant, ratio in zip(("0 and 1", "1 and 2"), ("0", "-1"), ratios, strict=True):
        gap = student(zero_gaps(constant).loc["pretrained"].dropna(), 2)
        yield rewards, ratio
        yield rewards, ("+" if gap.mean > 0 else "") + gap.text()
        yield rewards, "ahead: right" if gap.low > 0 else "behind: right"


def unclipped() -> Numbers:
    """Question 10: differences to rloo without clipping, and what became of each verdict and gap of question 1."""
    before = {"10_sort_digits": "1_sort_digits", "10_reverse_text": "1_reverse_text"}
    largest = []
    for part, clipped in (before | {"10_sgd": "1_sort_digits"}).items():
        old, new = gaps(scores(clipped)), gaps(scores(part))
        verdicts, now = against(old), against(new)
        yield from tuned(part)
        for arm, gap in now.items():
            fate = "stays" if gap.verdict() == verdicts[arm].verdict() else "changed"
            yield arm, "open" if gap.verdict() == "undecided" else fate
        if part in before:
            moved = against((new - old).dropna())
            yield from ((arm, gap.signed()) for arm, gap in moved.items())
            largest.append(max(max(-gap.low, gap.high) for gap in moved.values()))
    yield "", "by more than {} on sort_digits, or {} on reverse_text.".format(*map(prose, largest))


def learned() -> Numbers:
    """Question 11: gold at the end, where gold is greatest, and what the weight of the KL changes."""
    table = pd.read_csv(TABLES / "11_learned" / "curves.csv")
    table["d"] = np.sqrt(table["kl"].clip(lower=1e-4))  # an estimate of a KL near 0 can be negative
    by_run = table.groupby(["beta", "arm", "seed"], sort=False)
    ends = by_run["gold"].apply(lambda values: values.iloc[-2:].mean()).unstack("seed").T
    turns = table.loc[by_run["gold"].idxmax()].set_index(["beta", "arm", "seed"]).unstack("seed")
    others = [key for key in ends if key[1] != RLOO]
    differences = {key: ends[key] - ends[key[0], RLOO] for key in others}
    judged = against(differences)
    for beta, arm in ends:
        row = f"{arm}, {beta:g}"
        yield row, f"{ends[beta, arm].mean():.2f}"
        if arm == RLOO:
            yield row, "reference"
        else:
            yield row, judged[beta, arm].cell(0.25)
            yield row, str(pairs_needed(differences[beta, arm]))
        if beta != 0.001:
            yield row, student(ends[beta, arm] - ends[0.001, arm], 4).signed(2)
            continue
        for measure, decimals in (("step", 1), ("d", 2)):
            of_arms = turns[measure].loc[beta].T
            gap = f", {pair(of_arms, arm, RLOO, 6).signed(decimals)}" if arm != RLOO else ""
            yield row, f"{of_arms[arm].mean():.3g}{gap}"
    last, best = by_run[["proxy", "gold"]].last(), by_run["gold"].idxmax()
    lost = last["gold"] <= table["gold"][best].to_numpy() - 0.25
    lost &= last["proxy"] > table["proxy"][best].to_numpy()
    small, large = lost.groupby("beta").sum()
    yield "", f"**Gold is lost in {small} of 24 runs** with the weight .001."
    yield "", f"With .1 it is lost in {large} of 24."


def pairs_needed(differences: pd.Series) -> int:
    """Return how many pairs of this spread give intervals of .25 to either side, where six share 5 %."""
    sizes = count(2)
    return next(n for n in sizes if half_width(differences.std(), n, 6) <= 0.25)


@cache
def by_unit(part: str) -> dict[str, np.ndarray]:
    """Return for each arm its area by rate and unit (a base or a task), the mean of its runs, [1, rates, units]."""
    table = runs(part).assign(unit=runs(part)["problem"].str.rpartition(", ")[0])
    arms = {}
    for arm, of_arm in table.groupby("arm", sort=False):
        arms[arm] = of_arm.pivot_table("area", "learning_rate", "unit").to_numpy()[None]
    return arms


@cache
def judged_units(part: str) -> dict[str, Interval]:
    """Return the interval of each arm minus rloo over the units."""
    return chosen(by_unit(part))


def units(part: str) -> Numbers:
    """Yield the differences to rloo by base or task, and at which ends of the grid rates are best."""
    arms = by_unit(part)
    cells = at_best_rates(arms[RLOO], judged_units(part))
    wider = [0, *half_widths(arms.values(), times=2)]
    for (arm, cell), half in zip(cells.items(), wider, strict=True):
        row = f"{arm}, {part[3:]}"
        yield row, cell
        if "undecided" in cell:
            yield row, f"± {half:.3f}"
        best = arms[arm][0].argmax(0)
        yield row, f"{(best == 0).sum()} + {(best == len(arms[arm][0]) - 1).sum()}"


def spans(part: str) -> dict[str, np.ndarray]:
    """Return the differences of each arm to rloo by unit, in the order of the units."""
    arms = by_unit(part)
    return dict(zip([*arms][1:], differences(arms.values()), strict=True))


BASES = ("12_sort_digits", "12_reverse_text", "12_countdown")


def bases() -> Numbers:
    """Question 12: the differences over six bases of each task, and the leads that are not excluded."""
    for part in BASES:
        yield from units(part)
    leads = not_excluded()
    arms = {"the critic": "a2c", "`reinforce`": "reinforce", "ReMax": "remax"}
    arms |= {"the running mean": "reinforce_running_mean", "`grpo_no_std`": "grpo_no_std"}
    critic, none, remax, running, grpo = (prose(leads[arm]) for arm in arms.values())
    words = f"{critic} for the critic, {none} for `reinforce`, {running} for the running mean"
    yield "", f"up to {words}, {remax} for ReMax and {grpo} for `grpo_no_std`."
    sort, reverse = (np.sort(np.abs(spans(part)["reinforce"])) for part in BASES[:2])
    yield "", f"of sort_digits, by {prose(sort[0])} to {prose(sort[-1])}"
    yield "", f"of reverse_text, by {prose(reverse[0])} to {prose(reverse[-1])}."
    order = range(1, 7)  # of the bases along the ladder
    along = stats.spearmanr(order, spans(BASES[0])["reinforce"])[0]
    remax = [stats.spearmanr(order, spans(part)["remax"])[0] for part in BASES[:2]]
    yield "", f"with a rank correlation of {prose(along, 2)}. ReMax catches up"
    yield "", "with {}, and with {} on reverse_text.".format(*(prose(x, 2) for x in remax))


def not_excluded() -> dict[str, float]:
    """Return for each arm of question 12 the lead over rloo that two tasks do not exclude."""
    highs = [{arm: gap.high for arm, gap in judged_units(part).items()} for part in BASES]
    return pd.DataFrame(highs).apply(lambda ends: ends.nlargest(2).iloc[1]).to_dict()


def molecules() -> Numbers:
    """Question 13: the differences over eight tasks."""
    part = "13_molecules"
    yield from units(part)
    arms = judged_units(part)
    gaps_of = spans(part)
    behind, reinvent = arms["reinforce"], arms["reinvent"]
    yield "", f"`reinforce` is behind {behind.by_interval}, and ahead on one task of eight."
    yield "", f"`reinvent` is behind on all eight, {reinvent.by_interval}."
    highs = [prose(arms[arm].high) for arm in ("reinforce_running_mean", "reinforce", "a2c")]
    yield "", "{} for the running mean, {} for `reinforce`, {} for the critic".format(*highs)
    least, most = gaps_of["reinforce"].min(), gaps_of["reinforce"].max()
    yield "", f"between {prose(least)}, on Albuterol_similarity, and +{prose(most)}, on C7H8N2O2."
    with_kl = {arm: by_unit(part)[arm] for arm in ("reinvent", "rloo,beta=0.0078125")}
    (lead,) = chosen(with_kl).values()
    yield "", f"on all eight tasks: {lead.by_interval} (exploratory, 95 %)."


def summary() -> Numbers:
    """Yield what the first page and the summary have in common."""
    gaps_of_1 = against(gaps(scores("1_reverse_text")))
    yield "", f"| {prose(gaps_of_1['reinforce'].mean)}, "
    verdicts = Counter(cell.split()[-1] for row, cell in division() if row)
    yield "", f"{verdicts['equivalent']} of 8 cells equivalent"
    verdicts = Counter(cell.split()[-1] for row, cell in clipping() if row)
    yield "", f"{verdicts['better']} of 12 arms"
    on_the_curve = sum(cell.endswith("on the curve") for _, cell in entropy())
    yield "", f"{on_the_curve} of 18 pairs of"
    outcomes = Counter(cell for _, cell in zero())
    yield "", f"{outcomes['right']} of {outcomes['right'] + outcomes['wrong']} "
    raised = pair(pass_at_8("4_countdown"), "negatives_none", RLOO)
    yield "", f"{raised.mean:+.3f} in pass@8".replace("0.", ".")
    reinvent = judged_units("13_molecules")["reinvent"]
    yield "", f"{reinvent.text()}, REINVENT's gradient"
