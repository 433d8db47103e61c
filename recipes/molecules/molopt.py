"""Optimise molecules on MolScore's benchmarks: 10,000 scored molecules a task, and MolScore's own table.

    python recipes/molecules/molopt.py --tasks QED Albuterol_similarity                REINFORCE, five seeds
    python recipes/molecules/molopt.py --name kl estimator=rloo,beta=0.01 learning_rate=2e-4    all tasks
    python recipes/molecules/molopt.py --seeds 3 4         the other half on another machine, copied to other/
    python recipes/molecules/molopt.py --table --collect other/runs/molopt             one table of both

Words with `=` are settings of `tokenrl train`, as `tokenrl.train` takes them. `prior.py` makes the prior. What
has ended is kept when a command is repeated, so a benchmark that was killed goes on.

MolScore counts the budget, remembers molecules that it has scored, and computes the table; the AUC of the top
100 is the number that ACEGEN publishes. Text that RDKit refuses is rewarded with 0, and counts in the budget.
A task whose oracle cannot be loaded here is named, and is a gap in the table.

Look for: the AUC beside ACEGEN's, whose prior learnt from another set of molecules; `valid` and `unique`, as a
policy that collapses onto few molecules wastes its budget; and where the seconds go.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[molecules]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import importlib.util
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from prior import LONGEST, START
from scipy import stats

import tokenrl
from tokenrl.runs import read_run

SCORE, RESULT = "Top-100 AUC Score", "result.json"
ACEGEN = Path(__file__).with_name("acegen.csv")
"""The AUC of the top 100 by task in ACEGEN's README, means of five seeds."""
BATCH = 128
"""Molecules of a step, as in ACEGEN."""


@dataclass
class Args:
    """Which tasks and seeds are run, from which prior, and with which settings."""

    settings: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Settings of `tokenrl train`, each as name=value."""
    name: str = "reinforce"
    """Name of these settings in the table and of their folder."""
    benchmark: str = "MolOpt"
    """A benchmark of MolScore, such as MolOpt, GuacaMol or MolExp."""
    tasks: tuple[str, ...] = ()
    """Tasks of the benchmark. Default: all."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A run of each task for each seed."""
    budget: int = 10_000
    """Scored molecules of a run."""
    prior: Path = Path("runs/prior/sft")
    """Model that writes SMILES; `prior.py` prints where it is."""
    output_dir: Path = Path("runs/molopt")
    """Folder of all runs and of the table."""
    collect: tuple[Path, ...] = ()
    """Such folders of other machines, whose results join the table."""
    table: bool = False
    """Run nothing; print the table."""


class Scorer:
    """MolScore as a reward. Its rows of molecules are all that the table is made from."""

    def __init__(self, molscore: Any) -> None:
        self.molscore = molscore
        self.refused = 0

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        """Return MolScore's score of each completion, and 0 where RDKit refuses it."""
        if not all(columns["scored"]):
            return [None] * len(completions)  # evaluations take nothing from the budget
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of pandas, about MolScore's code
            scores = self.molscore.score(completions, flt=True)
        rows = self.molscore.main_df.iloc[-len(completions) :]
        valid = [word != "false" for word in rows["valid"]]
        self.refused += len(valid) - sum(valid)
        columns["log_metric"]("valid", sum(valid) / len(valid))
        columns["log_metric"]("unique", float((rows["unique"] == "true").mean()))
        return [score if ok else 0.0 for score, ok in zip(scores, valid, strict=True)]


def open_task(benchmark: str, task: str, folder: Path, budget: int) -> Any:
    """Return MolScore on a task; it writes molecules to a new folder."""
    from molscore import MolScore

    shutil.rmtree(folder, ignore_errors=True)
    return MolScore(
        "tokenrl", f"{benchmark}:{task}", str(folder), add_run_dir=False, budget=budget
    )


def fault_of(benchmark: str, task: str) -> str:
    """Return why a task's oracle cannot score here; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = open_task(benchmark, task, Path(folder) / "trial", 1)
            trial.score(["CCO"])
            trial.main_df = None  # or MolScore writes it when Python ends
        except Exception as error:  # of an oracle of any kind
            return f"{type(error).__name__}: {error}"
    return ""


def tasks_of(benchmark: str) -> list[str]:
    """Return the names of a benchmark's tasks."""
    (package,) = importlib.util.find_spec("molscore").submodule_search_locations  # type: ignore[union-attr]
    return sorted(path.stem for path in (Path(package) / "configs" / benchmark).glob("*.json"))


def optimise(args: Args, task: str, seed: int, folder: Path) -> dict[str, Any]:
    """Spend the budget of one task, and return MolScore's metrics with seconds and counts."""
    given = dict(word.partition("=")[::2] for word in args.settings)
    scorer = Scorer(open_task(args.benchmark, task, folder / "molscore", args.budget))
    batch = int(given.get("num_generations", BATCH)) * int(given.get("prompts_per_step", 1))
    rows = {split: [{"prompt": START, "scored": split == "train"}] for split in ("train", "test")}
    settings: dict[str, Any] = {
        "estimator": "reinforce", "num_generations": BATCH, "prompts_per_step": 1, "threads": 1,
        "max_completion_length": LONGEST + 1, "lr_scheduler_type": "constant", "eval_every": 0,
        "eval_generations": 0, "stop_after_zero_spread": 0, "save_every": 0, "save_minutes": 0,
        "quiet": True, "max_steps": math.ceil(args.budget / batch), **given,
    }  # fmt: skip
    result = tokenrl.train(
        task=rows, reward=scorer, model=str(args.prior), seed=seed,
        output_dir=str(folder / "run"), overwrite=True, **settings,
    )  # fmt: skip
    if result.exit_code:
        raise SystemExit(f"{folder} was stopped; the same command makes it again.")
    scorer.molscore.write_scores()
    numbers = scorer.molscore.compute_metrics(
        budget=args.budget, benchmark=args.benchmark, chemistry_filter_basic=False
    )  # fmt: skip
    molecules = len(scorer.molscore.main_df)
    return {**numbers, "molecules": molecules, "refused": scorer.refused, **seconds_of(folder / "run")}


