"""Optimise molecules on MolScore's benchmarks: 10,000 scored molecules a task.

    python recipes/molecules/molopt.py --tasks QED Albuterol_similarity                REINFORCE, five seeds
    python recipes/molecules/molopt.py estimator=rloo,beta=0.01 learning_rate=2e-4 --name kl    all tasks

Words with `=` are settings of `tokenrl train`, as `tokenrl.train` takes them, and stand before the flags. `prior.py`
makes the prior. When a command is repeated, what has ended is kept, and a run that was killed goes on where it was
saved. All results of a name are of one benchmark, one prior by its weights, the same settings, and the same releases
of MolScore and RDKit.

MolScore remembers molecules that it has scored, and computes the AUC of the top 100. Text that RDKit refuses is
rewarded with 0. A task whose oracle cannot be loaded here is named and left out.
`acegen_number.py` makes a table of all runs, beside ACEGEN's.

Look for: `valid` and `unique`, as a policy that collapses onto few molecules wastes its budget; and where the
seconds go.
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
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import tyro
from prior import LONGEST, claim, digest, in_molscore

import tokenrl
from tokenrl.runs import read_run


@dataclass
class Args:
    """Which tasks and seeds are run, from which prior, and with which settings."""

    settings: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Settings of `tokenrl train`, each as name=value."""
    name: str = "reinforce"
    """Name of these settings, and of their folder."""
    benchmark: str = "MolOpt"
    """A benchmark of MolScore, such as MolOpt, GuacaMol or MolExp."""
    tasks: tuple[str, ...] = ()
    """Tasks of the benchmark. Default: all."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A run of each task for each seed."""
    budget: int = 10_000
    """What a run may spend, in units."""
    unit: Literal["texts", "samples", "molecules"] = "texts"
    """What the budget counts. texts: the distinct texts of each batch, as ACEGEN does; copies are dropped before they
    are scored and learnt from, so that what is written often weighs less, which is another objective. samples: all
    that is sampled. molecules: the distinct molecules of the run, as PMO does; the rest is scored and not counted."""
    batch: int = 128
    """Molecules of a step."""
    power: float = 1.0
    """The reward is the score to this power; more than 1 prefers the best molecules."""
    repeats: float = 1.0
    """Factor of the reward of a molecule that has been scored before; 0 keeps the policy from writing it again."""
    prior: Path = Path("runs/prior/sft")
    """The run of `prior.py`, or another model that writes SMILES."""
    output_dir: Path = Path("runs/molopt")
    """Folder of all runs."""


