"""Finds the checkpoint from which a run continues, and says whether the continuation can be exact."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.configuration import check_code, read_config
from tokenrl.errors import Refused, Silent, TokenrlError, describe, read_file
from tokenrl.files import (
    TRAINED_PROMPTS,
    State,
    flat,
    plain,
    remove,
    verify,
    write_json,
    write_text,
    writing,
)
from tokenrl.runs.checkpoint import checkpoints, copy_of, step_of, tables
from tokenrl.runs.directory import (
    RunDirectory,
    directory_path,
    new_directory,
    newest,
    numbered,
)
from tokenrl.runs.metrics import LOGS
from tokenrl.runs.origin import (
    code_of,
    hash_of_value,
    hashes_of_code,
    held_values,
    module_hashes,
    name_of,
    versions,
)
from tokenrl.runs.processes import all_reduce_max, gather_objects
from tokenrl.runs.reader import Outcome
from tokenrl.runs.report import report_from_directory
from tokenrl.runs.threads import alone
from tokenrl.settings import Settings, arguments

T = TypeVar("T")

_SAVING = {"output_dir", "quiet", "save_every", "save_minutes", "keep_checkpoints"}
_SHOWING = {"logging_steps", "log_completions", "report_to", "tracker_project", "run_name"}
_ENDING = {"max_steps", "stop_after_zero_spread", "stop_after_nonfinite"}
APART = _SAVING | _SHOWING | {"resume", "overwrite", "check", "trust_run"}
"""Settings that change no number of a run."""
FREE = APART | _ENDING
"""Settings that may change when a run continues."""
ROUNDING = {
    "micro_batch_size",
    "sampling_batch_size",
    "gradient_checkpointing",
    "tokens_per_pass",
    "pass_overhead",
    "training_attention",
    "threads",
    "cpu",
    "generator",
    "generator_cache",
}
"""Settings that may change too, but then sums are rounded in another way, and the numbers drift apart."""
_PER_PROCESS = (_SAVING | _SHOWING | ROUNDING | {"trust_run", "base model"}) - {"generator"}
"""What may differ between the processes of a run; all get the weights of the main one's base model."""
_ABSENT = "(not there)"


def resume_settings(args: T, kind: str) -> T:
    """Return arguments in which what was left open is as in the run that they continue, if they continue one.

    Args:
        args: the arguments, a dataclass.
        kind: the command that runs; without an `output_dir`, its newest numbered run is continued.

    Raises:
        Refused: code would be executed that the run names and this user did not (see `check_code`).
    """
    options: Any = args
    run = str(directory_path(options.output_dir or numbered(kind, newest(kind))))
    if options.resume is None or not Path(run, "config.json").is_file():
        return args
    stored = read_config(run) | {"output_dir": run}
    left_open = [name for name, value in vars(args).items() if value is None]
    chosen = {name: stored[name] for name in left_open if name in stored}
    check_code(type(args), chosen, run, stored, trusted=options.trust_run)
    return arguments(type(args), vars(args) | chosen)


def write_failure(
    outcome: Mapping[str, Any], errors: Iterable[BaseException], **facts: list[str]
) -> str:
    """Write summary.json and the report of a run that failed; return what failed and what helps, in words.

    Args:
        outcome: the fields of `Outcome`.
        errors: what failed.
        **facts: further entries of summary.json.
    """
    run = outcome["output_dir"]
    texts = [str(e) if isinstance(e, TokenrlError) else describe(e) for e in errors]
    error = " ".join(dict.fromkeys(texts))
    remedy = "No checkpoint had been saved yet: see --save-minutes and --save-every."
    with contextlib.suppress(Refused):
        if path := find_checkpoint(run)[0]:
            remedy = f"The last complete checkpoint is {path}; --resume auto continues from it."
    failed = {**outcome, "exit_reason": "failed", "eval_after": None}
    summary = Outcome(**failed).summary() | facts | {"error": error, "remedy": remedy}
    with contextlib.suppress(Exception):  # the directory may be gone, or its disk full
        write_json(run / "summary.json", summary)
        report_from_directory(run)
    return f"{error} {remedy}"


