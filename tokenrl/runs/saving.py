"""Saves the state of a run between its steps, and restores it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenrl.errors import Refused, Stopped, describe
from tokenrl.runs.arguments import SavingArguments
from tokenrl.runs.checkpoint import Resumable, save_checkpoint
from tokenrl.runs.rescue import rescue
from tokenrl.runs.states import frozen, read_state, versions, write_state


class Model(Protocol):
    """What a training trains, as a folder of files."""

    def write(self, folder: Path) -> None:
        """Write the model into an empty folder, from which it can also be loaded by itself."""

    def read(self, folder: Path) -> None:
        """Give the model, as it was made from the settings, the weights that `write` wrote."""

    def tensors(self) -> Iterable[Tensor]:
        """Return the weights that are trained."""


class Saver:
    """Saves checkpoints of a model and of all else that a run needs in order to continue.

    Attributes:
        step: the step whose state was last settled, that is, whole.
    """

    def __init__(self, folder: Path, args: SavingArguments, *, active: bool = True) -> None:
        """Prepare.

        Args:
            folder: the run's folder `checkpoints`.
            args: how often to save.
            active: whether this process saves; the others only continue from what it has saved.
        """
        self.step = 0
        self._folder, self._args, self._active = folder, args, active
        self._model: Model | None = None
        self._parts: dict[str, Resumable] = {}
        self._state: dict[str, Any] = {}
        self._versions: list[int] = []
        self._saved, self._at = 0, time.monotonic()

    def keep(self, model: Model, parts: dict[str, Resumable]) -> None:
        """Register what checkpoints hold: what is trained, and everything else that has a state, by name.

        The parts are restored in their order, and before the model.
        """
        self._model, self._parts = model, parts

    def settle(self, step: int) -> None:
        """Note that the state of this step is whole: should the next step fail, this state can be saved."""
        if step > self.step and self._active:
            self.step = step
            state = self._live()
            self._state, self._versions = frozen(state), self._changes(state)

    def check_finite(self, step: int) -> None:
        """Refuse weights that are not finite.

        Raises:
            Stopped: a weight is NaN or infinite.
        """
        if not self._finite():
            raise Stopped(
                f"After step {step} the weights are not finite, so they are not saved. The learning rate is "
                "the likely cause: lower it, and start again."
            )

    @property
    def needed(self) -> int:
        """About how many bytes a run needs: its checkpoints, with two moments per weight, and a model."""
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())
        return weights * (3 * (self._args.keep_checkpoints + 1) + 1) if self._active else 0

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due by the number of steps or by the time since the last."""
        args, minutes = self._args, (time.monotonic() - self._at) / 60
        by_steps = bool(args.save_every) and step % args.save_every == 0
        return self._active and step > self._saved and (by_steps or 0 < args.save_minutes <= minutes)

    def save(self) -> Path | None:
        """Save the state that was settled last; return the checkpoint, None if there is nothing to save.

        Raises:
            Stopped: the weights are not finite, or the checkpoint could not be written.
        """
        path = self._save_in(self._folder)
        if path is not None:
            self._saved, self._at = self.step, time.monotonic()
        return path

    def rescue(self) -> str:
        """Save what was trained in another place, since the run's folder cannot be written; say where.

        That is the state that was settled last, or, if a further step has changed the weights, those alone.
        """
        if not self._finite():
            return ""
        start = "start another run from the weights with --model."
        move = f"Move that folder into {self._folder} to continue from it, or {start}"
        return rescue(self._save_in, "The state of the run was", move) or rescue(
            self._weights_in, "The weights alone were", start.capitalize()
        )

    def _weights_in(self, folder: Path) -> Path | None:
        if self._model is None or self.step == 0:
            return None
        self._model.write(folder)
        return folder

    def _save_in(self, checkpoints: Path) -> Path | None:
        model = self._model
        if model is None or self.step == 0 or self._versions != self._changes(self._live()):
            return None  # a step that failed has changed the weights: they are those of no step
        self.check_finite(self.step)

        def fill(folder: Path) -> None:
            model.write(folder)
            write_state(folder, {"step": self.step, **self._state})

        return save_checkpoint(checkpoints, self.step, fill, keep=self._args.keep_checkpoints)

    def restore(self, path: Path) -> int:
        """Continue from a checkpoint; return its step.

        Raises:
            Refused: the state does not fit this run.
        """
        assert self._model is not None, "keep comes before restore"
        state = read_state(path)
        for name, part in self._parts.items():
            try:
                part.load_state_dict(state[name])
            except Refused:
                raise
            except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
                raise Refused(
                    f"The state of {name!r} in {path} does not fit this run ({describe(error)}). Another "
                    "version of tokenrl may have saved it: continue with that version, or start a new run "
                    "from its weights with --model."
                ) from error
        self._model.read(path)
        self._saved = int(state["step"])
        self.settle(self._saved)
        return self._saved

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in self._tensors())

    def _live(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def _tensors(self) -> list[Tensor]:
        return [] if self._model is None else list(self._model.tensors())

    def _changes(self, state: dict[str, Any]) -> list[int]:
        return [*versions(state), *(tensor._version for tensor in self._tensors())]
