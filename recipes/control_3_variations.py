"""The NumPy REINFORCE of `control_3_numpy.py` with one thing changed at a time, on CartPole-v1.

    gamma         how far ahead an action is credited with rewards: 0.8, 0.95, 0.99, 0.999
    window        the same with a sharp limit: each reward is credited to the last 5, 10, 20, 50 actions only
    plain         returns are not standardised within the episode
    undiscounted  gamma 1, with standardisation and without

The usual setting is black: gamma 0.99, no window, standardised. The others are compared with it by the mean
return of all 3,000 episodes, which shows who learns fast, and of the last 500, which shows how far they get.
Differences are between runs of the same seed. Each finished run is kept as a file: Ctrl-C draws those, and
--resume goes on from them.

Expect, with seeds 0 to 4 [95 % intervals, by bootstrap over five seeds, so rough]: what looks ahead by 50
steps or fewer rises as fast at first (window 5 does not) and then stays behind with every seed: its last 500
episodes return 128 [105, 158] less (window 50) to 217 [199, 234] less (window 5) than the usual 473, and no
run reaches a mean of 475. Gamma 0.999 and gamma 1 are like the usual 0.99: all episodes return 3 less [12
less, 4 more] and 6 less [13 less, 0]. Not standardising alone gains 16 [1, 40] over all episodes, most of it
with one seed, and nothing at the end. Without the discount too, the one setting whose gradient is unbiased,
every seed learns faster: 57 more [39, 80] over all episodes, 475 after a median of 1,520 episodes against
2,345, and 12 more [4, 19] at the end. All 55 runs take a quarter of an hour of one core.
"""

import json
import signal
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl.control import NumpySettings, train_numpy
from tokenrl.runs import write_json

OTHERS = ("#D55E00", "#CC79A7", "#009E73", "#0072B2")  # Okabe and Ito; the usual setting is black
GREY = "#8A8A8A"
USUAL = NumpySettings()
SUGGESTED = 475.0  # CartPole-v1's own reward threshold, for the mean of 100 episodes
WIDTH = 100  # episodes in a rolling mean
TAIL = 500  # last episodes of a run, of which the mean is compared
Variation = Literal["gamma", "window", "plain", "undiscounted"]
TITLES = {
    "gamma": "How far ahead an action answers",
    "window": "Each reward is credited to the last actions only",
    "plain": "Returns standardised within the episode, or not",
    "undiscounted": "Without a discount",
}
Runs = dict[int, np.ndarray]  # the return of each episode, by seed


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; one run of each setting for each."""
    episodes: int = 3000
    """Episodes per run."""
    variation: tuple[Variation, ...] = get_args(Variation)
    """What to vary, with one panel for each."""
    output: Path = Path("numpy_variations.png")
    """Where the figure goes."""
    output_dir: Path = Path("runs/control_3_variations")
    """Where each finished run goes, as a JSON file."""
    resume: bool = False
    """Take the runs of equal settings that the directory holds, and train only those that are missing."""

    def __post_init__(self) -> None:
        if not (self.seeds and self.variation):
            raise ValueError("--seeds and --variation need at least one value.")


def settings_of(variation: str) -> dict[str, NumpySettings]:
    """Return the settings of one panel by name; the usual one is among them."""
    if variation == "gamma":
        return {f"gamma {gamma:g}": replace(USUAL, gamma=gamma) for gamma in (0.8, 0.95, 0.99, 0.999)}
    if variation == "window":
        return {f"window {n}": replace(USUAL, window=n) for n in (5, 10, 20, 50)} | {"no window": USUAL}
    if variation == "plain":
        return {"standardised": USUAL, "not standardised": replace(USUAL, standardise=False)}
    undiscounted = replace(USUAL, gamma=1.0)
    return {
        "gamma 0.99": USUAL,
        "gamma 1": undiscounted,
        "gamma 1, not standardised": replace(undiscounted, standardise=False),
    }


def train(settings: NumpySettings, episodes: int, name: str) -> np.ndarray:
    """Return the return of each episode, and print how far the run is."""
    returns: list[float] = []
    for _, batch in islice(train_numpy(settings), -(-episodes // settings.episodes_per_update)):
        returns += [float(episode.rewards.sum()) for episode in batch]
        if len(returns) % 1000 == 0:
            mean = np.mean(returns[-WIDTH:])
            print(f"  {name}: {len(returns):,} of {episodes:,} episodes, mean {mean:.0f}", flush=True)
    return np.array(returns[:episodes])


def run(args: Args, settings: NumpySettings, name: str) -> np.ndarray:
    """Train and write the run's file, or read it if it is there and may be used."""
    asked = {**asdict(settings), "episodes": args.episodes}
    path = args.output_dir / f"{name.replace(', ', '_').replace(' ', '_')}.json"
    if args.resume and path.exists() and (kept := json.loads(path.read_text()))["asked"] == asked:
        return np.array(kept["returns"])
    returns = train(settings, args.episodes, name)
    write_json(path, {"asked": asked, "returns": returns.tolist()})
    return returns


def rolling(returns: np.ndarray) -> np.ndarray:
    """Mean of the last 100 episodes, from the hundredth on (of fewer, if there are fewer)."""
    width = min(WIDTH, len(returns))
    return np.convolve(returns, np.ones(width) / width, mode="valid")


def reached(returns: np.ndarray) -> float:
    """Return the episodes until a rolling mean of 475, or infinity if there is none."""
    mean = rolling(returns)
    first = int(np.argmax(mean >= SUGGESTED)) + len(returns) - len(mean) + 1
    return first if mean.max() >= SUGGESTED else np.inf


