"""Finds the checkpoint from which a run continues, and says whether the continuation can be exact."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.configuration import read_config
from tokenrl.errors import Refused
from tokenrl.runs.checkpoint import Latest, check_checkpoint, checkpoints, latest_checkpoint, step_of
from tokenrl.runs.directory import RunDirectory, versions
from tokenrl.runs.files import write_text
from tokenrl.runs.metrics import read_metrics

T = TypeVar("T")

FREE = (
    *("output_dir", "max_steps", "max_samples", "save_every", "save_minutes", "keep_checkpoints", "resume"),
    "overwrite",
    *("logging_steps", "log_completions", "quiet", "report_to", "tracker_project", "run_name", "video"),
    *("stop_after_zero_spread", "stop_after_nonfinite", "check"),
)
"""Settings that may change when a run continues."""
ROUNDING = (
    *("micro_batch_size", "threads", "cpu"),
    *("sampling_batch_size", "gradient_checkpointing", "training_attention"),
    *("tokens_per_pass", "compile"),
)
"""Settings that may change too, but then sums are rounded in another way, and the numbers drift apart."""


def taken_up(args: T, resume: str | None, output_dir: str) -> T:
    """Return settings in which what was left open is as in the run that is to be continued.

    Args:
        args: the settings, a dataclass.
        resume: the setting of that name; without it, nothing is changed.
        output_dir: the directory of the run.
    """
    if resume is None or not Path(output_dir, "config.json").is_file():
        return args
    stored = read_config(output_dir)
    found = {f.name: stored[f.name] for f in fields(args) if f.name in stored}  # type: ignore[arg-type]
    left_open = {name: value for name, value in found.items() if getattr(args, name) is None}
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in left_open.items()}
    return replace(args, **tuples)  # type: ignore[type-var]


def find_checkpoint(
    output_dir: Path,
    directory: RunDirectory | None,
    resume: str | None,
    agreed: Callable[[Sequence[int]], Sequence[int]],
) -> Latest:
    """Find the checkpoint that `resume` asks for, and verify it; the main process tells the others its step.

    A checkpoint whose rows of metrics.jsonl were lost is passed over, as a damaged one is.

    Args:
        output_dir: the directory of the run.
        directory: the same on the main process, locked; it is released on an error. None on the others.
        resume: `auto`, the path of one of the run's checkpoints, the run directory itself, or None.
        agreed: returns the largest of each of the numbers that all processes pass to it.

    Returns:
        The checkpoint, without a path where the run has not saved any yet or `resume` is None.

    Raises:
        Refused: there is no such checkpoint, it is damaged, or it belongs to another run.
    """
    found = Latest(None, [])
    if resume is None:
        return found
    if directory is not None:
        try:
            found = _verified(directory, resume)
        except Refused:
            directory.release()
            raise
    (step,) = agreed([step_of(found.path) if found.path else 0])
    return found._replace(path=output_dir / "checkpoints" / f"step_{step:06d}" if step else None)


def _verified(directory: RunDirectory, resume: str) -> Latest:
    path, folder = Path(resume), directory.path / "checkpoints"
    reached = _recorded_until(directory.metrics)
    strange = "\0" in resume  # no path can have it
    if resume != "auto" and (strange or path.resolve() != directory.path.resolve()):
        if strange or path.parent.resolve() != folder.resolve():
            raise Refused(
                f"resume was given as {resume!r}; it must be auto, or a checkpoint of the run in output_dir, "
                f"such as {folder / 'step_000100'}. To start a new run from the weights of another, give its "
                "checkpoint as --model."
            )
        check_checkpoint(path, reached)
        return Latest(path, [])
    found = latest_checkpoint(folder, reached)
    if found.path is None and (found.skipped or (directory.model.exists() and directory.steps != 0)):
        why = " ".join(found.skipped) or "It holds a model, but no checkpoint."
        raise Refused(
            f"The run in {directory.path} cannot be continued. {why} To start it again, which replaces what "
            "it holds, add --overwrite and leave --resume out."
        )
    return found


def _recorded_until(metrics: Path) -> int:
    """Return the last step up to which metrics.jsonl has a row for every step; -1 if it has none."""
    steps = [row.get("step") for row in read_metrics(metrics)] if metrics.exists() else []
    return next((place for place, step in enumerate(steps) if step != place), len(steps)) - 1


def cut_back(directory: RunDirectory, step: int) -> None:
    """Remove what a run wrote after a step, which is made again.

    Raises:
        Refused: timings.jsonl is damaged; nothing has been removed.
        Stopped: a file cannot be written.
    """
    kept = {path: _until(step, path) for path in (directory.metrics, directory.timings) if path.exists()}
    for path, lines in kept.items():
        write_text(path, lines)
    for path in checkpoints(directory.checkpoints):
        if step_of(path) > step:
            shutil.rmtree(path)
    for path in directory.completions.glob("step_*.parquet"):
        if path.stem[5:].isdigit() and int(path.stem[5:]) > step:
            path.unlink()
    directory.summary.unlink(missing_ok=True)


def _until(step: int, path: Path) -> str:
    """Return the lines up to a step as they are, without a last one that was cut."""
    rows = read_metrics(path)
    lines = [line for line in path.read_text("utf-8", "replace").split("\n") if line.strip()]
    return "".join(f"{line}\n" for line, row in zip(lines, rows, strict=False) if row.get("step", 0) <= step)


@dataclass
class Maker:
    """What a run is made from, and where it runs: both are compared with those of the checkpoint.

    Attributes:
        fingerprints: of the data, the tokenizer and the base model, by these names.
        processes: the number of processes.
        device: `cpu`, or the kind of another device.
        settings: the settings of the run as JSON holds them; known once the run begins.
        inexact: what may make the continuation inexact, in words; known once the state is loaded.
    """

    fingerprints: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    inexact: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation is compared with."""
        return {
            "fingerprints": self.fingerprints,
            "processes": self.processes,
            "settings": self.settings,
            "versions": {**_versions(), "device": self.device},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with what made the checkpoint.

        Raises:
            Refused: a setting that decides what the run learns, the data, the tokenizer, the base model or
                the number of processes is another.
        """
        differ = _differences(state["settings"], self.settings, {*self.settings, *state["settings"]})
        if wrong := [text for name, text in differ.items() if name not in (*FREE, *ROUNDING)]:
            raise Refused(
                f"The run was started with other settings: {'; '.join(wrong)}. Continue it with its own, "
                "which `--config` and the config.json of the run give too, or start another run in another "
                "output_dir."
            )
        for name, digest in self.fingerprints.items():
            if state["fingerprints"].get(name) != digest:
                raise Refused(
                    f"The {name} is not the same as when the checkpoint was saved, so this would be another "
                    f"run. Restore the {name}, or start a new run from the checkpoint's weights with --model."
                )
        if state["processes"] != self.processes:
            raise Refused(
                f"The run had {state['processes']} processes and now has {self.processes}, which would split "
                "its steps in another way. Start it with as many as before."
            )
        now = {**_versions(), "device": self.device}
        self.inexact = [differ[name] for name in differ if name in ROUNDING]
        self.inexact += _differences(state["versions"], now, set(now)).values()
        if self.device != "cpu":
            self.inexact.append(f"some kernels on {self.device} add in an order that varies")


def _differences(stored: Mapping[str, Any], ours: Mapping[str, Any], names: set[str]) -> dict[str, str]:
    """Say by name what differs."""
    return {
        name: f"{name}: {stored.get(name, '(not there)')!r}, now {ours.get(name, '(not there)')!r}"
        for name in sorted(names)
        if stored.get(name) != ours.get(name)
    }


@cache
def _versions() -> dict[str, str]:
    return {name: version for name, version in versions().items() if name != "platform"}
