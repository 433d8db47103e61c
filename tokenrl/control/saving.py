"""Saves and loads a policy: policy.json holds its shape, policy.safetensors its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tokenrl.control.policies import Policy, Shape
from tokenrl.errors import Refused, describe
from tokenrl.runs.files import write_json
from tokenrl.runs.folders import model_directory


def read_policy(folder: str | Path) -> Policy:
    """Read the policy that was saved in a folder, a run directory or its `model/`.

    Raises:
        Refused: the folder holds no policy, or it is damaged.
    """
    place = Path(model_directory(folder))
    try:
        shape: dict[str, Any] = json.loads((place / "policy.json").read_text("utf-8"))["shape"]
        policy = Policy(Shape(**shape | {"hidden": tuple(shape["hidden"])}))
        policy.load_state_dict(load_file(place / "policy.safetensors"))
    except Exception as error:  # JSON, shapes and weights each have errors of their own
        text = f"No policy could be read from {place} ({describe(error)}). Give that of a control run."
        raise Refused(text) from error
    return policy


@dataclass(frozen=True)
class SavedPolicy:
    """A policy in the files of a run.

    Attributes:
        policy: the policy that is trained.
        env: id of its environment.
    """

    policy: Policy
    env: str

    def write(self, folder: Path) -> None:
        """Write the policy into an existing folder."""
        write_json(folder / "policy.json", {"shape": self.policy.shape, "env": self.env})
        save_file(self.policy.state_dict(), folder / "policy.safetensors")

    def read(self, folder: str | Path) -> None:
        """Give the policy exactly the weights, and the scale of observations, that were saved in a folder.

        Raises:
            Refused: the folder holds no policy, or one of another shape.
        """
        saved = read_policy(folder)
        wanted, found = vars(self.policy.shape), vars(saved.shape)
        # How the weights began is no matter, since those that are loaded replace them.
        differ = [name for name in wanted if found[name] != wanted[name] and name != "initial_weights"]
        if differ:
            other = ", ".join(f"{name} {found[name]!r} instead of {wanted[name]!r}" for name in differ)
            raise Refused(f"The policy in {folder} has {other}. Give these settings, or leave load out.")
        self.policy.load_state_dict(saved.state_dict())

    def tensors(self) -> Iterable[Tensor]:
        """Return all that `write` writes, which must be finite."""
        return self.policy.state_dict().values()

    def fingerprint(self) -> str:
        """Return a hash of the weights and of all else that is saved."""
        return hashlib.sha256(save(self.policy.state_dict())).hexdigest()
