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

import json
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from prior import LONGEST, START, in_molscore
from scipy import stats

import tokenrl
from tokenrl.runs import read_run

SCORE = "Top-100 AUC Score"
ACEGEN = Path(__file__).with_name("acegen.csv")
"""The AUC of the top 100 by task in ACEGEN's README, means of five seeds with 10,000 molecules."""


@dataclass
class Args:
    """Which tasks and seeds are run, from which prior, and with which settings."""

    settings: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Settings of `tokenrl train`, each as name=value."""
    name: str = "reinforce"
    """Name of these settings in the table, and of their folder."""
    benchmark: str = "MolOpt"
    """A benchmark of MolScore, such as MolOpt, GuacaMol or MolExp."""
    tasks: tuple[str, ...] = ()
    """Tasks of the benchmark. Default: all."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A run of each task for each seed."""
    budget: int = 10_000
    """Scored molecules of a run."""
    batch: int = 128
    """Molecules of a step."""
    prior: Path = Path("runs/prior/sft")
    """The run of `prior.py`, or another model that writes SMILES."""
    output_dir: Path = Path("runs/molopt")
    """Folder of all runs and of the table."""
    collect: tuple[Path, ...] = ()
    """Such folders of other machines, whose results join the table."""
    table: bool = False
    """Run nothing; print the table."""


class Scorer:
    """MolScore as a reward; `refused` counts completions that are no molecule."""

    def __init__(self, molscore: Any) -> None:
        self.molscore = molscore
        self.refused = 0

    def __call__(
        self, completions: list[str], scored: list[bool], log_metric: Callable, **columns: Any
    ) -> list[float | None]:
        """Return MolScore's score of each completion, and 0 where RDKit refuses it."""
        if not all(scored):
            return [None] * len(scored)  # evaluations take nothing from the budget
        scores = self.molscore.score(completions, flt=True)
        rows = self.molscore.main_df.tail(len(completions))
        valid = rows["valid"] != "false"
        self.refused += int((~valid).sum())
        log_metric("valid", valid.mean())
        log_metric("unique", (rows["unique"] == "true").mean())
        return list(valid * scores)


def open_task(args: Args, task: str, folder: Path) -> Any:
    """Return MolScore for a task, which writes to a new folder.

    Raises:
        Exception: Of any class, as an oracle cannot be loaded or fails on ethanol.
    """
    from molscore import MolScore

    warnings.simplefilter("ignore", FutureWarning)  # of pandas, about MolScore
    config, trial = f"{args.benchmark}:{task}", folder / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    MolScore("trial", config, str(trial), add_run_dir=False).score(["CCO"])
    return MolScore("tokenrl", config, str(folder), add_run_dir=False, budget=args.budget)


def optimise(args: Args, molscore: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Spend the budget of a task, and return MolScore's metrics with counts and seconds."""
    scorer = Scorer(molscore)
    settings: dict[str, Any] = {
        "estimator": "reinforce", "prompts_per_step": 1, "num_generations": args.batch,
        "max_completion_length": LONGEST + 1, "max_steps": math.ceil(args.budget / args.batch),
        "lr_scheduler_type": "constant", "eval_every": 0, "eval_generations": 0,
        "stop_after_zero_spread": 0, "threads": 1, "quiet": True,
    }  # fmt: skip
    settings |= dict(word.split("=", 1) for word in args.settings)
    rows = {split: [{"prompt": START, "scored": split == "train"}] for split in ("train", "test")}
    result = tokenrl.train(
        task=rows, reward=scorer, model=str(args.prior), seed=seed, output_dir=str(folder),
        overwrite=True, **settings,
    )  # fmt: skip
    if result.exit_code:
        raise SystemExit(f"{folder} was stopped; the same command makes it again.")
    molscore.write_scores()
    metrics = molscore.compute_metrics(
        budget=args.budget, benchmark=args.benchmark, chemistry_filter_basic=False
    )
    seconds = pd.DataFrame(read_run(folder).timings).sum()
    scoring = seconds["rewards/Scorer/seconds"]
    counts = {"molecules": len(molscore.main_df), "refused": scorer.refused, "scoring": scoring}
    return (
        metrics | counts | {"sampling": seconds["collect"] - scoring, "updating": seconds["update"]}
    )


def run(args: Args, tasks: Sequence[str], open_task: Callable, optimise: Callable) -> None:
    """Make the runs of `args` that have no result yet, with the functions of these names, and say how they went."""
    for task in tasks:
        for seed in args.seeds:
            folder = args.output_dir / args.name / task / f"seed_{seed}"
            if (folder / "result.json").exists():
                continue
            try:
                molscore = open_task(args, task, folder / "molscore")
            except Exception as error:
                print(f"{task} is a gap, as its oracle cannot score here: {error}")
                break
            row = {"name": args.name, "task": task, "seed": seed}
            row |= optimise(args, molscore, seed, folder / "run")
            (folder / "result.json").write_text(json.dumps(row, default=float))
            shown = {
                key: float(f"{value:.3g}")
                for key, value in row.items()
                if key not in ("name", "task")
            }
            rate = row["molecules"] / (row["sampling"] + row["scoring"] + row["updating"])
            print(f"{task}: {shown}, {rate:.0f} molecules per second", flush=True)


def summary(folders: Sequence[Path], tasks: Sequence[str]) -> pd.DataFrame:
    """Return mean scores by task and name, with half of a 95 % interval over seeds; a gap is NaN."""
    paths = (path for folder in folders for path in folder.glob("*/*/*/result.json"))
    results = pd.DataFrame([json.loads(path.read_text()) for path in paths])
    groups = results.drop_duplicates(["name", "task", "seed"]).groupby(["task", "name"])[SCORE]
    half = groups.sem() * stats.t.ppf(0.975, groups.count() - 1)
    table = pd.concat({"mean": groups.mean(), "half": half, "seeds": groups.count()}, axis=1)
    return table.unstack("name").reindex(tasks).swaplevel(axis=1).sort_index(axis=1)


def main(args: Args) -> None:
    configs = in_molscore(f"configs/{args.benchmark}").glob("*.json")
    names = sorted(path.stem for path in configs)
    tasks = args.tasks or names
    if not set(tasks) <= set(names):
        raise SystemExit(f"The tasks of {args.benchmark} are {', '.join(names)}.")
    if not args.table:
        run(args, tasks, open_task, optimise)
    table = summary([args.output_dir, *args.collect], tasks)
    if args.benchmark == "MolOpt":
        table["ACEGEN", "REINFORCE"] = pd.read_csv(ACEGEN, index_col="task")["REINFORCE"]
    table.to_csv(args.output_dir / "table.csv")
    print(f"AUC of the top 100 of {args.budget:,} molecules; a gap is empty")
    print(table.to_string(na_rep="", float_format="{:.3g}".format))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
