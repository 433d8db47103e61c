"""Saves the state of a run in checkpoints, each of which is complete or absent, and restores it.

A checkpoint is a folder such as checkpoints/step_000100: the model, which also loads by itself, the rows of
metrics.jsonl and timings.jsonl up to its step, and in trainer_state.pt everything else that a continuation
needs. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenrl.configuration import TrustArguments
from tokenrl.errors import USER_CODE_FAILED, Refused, Stopped, raised, refusing
from tokenrl.files import State, atomic_directory, remove, trial_directory, verify
from tokenrl.runs.best import Best, SelectionArguments
from tokenrl.runs.directory import remove_debris
from tokenrl.settings import Count, Natural, NonNegative
from tokenrl.user_code import guarded, user_code

if TYPE_CHECKING:
    from torch import Tensor

_STATE = "trainer_state.pt"


@dataclass(frozen=True)
class SavingArguments(SelectionArguments, TrustArguments, group="checkpoints"):
    """When a run saves checkpoints, and from which it continues.

    A checkpoint is also saved at the end of a run and when a signal ends it. A step that fails saves nothing:
    the run then continues from the last checkpoint.
    """

    save_every: Natural = 0
    """Steps between checkpoints; 0: by time alone."""
    save_minutes: NonNegative = 10.0
    """Minutes between checkpoints; 0: by steps alone."""
    keep_checkpoints: Count = 2
    """How many checkpoints are kept, the newest ones."""
    resume: str | None = None
    """Continue the run that output_dir holds, bit for bit, as if it had never ended: auto takes its newest
    whole checkpoint, and starts the run where there is none yet; or name a checkpoint. The other settings
    must be those of the run; only max_steps and what concerns saving, logging and safety stops
    may change."""


class Resumable(Protocol):
    """A part of a training whose state must be saved to continue the run."""

    def state_dict(self) -> State:
        """Return the state."""

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned; arrays come back as tensors."""


class Model(Protocol):
    """What a training trains, as a folder of files."""

    def write(self, folder: Path) -> None:
        """Write the model into an empty folder, from which it can also be loaded by itself."""

    def read(self, folder: Path) -> None:
        """Give the model, as it was made from the settings, the weights that `write` wrote."""

    def tensors(self) -> Iterable[Tensor]:
        """Return the weights that are trained."""

    def check(self, folder: Path) -> None:
        """Refuse a model that would be another one when saved into an empty folder and loaded from there."""