class Scorer:
    """MolScore as a reward. Its rows, one for each text that is scored, are what its numbers are made from.

    As it has a state, checkpoints save its rows, and evaluations take nothing from the budget.
    """

    def __init__(self, molscore: Any, args: Args) -> None:
        self.molscore = molscore
        self.args = args

    def counted(self) -> pd.DataFrame:
        """Return the rows that the budget counts."""
        rows = self.molscore.main_df
        if self.args.unit == "molecules":
            rows = rows.query("valid != 'false' and unique != 'false'")
        return rows.reset_index(drop=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far, column by column, and the number of calls."""
        rows = self.molscore.main_df
        columns = {} if rows is None else rows.to_dict("list")
        return {"step": self.molscore.step, "rows": columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with rows of earlier calls."""
        self.molscore.step = state["step"]
        self.molscore.main_df = None
        if state["rows"]:
            self.molscore.main_df = pd.DataFrame(state["rows"])
            self.molscore.update_maxmin(self.molscore.main_df)

    def __call__(self, completions: list[str], log_metric: Callable, **columns: Any) -> list:
        """Return MolScore's score of each completion, 0 where RDKit refuses it, and None for a copy that is dropped."""
        args = self.args
        if self.molscore.step and len(self.counted()) >= args.budget:
            raise tokenrl.Finished(f"{args.budget} {args.unit} counted")
        drops = args.unit == "texts"
        texts = list(dict.fromkeys(completions)) if drops else completions
        scores = np.array(self.molscore.score(texts, flt=True))
        rows = self.molscore.main_df.tail(len(scores))
        valid = rows["valid"] != "false"
        log_metric("valid", valid.mean())
        factors = np.where(rows["unique"] == "false", args.repeats, 1.0)
        rewards = list(valid * factors * scores**args.power)
        first = dict(zip(texts, rewards, strict=True))
        return [first.pop(text, None) for text in completions] if drops else rewards


def open_task(args: Args, task: str, folder: Path) -> Any:
    """Return MolScore for a task, which writes to a new folder.

    Raises:
        Exception: Of any class, as an oracle cannot be loaded or fails on ethanol.
    """
    import oracles  # noqa: F401 - for MolScore, which then starts no environment of conda
    from molscore import MolScore

    warnings.simplefilter("ignore", FutureWarning)  # of pandas, about MolScore
    config, trial = f"{args.benchmark}:{task}", folder / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    MolScore("trial", config, str(trial), add_run_dir=False).score(["CCO"])
    return MolScore("tokenrl", config, str(folder), add_run_dir=False, budget=args.budget)


def optimise(args: Args, molscore: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Spend the budget of a task, and return MolScore's metrics with counts and seconds."""
    scorer = Scorer(molscore, args)
    # A policy that has collapsed writes copies alone, and ends after ten times the steps.
    most = 1 if args.unit == "samples" else 10
    settings = {
        "estimator": "reinforce", "prompts_per_step": 1, "num_generations": args.batch,
        "max_completion_length": LONGEST + 1, "max_steps": most * math.ceil(args.budget / args.batch),
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "stop_after_zero_spread": 0,
        "save_every": 10, "keep_checkpoints": 1, "threads": 1, "quiet": True,
    }  # fmt: skip
    settings |= dict(word.split("=", 1) for word in args.settings)
    result = tokenrl.train(
        task=[{"prompt": ""}], reward=scorer, model=str(args.prior), seed=seed,
        output_dir=str(folder), resume="auto", **settings,
    )  # fmt: skip
    if result.exit_code:
        raise SystemExit(f"{folder} was stopped; the same command goes on.")
    molscore.write_scores()
    rows, molscore.main_df = molscore.main_df, scorer.counted()
    metrics = molscore.compute_metrics(
        budget=args.budget, benchmark="MolOpt", chemistry_filter_basic=False
    )
    timings = pd.DataFrame(read_run(folder).timings).sum()
    collecting, scoring, updating = timings[["collect", "rewards/Scorer/seconds", "update"]]
    return {
        **metrics,
        "refused by RDKit": (rows["valid"] == "false").sum(),
        "counted": len(molscore.main_df),
        "seconds of sampling": collecting - scoring,
        "seconds of scoring": scoring,
        "seconds of updating": updating,
    }


def origin(args: Args) -> str:
    """Return in words all that decides a result but its task and seed."""
    own = ("batch", "power", "repeats", "budget", "unit", "benchmark")
    saved = args.prior / "model" if (args.prior / "model").exists() else args.prior
    versions = [f"{name}={version(name)}" for name in ("molscore", "rdkit", "tokenrl-lm")]
    words = [*args.settings, *(f"{name}={getattr(args, name)}" for name in own), *versions]
    return " ".join([*words, f"prior={digest(sorted(saved.glob('*.safetensors')))}"])


def run(args: Args, tasks: Sequence[str], open_task: Callable, optimise: Callable) -> None:
    """Make the runs of `args` that have no result yet, with the functions of these names, and say how they went."""
    settings, base = origin(args), args.output_dir / args.name
    claim(base, settings)
    for task, seed in product(tasks, args.seeds):
        folder = base / task / f"seed_{seed}"
        result = folder / "result.json"
        if result.exists():
            continue
        try:
            molscore = open_task(args, task, folder / "molscore")
        except Exception as error:
            print(f"{task}, seed {seed}: a gap, as its oracle cannot score here. {error}")
            continue
        row = {"name": args.name, "settings": settings, "task": task, "seed": seed}
        row["budget"] = args.budget
        row |= optimise(args, molscore, seed, folder / "run")
        result.write_text(json.dumps(row, default=float))
        print(pd.Series(row).to_string(float_format="{:.3f}".format), flush=True)


def main(args: Args) -> None:
    names = sorted(path.stem for path in in_molscore(f"configs/{args.benchmark}").glob("*.json"))
    if not set(args.tasks) <= set(names):
        raise SystemExit(f"The tasks of {args.benchmark} are {', '.join(names)}.")
    run(args, args.tasks or names, open_task, optimise)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
