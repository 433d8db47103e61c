"""Makes the tables and figures of the study again from the raw tables; or everything, from nothing.

    python recipes/study/rebuild.py                   tables of the pages and figures, in seconds
    python recipes/study/rebuild.py --from-nothing    makes the runs of 1 to 8, 10, 12 and 13, then the same
    python recipes/study/rebuild.py --parts 1_sort_digits    the runs of one part, then the same

The runs of a part are those of `tokenrl compare --config recipes/study/PART.yaml`; killed and started again,
they go on where they were. The raw tables hold one row for each run, and the curves of its evaluations. The
verdicts are computed from them by the same code as in `tokenrl compare`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import answer
import pandas as pd
import questions
import second_edition
import tyro
import yaml
import zero
from judging import explain_colours, table
from matplotlib.figure import Figure
from questions import STUDY, TABLES, judged, read

import tokenrl
from tokenrl.lab import measure_bias, measure_gradients
from tokenrl.language import load_task, warm_started_base
from tokenrl.runs import read_run

SECTIONS = {
    "1_rates": ("1_sort_digits", "1_reverse_text", "1_countdown", "1_shifted"),
    "2_division": ("2_sgd_2",),
    "3_entropy": ("1_sort_digits", "1_reverse_text"),
    "4_signs": ("4_sort_digits", "4_countdown"),
    "5_clipping": ("5_updates_2",),
    "6_noise": ("1_sort_digits", "1_reverse_text"),
    "7_lora": ("7_lora", "7_lora_factor"),
    "8_actions": ("8_cartpole", "8_acrobot", "8_cartpole_default", "8_acrobot_default"),
    "9_zero": ("zero",),
    "10_unclipped": ("10_sort_digits", "10_reverse_text", "10_sgd"),
    "11_learned": ("11_learned",),
    "12_bases": ("12_sort_digits", "12_reverse_text", "12_countdown"),
    "13_molecules": ("13_molecules",),
}
"""The parts of each page of `questions/`, which has the figure of its name. The function of its name draws a panel
and makes the cells of the table for each part. Questions 2 and 5 have one panel for several parts, and are named
by the part that is run last."""


def run(part: str) -> None:
    """Make the runs of a comparison that are not there yet, and keep its raw tables."""
    if not (TABLES / "difficulty.csv").exists():
        measure_difficulty()
    plan = yaml.safe_load((STUDY / f"{part}.yaml").read_text())
    comparison: Any = tokenrl.compare(**plan)
    table = comparison.table
    folder = TABLES / part
    folder.mkdir(parents=True, exist_ok=True)
    paths = [comparison.output_dir / path for path in table.runs["path"]]
    seconds = [read_run(path).summary.get("wall_seconds") for path in paths]
    table.runs.assign(seconds=seconds).to_csv(folder / "runs.csv", index=False)
    table.curves[table.curves["role"] != "tuning"].to_csv(folder / "curves.csv", index=False)
    shutil.copy(comparison.output_dir / "comparison.json", folder)
    if part in SECTIONS["6_noise"]:
        measure_noise(part)
    if part in SECTIONS["4_signs"]:
        measure_pass_at_8(part)


def measure_difficulty() -> None:
    """Question 2: measure how often the base model is right on each training prompt of sort_digits."""
    task: Any = load_task("sort_digits")
    measured = replace(task, eval_prompts=task.train_prompts)
    base = str(warm_started_base(task))
    rates = tokenrl.evaluate(model=base, task=measured, num_generations=64).by_prompt["reward"]
    table = pd.DataFrame(task.train_prompts)[["prompt"]].assign(right=rates)
    table.to_csv(TABLES / "difficulty.csv", index=False, float_format="%g")


def measure_pass_at_8(part: str) -> None:
    """Question 4: pass@8 of each run's last policy and, ten times, of the base; the bias of each baseline."""
    runs = read(part).runs
    task = part[2:]
    bias = {
        arm: measure_bias(tokenrl.Estimator(baseline=arm)).found for arm in runs["arm"].unique()
    }
    models = [(run.arm, run.seed, f"runs/study/{part}/{run.path}", 0) for run in runs.itertuples()]
    base = str(warm_started_base(load_task(task)))
    models += [("base", draw, base, draw) for draw in range(10)]
    rows = []
    for arm, seed, model, draw in models:
        measured = tokenrl.evaluate(model=model, task=task, num_generations=16, k=(8,), seed=draw)
        pass_at_8 = measured.metrics["pass@8"]
        rows.append({"arm": arm, "seed": seed, "pass@8": pass_at_8, "bias": bias.get(arm, "")})
    pd.DataFrame(rows).to_csv(TABLES / part / "pass8.csv", index=False)


