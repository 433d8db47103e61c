"""Finds the checkpoint from which a run continues, and says whether the continuation can be exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from json import JSONEncoder
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from tokenrl.configuration import check_code, read_config
from tokenrl.errors import Refused, Silent, TokenrlError
from tokenrl.runs.checkpoint import checkpoints, step_of, tables
from tokenrl.runs.directory import RunDirectory, new_directory, newest, numbered
from tokenrl.runs.files import flat, plain, remove, verify, write_text, writing
from tokenrl.runs.metrics import line_of, read_metrics
from tokenrl.runs.origin import versions
from tokenrl.settings import Settings, arguments

T = TypeVar("T")
Agreed = Callable[[Sequence[int]], Sequence[int]]

FREE = (
    *(
        "output_dir",
        "max_steps",
        "max_samples",
        "save_every",
        "save_minutes",
        "keep_checkpoints",
        "resume",
    ),
    *(
        "overwrite",
        "logging_steps",
        "log_completions",
        "quiet",
        "report_to",
        "tracker_project",
        "run_name",
    ),
    *("video", "stop_after_zero_spread", "stop_after_nonfinite", "check", "trust_run"),
)
"""Settings that may change when a run continues."""
ROUNDING = (
    *("micro_batch_size", "sampling_batch_size", "gradient_checkpointing", "training_attention"),
    *("tokens_per_pass", "threads", "cpu", "generator", "generator_cache"),
)
"""Settings that may change too, but then sums are rounded in another way, and the numbers drift apart."""
_APART = {
    *ROUNDING,
    "output_dir",
    "quiet",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "base model",
}
_APART |= {
    "logging_steps",
    "log_completions",
    "report_to",
    "tracker_project",
    "run_name",
    "trust_run",
}
_APART -= {"generator"}
"""What may differ between the processes of a run; all get the weights of the main one's base model."""
_MENDS = {
    "settings": "Continue it with its own (--config RUN), or start another run in another output_dir.",
    "data or models": "Restore them, or start a new run from the checkpoint's weights with --model.",
    "processes": "They split its steps in another way. Start it with as many as before.",
}
"""What a run and its continuation must share, and what to do where they do not."""


def resume_settings(args: T, kind: str) -> T:
    """Return arguments in which what was left open is as in the run that they continue, if they continue one.

    Args:
        args: the arguments, a dataclass.
        kind: the command that runs; without an `output_dir`, its newest numbered run is continued.

    Raises:
        Refused: code would be executed that the run names and this user did not (see `check_code`).
    """
    choices: Any = args
    output_dir = numbered(kind, newest(kind)) if choices.output_dir is None else choices.output_dir
    if choices.resume is None or not Path(output_dir, "config.json").is_file():
        return args
    stored = read_config(output_dir) | {"output_dir": str(output_dir)}
    left_open = {
        name: stored[name] for name, value in vars(args).items() if value is None and name in stored
    }
    check_code(left_open, output_dir, stored, trusted=choices.trust_run)
    return arguments(type(args), vars(args) | left_open)


def how_to_continue(run: Path) -> str:
    """Return in words from which checkpoint a run that failed can be continued."""
    with contextlib.suppress(Refused):
        if path := find_checkpoint(run)[0]:
            return f"The last complete checkpoint is {path}; --resume auto continues from it."
    return "No checkpoint had been saved yet: see --save-minutes and --save-every."


def find_checkpoint(run: Path, resume: str = "auto") -> tuple[Path | None, list[str]]:
    """Find the checkpoint from which a run continues, and verify it.

    Args:
        run: the run directory.
        resume: `auto` for the newest checkpoint that is whole and whose steps all have a row in
            metrics.jsonl; the path of one of the run's checkpoints; or the run directory
            itself, as `auto`.

    Returns:
        The checkpoint, None where none has been saved yet, and for each newer one what is wrong with it.

    Raises:
        Refused: there is no such checkpoint, it is damaged, or it belongs to another run.
    """
    folder, target = (
        run / "checkpoints",
        Path(resume.replace("\0", "?")).resolve(),
    )  # no path has a null byte
    named = resume != "auto" and target != run.resolve()
    if named and target.parent != folder.resolve():
        allowed = (
            f"it must be auto or a checkpoint of the run in output_dir, as {folder / 'step_000100'}"
        )
        raise Refused(
            f"resume was given as {resume!r}; {allowed}. A new run takes weights with --model."
        )
    reached = _recorded_until(run / "metrics.jsonl")
    skipped: list[str] = []
    for path in [Path(resume)] if named else reversed(checkpoints(folder)):
        try:
            verify(path)
            if step_of(path) > reached:
                rows = f"only the first {reached + 1} are there"
                reason = f"rows of metrics.jsonl were lost, and {rows}"
                raise Refused(f"The checkpoint {path} cannot be continued: {reason}.")
            return path, skipped
        except Refused as fault:
            if named:
                raise
            skipped.append(str(fault))
    if skipped or (reached > 0 and (run / "model").exists()):
        reason = " ".join(skipped) or "It holds a model, but no checkpoint."
        mend = "To start it again, which replaces what it holds, give --overwrite and no --resume."
        raise Refused(f"The run in {run} cannot be continued. {reason} {mend}")
    return None, []