def interval(x: np.ndarray) -> np.ndarray:
    """Return mean, low and high of the mean over the first axis, the seeds; 95 %, 2000 resamples."""
    n = len(x)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2000) / n
    return np.concatenate([[x.mean(0)], np.quantile(weights @ x, (0.025, 0.975), axis=0)])


def gains(runs: Runs, usual: Runs, last: int) -> np.ndarray:
    """Return how much more the last episodes (0: all) return than with the usual setting, seed by seed."""
    return np.array(
        [runs[seed][-last:].mean() - usual[seed][-last:].mean() for seed in runs if seed in usual]
    )


def say(numbers: np.ndarray, sign: str = "") -> str:
    """Write the mean over seeds and its interval, which fewer than three seeds do not determine."""
    texts = [format(number, f"{sign}.0f") for number in interval(numbers)] if len(numbers) else ["unknown"]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(numbers) >= 3 else texts[0]


def tell(name: str, runs: Runs, usual: Runs) -> None:
    """Print what the runs of one setting come to."""
    when = np.array([reached(returns) for returns in runs.values()])
    middle = np.median(when)  # infinite, if fewer than half of the seeds get there
    print(f"{name} ({len(runs)} seeds): 475 in {np.isfinite(when).sum()} seeds, "
          f"median {f'{middle:,.0f} episodes' if np.isfinite(middle) else 'never'}")  # fmt: skip
    for words, last in ((f"the last {TAIL}", TAIL), ("all", 0)):
        mean = say(np.array([returns[-last:].mean() for returns in runs.values()]))
        gain = "" if runs is usual else f"; against the usual {say(gains(runs, usual, last), '+')}"
        print(f"  {words} episodes {mean}{gain}")


def finding(panel: dict[str, Runs], usual: Runs) -> str:
    """Name the settings whose return over all episodes differs from the usual one's alike in every seed."""
    found = {name: gains(runs, usual, 0) for name, runs in panel.items() if runs is not usual}
    more = [name for name, gain in found.items() if len(gain) >= 3 and (gain > 0).all()]
    less = [name for name, gain in found.items() if len(gain) >= 3 and (gain < 0).all()]
    parts = [
        f"{word} black: {' / '.join(names)}" for word, names in (("above", more), ("below", less)) if names
    ]
    return (
        "; ".join(f"in every seed {part}" for part in parts)
        or "in no setting every seed above or below black"
    )


def draw_panel(axes: Axes, panel: dict[str, Runs], usual: Runs) -> None:
    """Draw the mean over the seeds with its interval for each setting."""
    colours = iter(OTHERS)
    for name, runs in panel.items():
        colour = "black" if runs is usual else next(colours)
        curves = np.array([rolling(returns) for returns in runs.values()])
        middle, low, high = interval(curves)
        x = np.arange(len(middle)) + len(next(iter(runs.values()))) - len(middle) + 1
        end = say(np.array([returns[-TAIL:].mean() for returns in runs.values()]))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, middle, color=colour, linewidth=2, label=f"{name}: {end} ({len(runs)} seeds)")


def draw(panels: dict[str, dict[str, Runs]], usual: Runs) -> Figure:
    rows, columns = (2, 2) if len(panels) > 2 else (1, len(panels))
    figure = Figure(figsize=(6.4 * columns, 4.6 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (variation, panel) in zip(grid.flat, panels.items(), strict=False):
        draw_panel(axes, panel, usual)
        axes.axhline(500, color=GREY, linewidth=1, linestyle="--")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 540)
        axes.set_xlabel("episodes")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EAEAEA", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8.5, loc="lower right", title=f"mean of the last {TAIL} episodes")
        axes.set_title(f"{TITLES[variation]}\n{finding(panel, usual)}", loc="left", fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("return, mean of 100 episodes")
    note = "above and below: by the mean return of all episodes; bands, brackets: 95 % of the mean over seeds"
    figure.supxlabel(note, fontsize=9)
    return figure


def stop(number: int, _: object) -> None:
    """End what is going on, for Ctrl-C and SIGTERM; the exit code is the shell's, 130 or 143."""
    raise SystemExit(128 + number)


def train_all(args: Args, found: dict[NumpySettings, Runs], names: dict[NumpySettings, str]) -> int:
    """Add run after run, seed by seed so that all settings get on alike; return the exit code."""
    try:
        for seed in args.seeds:
            for settings, runs in found.items():
                name = f"{names[settings]}, seed {seed}"
                runs[seed] = run(args, replace(settings, seed=seed), name)
                mean = rolling(runs[seed])
                print(f"{name}: best {mean.max():.1f}, last {mean[-1]:.1f}", flush=True)
    except SystemExit as end:
        done, total = sum(map(len, found.values())), len(found) * len(args.seeds)
        print(f"stopped: {done} of {total} runs are finished, in {args.output_dir}; --resume goes on")
        return int(end.code or 0)
    return 0


def main(args: Args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    panels = {variation: settings_of(variation) for variation in args.variation}
    names = {settings: name for panel in panels.values() for name, settings in panel.items()}
    names = {USUAL: "usual"} | {settings: name for settings, name in names.items() if settings != USUAL}
    found: dict[NumpySettings, Runs] = {settings: {} for settings in names}
    code = train_all(args, found, names)
    for settings, name in names.items():
        if found[settings]:
            tell(name, found[settings], found[USUAL])
    drawn = {v: {name: found[s] for name, s in panel.items() if found[s]} for v, panel in panels.items()}
    if found[USUAL]:  # which comes first
        draw(drawn, found[USUAL]).savefig(args.output)
        print(f"figure: {args.output}")
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main(tyro.cli(Args))