def measure_noise(part: str) -> None:
    """Question 6: measure the noise of every arm, at the start of a task and half way."""
    task = part[2:]
    runs = read(part).runs
    half_way = f"runs/study/6_half_way/{task}"
    tokenrl.train(
        task=task, max_steps=50, eval_every=50, lr_scheduler_type="constant",
        learning_rate=float(runs[runs["arm"] == "rloo"]["learning_rate"].iloc[0]),
        output_dir=half_way, overwrite=True, quiet=True,
    )  # fmt: skip
    measured = [(task, tuple(scores.arm for scores in judged(part).arms), "")]
    if task == "sort_digits":
        for name in ("shifted", "lowered"):  # constant baselines of -1 and .5
            measured.append((f"recipes/study/own.py:{name}", ("reinforce",), f" {name}"))
    rows = []
    models = {"start": str(warm_started_base(load_task(task))), "half way": half_way}
    for policy, model in models.items():
        for source, arms, suffix in measured:
            gradients = measure_gradients(
                task=source, model=model, estimators=arms,
                num_prompts=512, prompts_per_step=16, num_generations=8,
            )  # fmt: skip
            for row in gradients.estimators:
                cells = {"policy": policy, "arm": row.estimator + suffix, "bias": row.declared}
                rows.append(cells | asdict(row.noise) | {"cosine": row.cosine.value})
    noise = pd.DataFrame(rows).rename(columns={"value": "noise"})
    noise.to_csv(TABLES / part / "noise.csv", index=False)


def manifest() -> str:
    """Return a line for each raw table: its file, the number of its rows, and the SHA-256 of its bytes."""
    lines = ["file,rows,sha256"]
    for path in sorted(TABLES.rglob("*.csv")):
        if path.name != "manifest.csv":
            content = path.read_bytes()
            rows = content.count(b"\n") - 1
            digest = hashlib.sha256(content).hexdigest()
            lines.append(f"{path.relative_to(TABLES).as_posix()},{rows},{digest}")
    return "\n".join(lines) + "\n"


def rebuild(pages: Path, figures: Path) -> None:
    """Write the table of each page below its mark, and the figures."""
    figures.mkdir(exist_ok=True)
    first = Figure((8, 5.4), layout="constrained")
    answer.draw(first.subplots())
    save(first, figures / "answer.png")
    drawings = vars(questions) | vars(second_edition)
    for name, parts in SECTIONS.items():
        page = pages / f"{name}.md"
        text = page.read_text()
        across = min(len(parts), 2)
        down = -(-len(parts) // 2)
        heights = (4.6, 2.4)[:down]  # inches; most second rows have fewer arms
        figure = Figure((6 * across + 1, sum(heights) + 0.3), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, height_ratios=heights).ravel()
        cells = {}
        for axes, part in zip(panels, parts, strict=False):
            cells[part] = drawings[label(name)](axes, part)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(parts) :]:
            axes.remove()
        mark = f"<!-- table {name} -->\n"
        assert mark in text, f"{page.name} has no {mark}"
        before, _, after = text.partition(mark)
        body = table(one_table(cells, below=name in ("7_lora", "12_bases")))
        page.write_text(f"{before}{mark}{body}\n" + re.sub(r"\A(\|.*\n)*", "", after))
        save(figure, figures / f"{name}.png")


def one_table(cells: dict[str, pd.DataFrame], below: bool) -> pd.DataFrame:
    """Join the cells of a page's parts: below each other, or beside each other with the name of each part."""
    if below:
        rows = pd.concat(cells.values())
        return rows[~rows.index.duplicated()]
    if len(cells) == 1:
        return next(iter(cells.values()))
    beside = pd.concat(cells.values(), axis="columns", keys=[label(part) for part in cells])
    beside.columns = [": ".join(names) for names in beside.columns]
    return beside.fillna("")


def label(part: str) -> str:
    """Return the name of a part or page without its number."""
    return part.partition("_")[2]


def save(figure: Figure, path: Path) -> None:
    """Write a figure with its colours explained, the same bytes each time."""
    explain_colours(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(from_nothing: bool = False, parts: tuple[str, ...] = ()) -> None:
    """Rebuild the study.

    Args:
        from_nothing: make all runs first; those that are there in runs/study are kept.
        parts: make the runs of these parts first, such as 1_sort_digits.
    """
    if from_nothing:
        zero.main(bases=True)
        parts = tuple(sorted(path.stem for path in STUDY.glob("[0-9]*.yaml")))
    for part in parts:
        run(part)
    (TABLES / "manifest.csv").write_text(manifest())
    rebuild(STUDY / "questions", STUDY / "figures")


if __name__ == "__main__":
    tyro.cli(main)