def claim(kind: str, args: Any, *, main: bool) -> tuple[RunDirectory | None, list[str], int, int]:
    """Lock the directory of a run, and find the checkpoint to continue from, as the main process alone does.

    Returns:
        The directory, what is wrong with newer checkpoints, the number of the directory, and the step of the
        checkpoint; 0 where there is none.

    Raises:
        Refused: the directory or the checkpoint cannot be used.
    """
    if args.overwrite and args.resume:
        raise Refused(
            "overwrite replaces the run in output_dir, resume continues it: give one of both."
        )
    if not main:
        return None, [], 0, 0
    if args.output_dir is None:
        directory = new_directory(kind)
        number = int(directory.path.name.rpartition("-")[2])
    else:
        held_run = {"overwrite": args.overwrite, "resume": bool(args.resume)}
        directory, number = RunDirectory(Path(args.output_dir).absolute(), **held_run), 0
    try:
        path, skipped = find_checkpoint(directory.path, args.resume) if args.resume else (None, [])
    except Refused:
        directory.release()
        raise
    return directory, skipped, number, step_of(path) if path else 0


def _recorded_until(metrics: Path) -> int:
    """Return the last step up to which metrics.jsonl has a row for every step; -1 if it has none."""
    steps = [row.get("step") for row in read_metrics(metrics)] if metrics.exists() else []
    return next((number for number, step in enumerate(steps) if step != number), len(steps)) - 1


def cut_back(run: Path, step: int) -> None:
    """Remove what a run wrote after a step, which is made again.

    Raises:
        Refused: timings.jsonl is damaged; nothing has been removed.
        Stopped: a file cannot be written or removed.
    """
    paths = run / "metrics.jsonl", run / "timings.jsonl"
    logs = {path: read_metrics(path) for path in paths if path.exists()}
    with writing(run / "summary.json"):  # which may be a directory
        (run / "summary.json").unlink(missing_ok=True)
    for path, rows in logs.items():
        write_text(path, "".join(line_of(row) for row in rows if row["step"] <= step))
    for path in (*checkpoints(run / "checkpoints"), *tables(run / "completions")):
        if step_of(path) > step:
            remove(path)


@dataclass
class Provenance:
    """What a run is made from, and where it runs: both are compared with those of the checkpoint.

    Attributes:
        fingerprints: of the data, the tokenizer and the base model, by these names.
        processes: the number of processes.
        device: `cpu`, or the kind of another device.
        settings: the settings of the run; known once the run begins.
        caveats: what makes every continuation inexact, in words.
        inexact: what may make the continuation inexact, in words; known once the state is loaded.
    """

    fingerprints: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    caveats: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what a continuation is compared with, by the part of the run that it belongs to."""
        packages = {name: version for name, version in versions().items() if name != "platform"}
        return {
            "settings": plain(self.settings),
            "data or models": self.fingerprints,
            "processes": {"processes": self.processes},
            "versions": {**packages, "device": self.device},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare with what made the checkpoint.

        Raises:
            Refused: a setting that decides what the run learns, the data, the tokenizer, the base model or
                the number of processes is another.
        """
        differ = {part: _differences(state[part], ours) for part, ours in self.state_dict().items()}
        for part, mend in _MENDS.items():
            if wrong := [
                text for name, text in differ[part].items() if name not in (*FREE, *ROUNDING)
            ]:
                raise Refused(f"The run was started with other {part}: {'; '.join(wrong)}. {mend}")
        self.inexact = [text for name, text in differ["settings"].items() if name in ROUNDING]
        self.inexact += differ["versions"].values()
        self.inexact += self.caveats
        if self.device != "cpu":
            self.inexact.append(f"some kernels on {self.device} add in an order that varies")


def _differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """Return for each name whose values differ a text with both values."""
    stored, ours = flat(stored), flat(ours)
    return {
        name: f"{name}: {stored.get(name, '(not there)')!r}, now {ours.get(name, '(not there)')!r}"
        for name in sorted({*stored, *ours})
        if stored.get(name) != ours.get(name)
    }


def check_processes(values: Mapping[str, Any], agreed: Agreed) -> None:
    """Compare values by name, such as settings, with those of the other processes, but not those of `_APART`.

    Of data, functions and objects no text is compared: it may hold an address, or a set in any order.

    Args:
        values: the values; the names are the same in all processes.
        agreed: returns the largest of each of the numbers that all processes pass to it.

    Raises:
        Refused: a value of another process is not that of this one; all processes raise it.
    """
    names = sorted(values.keys() - _APART)
    encode = JSONEncoder(
        skipkeys=True, default=lambda x: vars(x) if isinstance(x, Settings) else ""
    ).encode
    plainly = {
        name: "" if isinstance(value := values[name], list | dict) else value for name in names
    }
    numbers = [crc32(encode(plainly[name]).encode()) for name in names]
    extremes = agreed(
        [*numbers, *(-number for number in numbers)]
    )  # the largest, and minus the least
    if wrong := [name for i, name in enumerate(names) if extremes[i] + extremes[i + len(names)]]:
        mend = "Start all of them with the same command, on the same data."
        raise Refused(f"The processes of this run differ in {', '.join(wrong)}. {mend}")


def together(main: bool, agreed: Agreed, prepare: Callable[[], T]) -> T:
    """Return what `prepare` returns in this process, unless it refuses in this or in the main process.

    Args:
        main: whether this is the main process.
        agreed: returns the largest of each of the numbers that all processes pass to it.
        prepare: what each process does, which may refuse.

    Raises:
        Refused: `prepare` refused, here or in another process. If it did so in the main process, the others
            raise `Silent`, and those too in which it did not.
    """
    try:
        result, fault = prepare(), None
    except TokenrlError as error:
        result, fault = None, error
    by_main, by_any = agreed([int(main and fault is not None), int(fault is not None)])
    if fault is not None and (main or not by_main):
        raise fault
    if by_any:
        raise (Refused if main else Silent)("Another process of this run refuses it, and says why.")
    return result  # type: ignore[return-value]