def find_checkpoint(run: Path, resume: str = "auto") -> tuple[Path | None, list[str]]:
    """Find the checkpoint from which a run continues, and verify it.

    Args:
        run: the run directory.
        resume: `auto` for the newest checkpoint that is whole, or the path of one of the run's checkpoints.

    Returns:
        The checkpoint, None where none has been saved yet, and for each newer one what is wrong with it.

    Raises:
        Refused: there is no such checkpoint, it is damaged, or it belongs to another run.
    """
    folder = run / "checkpoints"
    if resume != "auto":
        target = Path(resume.replace("\0", "?")).resolve()  # no path has a null byte
        if target.parent != folder.resolve():
            raise Refused(
                f"resume was given as {resume!r}; it must be auto or a checkpoint of the run in output_dir, as "
                f"{folder}/step_000100. A new run takes weights with --model."
            )
        verify(Path(resume))
        return Path(resume), []
    faults: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
            return path, faults
        except Refused as fault:
            faults.append(str(fault))
    if faults or (run / "model").exists():
        reason = " ".join(faults) or "It holds a model, but no checkpoint."
        raise Refused(
            f"The run in {run} cannot be continued. {reason} To start it again, which replaces what it holds, give "
            "--overwrite and no --resume."
        )
    return None, []


def claim(
    kind: str, args: Any, locks: contextlib.ExitStack, *, main: bool
) -> tuple[list[str], int, int]:
    """Lock this process for a run; the main one also its directory, and it finds the checkpoint to continue from.

    Args:
        kind: the command that runs.
        args: its settings; None as `output_dir` takes the next of the numbered directories.
        locks: gives the locks back.
        main: whether this is the main process.

    Returns:
        What is wrong with newer checkpoints, the number of a numbered directory, and the step of the checkpoint;
        0 where there is none.

    Raises:
        Refused: the directory or the checkpoint cannot be used, or another thread makes a run.
    """
    locks.enter_context(alone())
    if not main:
        return [], 0, 0
    if args.overwrite and args.resume:
        raise Refused(
            "overwrite replaces the run in output_dir, resume continues it: give one of both."
        )
    number = 0
    if args.output_dir is None:
        directory = new_directory(kind)
        number = int(directory.path.name.rpartition("-")[2])
    else:
        path = directory_path(args.output_dir).absolute()
        directory = RunDirectory(path, may_hold_run=bool(args.overwrite or args.resume))
    locks.callback(directory.release)
    if not args.resume:
        return [], number, 0
    checkpoint, faults = find_checkpoint(directory.path, args.resume)
    return faults, number, step_of(checkpoint) if checkpoint else 0


def cut_back(run: Path, checkpoint: Path) -> float:
    """Remove what a run wrote after a checkpoint, which is made again.

    Returns:
        The seconds that the run had taken when it ended, if it had; else 0.

    Raises:
        Stopped: a file cannot be written or removed.
    """
    step = step_of(checkpoint)
    seconds = 0.0
    summary = run / "summary.json"
    with contextlib.suppress(Refused, KeyError):  # it is missing or damaged
        seconds = read_config(summary)["wall_seconds"]
    with writing(summary):
        remove(summary)
    for name in LOGS:
        write_text(run / name, read_file(copy_of(name, checkpoint)).decode())
    for path in (*checkpoints(run / "checkpoints"), *tables(run / "completions")):
        if step_of(path) > step:
            remove(path)
    return seconds