class Saver:
    """Saves checkpoints of a model and of all else that a run needs in order to continue."""

    def __init__(
        self,
        folder: Path,
        args: SavingArguments,
        model: Model,
        parts: Mapping[str, Resumable],
        remember: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Prepare.

        Args:
            folder: the run's folder `checkpoints`.
            args: how often to save.
            model: what is trained.
            parts: everything else that has a state, by name. They are restored in this order, before the
                model.
            remember: writes beside the weights in a folder what they were trained on.
        """
        self._remember = remember
        self._folder = folder
        self._args = args
        self._model = model
        self.best = Best(args)
        self._parts = {**parts, "best": self.best}
        self._saved = -1
        self._saved_at = time.monotonic()

    def check(self, parts: Mapping[str, Resumable], *, main: bool) -> None:
        """Save the model and the states of some parts once before the first step, and read them again.

        Args:
            parts: the parts whose states a user's code may make.
            main: whether this is the main process; the others do nothing.

        Raises:
            Refused, Stopped: the model or a state cannot be saved, or not so that the same is read again.
        """
        if not main:
            return
        with trial_directory(self._folder.with_name("model")) as folder:
            self._model.check(folder)
            for name, part in parts.items():
                try:
                    with user_code():
                        write_state(folder, {name: part.state_dict()}, repr(name))
                        part.load_state_dict(_load(folder)[name])
                except Stopped as error:
                    raise Refused(str(error)) from error
                except USER_CODE_FAILED as error:
                    raise Refused(_not_plain(repr(name), error)) from error

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due: by the steps or the time since the last, or as the best one."""
        if step <= self._saved:
            return False
        args = self._args
        minutes = (time.monotonic() - self._saved_at) / 60
        is_step = args.save_every > 0 and step > 0 and step % args.save_every == 0
        is_time = 0 < args.save_minutes <= minutes
        return is_step or is_time or self.best.until() == step

    def save(self, step: int, logs: Iterable[Path]) -> None:
        """Save the state after a step, unless it is saved already.

        Args:
            step: the step, of which everything has been done, and nothing yet of the next one.
            logs: metrics.jsonl and timings.jsonl, which end with this step.

        Raises:
            Stopped: the weights are not finite, or the checkpoint could not be written or not be read again.
        """
        import torch

        if step == self._saved:
            return
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._model.tensors()):
            raise Stopped(
                f"After step {step} the weights are not finite, so they are not saved. The learning rate is the "
                "likely cause: lower it, and start again."
            )
        remove_debris(self._folder)
        path = self._folder / f"step_{step:06d}"
        with atomic_directory(path) as partial:
            self._model.write(partial)
            self._remember(partial)
            for log in logs:
                path = copy_of(log.name, partial)
                path.parent.mkdir(exist_ok=True)
                shutil.copyfile(log, path)
            state: State = {"step": step}
            for name, part in self._parts.items():
                with guarded(f"The state of the {name} could not be read"):  # it may be user code
                    state[name] = part.state_dict()
            write_state(partial, state, "this run")  # before older ones go
        self._saved = step
        self._saved_at = time.monotonic()
        # remove all but the newest checkpoints, and the best one that each of these knows of
        count = self._args.keep_checkpoints
        paths = checkpoints(self._folder)
        best = {self.best.until(step_of(path)) for path in paths[-count:]}
        for older in (path for path in paths[:-count] if step_of(path) not in best):
            # a removal cut short must not leave half of it
            hidden = older.with_name(f".{older.name}.old")
            # no reason to end a run whose newest checkpoint is complete
            with contextlib.suppress(OSError):
                os.rename(older, hidden)
                remove(hidden)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            Refused: the state does not fit this run.
        """
        state = read_state(path)
        fault = f"The state in {path} does not fit this run"
        with (
            refusing(fault, "Continue with the model and the tokenrl that saved it."),
            user_code(),
        ):
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
        self._model.read(path)
        self._saved = step_of(path)

    def read_best(self, step: int) -> None:
        """Give the model the best weights, if these are to be kept and are not those of `step`, the last.

        Raises:
            Refused: the checkpoint that holds them is damaged.
        """
        best = self.best.until()
        if best in (None, step):
            return
        path = self._folder / f"step_{best:06d}"
        verify(path)
        self._model.read(path)


def checkpoints(folder: Path, suffix: str = "") -> list[Path]:
    """List the checkpoints, oldest first, by number: as text, step_1000000 would come before step_999999."""
    paths = folder.glob(f"step_*{suffix}")
    numbered = [path for path in paths if path.name[5:].removesuffix(suffix).isdecimal()]
    return sorted(numbered, key=step_of)


def tables(folder: Path) -> list[Path]:
    """List the tables of completions that a run wrote into a folder, oldest first."""
    return checkpoints(folder, ".parquet")


def copy_of(log: str, checkpoint: Path) -> Path:
    """Return the copy of metrics.jsonl or timings.jsonl in a checkpoint, where no reader takes it for a run's."""
    return checkpoint / "logs" / log


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, or of a table of completions, from its name."""
    return int(path.stem.removeprefix("step_"))


def write_state(folder: Path, state: Any, owner: str) -> None:
    """Write dicts and lists of plain values, tensors and arrays into trainer_state.pt, which can be read again.

    Args:
        folder: the folder.
        state: the state.
        owner: whose state it is, for a message.

    Raises:
        Stopped: the state holds something else, which cannot be read again.
        OSError, RuntimeError: the disk is full.
    """
    import numpy as np
    import torch
    from torch.utils._pytree import tree_map

    def savable(leaf: Any) -> Any:
        """Return a leaf as `torch.load(weights_only=True)` reads it back, which knows no arrays."""
        if isinstance(leaf, np.ndarray | torch.Tensor):
            return torch.as_tensor(leaf).detach().cpu()
        return leaf.item() if isinstance(leaf, np.generic) else leaf

    try:
        with (folder / _STATE).open("wb") as file:
            torch.save(tree_map(savable, state), file)
        _load(folder, mmap=True)  # what the tensors hold need not be read
    except RuntimeError as error:
        # Torch tells a position, and the system that the disk is full.
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    except OSError:
        raise
    except Exception as error:  # pickle raises errors of all kinds
        raise Stopped(_not_plain(owner, error)) from error


def _not_plain(owner: str, error: BaseException) -> str:
    """Say that a state cannot be read again, what it holds or else the error, and what helps."""
    kind = re.search(r"GLOBAL (\S+)", str(error))
    fault = f"it holds a {kind[1]}" if kind else raised(error)
    return (
        f"The state of {owner} cannot be saved and read again: {fault}. Let each state_dict return numbers, "
        "text, tensors and arrays, in dicts and lists, and each load_state_dict take them."
    )


def read_state(folder: Path) -> State:
    """Read what `write_state` wrote; tensors are on the CPU, and arrays have become tensors.

    Raises:
        Refused: the file is missing or damaged, or it holds code, which is not run.
    """
    with refusing(
        f"{folder} holds no state from which a run can continue",
        "Give another checkpoint, or start from its weights with --model.",
    ):
        return _load(folder)


def _load(folder: Path, mmap: bool = False) -> State:
    import torch

    file = folder / _STATE
    return dict(torch.load(file, weights_only=True, map_location="cpu", mmap=mmap))
