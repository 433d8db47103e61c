"""Finds the checkpoint from which a run continues, and says whether the continuation can be exact."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.configuration import RECORDED, read_config
from tokenrl.errors import Refused
from tokenrl.runs.checkpoint import Latest, latest_checkpoint, verify_checkpoint
from tokenrl.runs.directory import RunDirectory, versions
from tokenrl.runs.files import plain

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

    What a run has measured or looked up once, such as the number of threads, it then need not again.

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
    (step,) = agreed([int(found.path.name.removeprefix("step_")) if found.path else 0])
    return found._replace(path=output_dir / "checkpoints" / f"step_{step:06d}" if step else None)


def _verified(directory: RunDirectory, resume: str) -> Latest:
    path = Path(resume)
    strange = "\0" in resume  # no path can have it
    if resume != "auto" and (strange or path.resolve() != directory.path.resolve()):
        if strange or path.parent.resolve() != directory.checkpoints.resolve():
            raise Refused(
                f"resume was given as {resume!r}; it must be auto, or a checkpoint of the run in output_dir, "
                f"such as {directory.checkpoints / 'step_000100'}. To start a new run from the weights of "
                "another, give its checkpoint as --model."
            )
        verify_checkpoint(path)
        return Latest(path, [])
    found = latest_checkpoint(directory.checkpoints)
    if found.path is None and (found.skipped or (directory.model.exists() and directory.steps != 0)):
        why = " ".join(found.skipped) or "It holds a model, but no checkpoint."
        raise Refused(
            f"The run in {directory.path} cannot be continued. {why} To start it again, which replaces what "
            "it holds, add --overwrite and leave --resume out."
        )
    return found


def check_settings(directory: RunDirectory, settings: Mapping[str, Any]) -> list[str]:
    """Compare the settings with those of the run in the directory; return in words what makes it inexact.

    Raises:
        Refused: a setting differs that decides what the run learns.
    """
    if not directory.config.exists():
        return []
    ours, stored = plain(settings), read_config(directory.path)
    names = {*ours, *stored}.difference(RECORDED, FREE) | {"kind"}
    missing = "(not there)"
    differ = {
        name: f"{name}: {stored.get(name, missing)!r}, now {ours.get(name, missing)!r}"
        for name in sorted(names)
        if stored.get(name) != ours.get(name)
    }
    wrong = [text for name, text in differ.items() if name not in ROUNDING]
    if wrong:
        raise Refused(
            f"The run in {directory.path} was started with other settings: {'; '.join(wrong)}. Continue it "
            "with its own, which `--config` and the config.json of the run give too, or start another run in "
            "another output_dir."
        )
    return list(differ.values())


@dataclass
class Maker:
    """What a run is made from, and where it runs: both are compared with those of the checkpoint.

    Attributes:
        fingerprints: of the data, the tokenizer and the base model, by these names.
        processes: the number of processes.
        device: `cpu`, or the kind of another device.
        inexact: what may make the continuation inexact, in words; known once the state is loaded.
    """

    fingerprints: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    device: str = "cpu"
    inexact: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation is compared with."""
        return {
            "fingerprints": self.fingerprints,
            "processes": self.processes,
            "device": self.device,
            "processor": processor(),
            "packages": _packages(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with what made the checkpoint.

        Raises:
            Refused: the data, the tokenizer, the base model or the number of processes is another.
        """
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
        now = self.state_dict()
        there, here = ({**one["packages"], **one} for one in (state, now))
        names = ("processor", "device", *now["packages"])
        self.inexact = [f"{n} {there.get(n)}, now {here[n]}" for n in names if there.get(n) != here[n]]
        if self.device != "cpu":
            self.inexact.append(f"some kernels on {self.device} add in an order that varies")


@cache
def _packages() -> dict[str, str]:
    return {name: version for name, version in versions().items() if name != "platform"}


@cache
def processor() -> str:
    """Name the processor: with another one PyTorch may choose instructions that round differently."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