@dataclass
class Provenance:
    """What a run is made from, and where it runs: both are compared with those of the checkpoint.

    Attributes:
        fingerprints: of the data, the tokenizer and the base model, by these names.
        processes: the number of processes.
        device: `cpu`, or the kind of another device.
        trained_prompts: hashes of the prompts that the model is trained on, in this run or before.
        chosen: the fingerprints of what the user chose, whatever the seed, by which runs are compared.
        settings: the settings of the run; known once it begins.
        objects: what the task holds for settings, such as its rewards, by their names, if they count.
        code: the functions and objects of the user, by their settings, see `code_of`; known once the run begins.
        hashes: hashes of them and of the user's modules.
        caveats: what makes every continuation inexact, in words.
        inexact: what may make the continuation inexact, in words; known once the state is loaded.
    """

    fingerprints: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    device: str = "cpu"
    trained_prompts: frozenset[str] = frozenset()
    chosen: dict[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    caveats: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)

    def take_code(self, kind: type[Any]) -> None:
        """Hash the code of the run, before a file of it can change; `kind` is the dataclass of the settings."""
        self.code = code_of(kind, self.settings, self.objects)
        self.hashes = hashes_of_code(self.code)

    def state_dict(self) -> State:
        """Return what a continuation is compared with, by the part of the run that it belongs to.

        A value that has changed since the run began is state and no code, and so left out.
        """
        for name, value in held_values(self.code).items():
            if name in self.hashes and hash_of_value(value) != self.hashes[name]:
                del self.hashes[name]
        self.hashes = module_hashes() | self.hashes
        packages = {name: version for name, version in versions().items() if name != "platform"}
        return {
            "settings": plain(self.settings),
            "data or models": self.fingerprints,
            "objects": plain(self.objects, name_of),
            "code": self.hashes,
            "processes": self.processes,
            "versions": {**packages, "device": self.device},
        }

    def write(self, folder: Path) -> None:
        """Write the hashes of the prompts, in their order, beside the weights in a folder, and beside an adapter."""
        text = "\n".join([*sorted(self.trained_prompts), ""])
        for part in (folder, folder / "adapter"):
            if self.trained_prompts and part.exists():
                write_text(part / TRAINED_PROMPTS, text)

    def load_state_dict(self, state: State) -> None:
        """Compare with what made the checkpoint.

        Raises:
            Refused: a setting that decides what the run learns, the data, the tokenizer, the base model, the
                user's code or the number of processes is another.
        """
        self.inexact = []
        refused = []
        before = flat(state)
        self.hashes = module_hashes(state["code"]) | self.hashes
        now = flat(self.state_dict())
        for name in sorted({*before, *now}):
            part, _, key = name.partition(".")
            values = before.get(name, _ABSENT), now.get(name, _ABSENT)
            # An engine may be another, but not the same one with other code.
            is_free = key in FREE or (part == "code" and _ABSENT in values)
            if is_free or values[0] == values[1]:
                continue
            text = f"{key or part}: {values[0]!r}, now {values[1]!r}"
            if part == "versions" or key in ROUNDING:
                self.inexact.append(text)
            else:
                refused.append(text)
        if refused:
            raise Refused(
                f"The run was started otherwise: {'; '.join(dict.fromkeys(refused))}. Continue it with its own "
                "settings (--config RUN), data, code and number of processes, or start a new run from the "
                "checkpoint's weights with --model."
            )
        self.inexact += self.caveats
        if self.device != "cpu":
            self.inexact.append(f"some kernels on {self.device} add in an order that varies")


def check_processes(accelerator: Any, values: Mapping[str, Any]) -> None:
    """Compare values by name, such as settings, in all processes, but not those of `_PER_PROCESS`.

    Of data, functions and objects no text is compared: it may hold an address, or a set in any order.

    Args:
        accelerator: accelerate's handle of the processes; None in a run of a single process.
        values: the values of this process; the names are the same in all processes.

    Raises:
        Refused: a value of another process differs; all processes raise it, all but the main one `Silent`.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return
    texts = {
        name: json.dumps(values[name], skipkeys=True, default=_comparable)
        for name in sorted(values.keys() - _PER_PROCESS)
        if not isinstance(values[name], list | dict)
    }
    everywhere = gather_objects([texts])
    differing = [name for name in texts if len({each.get(name) for each in everywhere}) > 1]
    if differing:
        raise (Refused if is_main(accelerator) else Silent)(
            f"The processes of this run differ in {', '.join(differing)}. Start all of them with the same command, "
            "on the same data."
        )


def _comparable(value: object) -> object:
    return vars(value) if isinstance(value, Settings) else ""


def together(accelerator: Any, prepare: Callable[[], T]) -> T:
    """Return what `prepare` returns in this process, unless it refuses in this or in the main process.

    Args:
        accelerator: accelerate's handle of the processes; None in a run of a single process.
        prepare: what each process does, which may refuse.

    Raises:
        Refused: `prepare` refused, here or in another process.
        Silent: the main process refuses; all others raise this.
    """
    fault: TokenrlError | None = None
    try:
        result = prepare()
    except TokenrlError as error:
        fault = error
    main = is_main(accelerator)
    has_failed = fault is not None
    by_main, by_any = all_reduce_max(accelerator, [int(main and has_failed), int(has_failed)])
    if fault is not None and (main or not by_main):
        raise fault
    if by_any:
        raise (Refused if main else Silent)("Another process of this run refuses it, and says why.")
    return result


def is_main(accelerator: Any) -> bool:
    """Return whether this is the main process, which alone writes files and prints."""
    return accelerator is None or accelerator.is_main_process