def seconds_of(folder: Path) -> dict[str, float]:
    """Return the seconds that a run spent on sampling, scoring and updating."""
    steps = pd.DataFrame(read_run(folder).timings)
    scoring = steps.filter(regex=r"^rewards/.*/seconds$").sum().sum()
    return {
        "sampling": float(steps["collect"].sum() - scoring),
        "scoring": float(scoring),
        "updating": float(steps["update"].sum()),
    }


def run(args: Args, optimise: Callable[..., dict[str, Any]], fault_of: Callable[..., str]) -> None:
    """Make the runs that are not there yet, each with its result in its folder.

    Args:
        args: Which runs, and with which settings.
        optimise: Makes a run, as `optimise` does.
        fault_of: Says why a task is impossible, as `fault_of` does.

    Raises:
        SystemExit: A folder has results of other settings.
    """
    settings = {name: str(getattr(args, name)) for name in ("settings", "budget", "prior")}
    for task in args.tasks or tasks_of(args.benchmark):
        cells = {seed: args.output_dir / args.name / task / f"seed_{seed}" for seed in args.seeds}
        missing = [seed for seed, folder in cells.items() if not (folder / RESULT).exists()]
        for folder in (cells[seed] for seed in args.seeds if seed not in missing):
            if (made := json.loads((folder / RESULT).read_text())["made_with"]) != settings:
                raise SystemExit(f"{folder} was made with {made}: take another --name.")
        if missing and (fault := fault_of(args.benchmark, task)):
            print(f"{task}: a gap, as its oracle cannot score here. {fault}", flush=True)
            continue
        for seed in missing:
            row = optimise(args, task, seed, cells[seed])
            row |= {"name": args.name, "task": task, "seed": seed, "made_with": settings}
            (cells[seed] / RESULT).write_text(json.dumps(row, default=float))
            print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """Say how a run went."""
    parts = {name: row[name] for name in ("sampling", "scoring", "updating")}
    total = sum(parts.values())
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in parts.items())
    return (
        f"{row['task']} seed {row['seed']}: {SCORE} {row[SCORE]:.3f}, valid {row['Valid']:.2f}, "
        f"unique {row['Unique']:.2f}, {row['refused']:,} refused by RDKit, "
        f"{row['molecules'] / total:.0f} molecules per second (seconds: {seconds})"
    )


def read_results(folders: Iterable[Path]) -> pd.DataFrame:
    """Read the results below folders, one row for each name, task and seed.

    Raises:
        SystemExit: Two folders have different results of the same run.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in (path for folder in folders for path in sorted(folder.glob(f"*/*/*/{RESULT}"))):
        row = json.loads(path.read_text())
        first = rows.setdefault((row["name"], row["task"], row["seed"]), row)
        if first[SCORE] != row[SCORE]:
            raise SystemExit(f"{path} differs from the result of the same run in another folder.")
    return pd.DataFrame(list(rows.values()))


def summary(results: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Return mean scores by task and name with half of a 95 % interval over seeds; gaps are NaN."""
    groups = results.groupby(["task", "name"])[SCORE]
    half = groups.sem() * stats.t.ppf(0.975, groups.count() - 1)
    parts = {"mean": groups.mean(), "±": half, "seeds": groups.count()}
    table = pd.DataFrame(parts).unstack("name").swaplevel(axis=1)
    names = list(dict.fromkeys(results["name"]))
    columns = [(name, part) for name in names for part in parts]
    return table.reindex(index=list(tasks), columns=pd.MultiIndex.from_tuples(columns))


def show(args: Args) -> None:
    """Print the table of all results, and write it beside them."""
    results = read_results([args.output_dir, *args.collect])
    if results.empty:
        raise SystemExit(f"There is no result in {args.output_dir}.")
    tasks = args.tasks or tasks_of(args.benchmark)
    table = summary(results, tasks)
    if args.benchmark == "MolOpt" and args.budget == 10_000:
        table["ACEGEN", "REINFORCE"] = pd.read_csv(ACEGEN, index_col="task")["REINFORCE"]
    table.to_csv(args.output_dir / "table.csv")
    print(f"AUC of the top 100, {args.budget:,} molecules")
    print(table.to_string(na_rep="", float_format="{:.3f}".format))
    gaps = [task for task in tasks if task not in set(results["task"])]
    print(f"{len(gaps)} tasks without a result: {', '.join(gaps)}" if gaps else "no gaps")


def main(args: Args) -> None:
    if not args.table:
        run(args, optimise, fault_of)
    show(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
