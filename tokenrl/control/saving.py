"""Saves and loads a policy: policy.json holds its shape, policy.safetensors its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenrl.control.policies import Policy, Shape
from tokenrl.errors import Refused, describe
from tokenrl.runs.files import write_json
from tokenrl.runs.outcome import model_directory


def save_policy(policy: Policy, folder: Path, **facts: Any) -> None:
    """Write a policy into an existing folder; `facts`, such as the environment, go into policy.json."""
    write_json(folder / "policy.json", {"shape": policy.shape, **facts})
    save_file(policy.state_dict(), folder / "policy.safetensors")


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
        raise Refused(
            f"No policy could be read from {place} ({describe(error)}). Give the output directory of a "
            "control run, or one of its checkpoints."
        ) from error
    return policy


def load_policy(policy: Policy, folder: str | Path) -> None:
    """Give a policy the weights of a saved policy of the same shape.

    Raises:
        Refused: the folder holds no policy, or one of another shape.
    """
    saved = read_policy(folder)
    wanted, found = vars(policy.shape), vars(saved.shape)
    # How the weights began is no matter, since those that are loaded replace them.
    differ = [name for name in wanted if found[name] != wanted[name] and name != "initial_weights"]
    if differ:
        other = ", ".join(f"{name} {found[name]!r} instead of {wanted[name]!r}" for name in differ)
        raise Refused(
            f"The policy in {folder} has {other}. Give the settings it was trained with, or leave load out."
        )
    policy.load_state_dict(saved.state_dict())


@dataclass(frozen=True)
class SavedPolicy:
    """The weights of a policy, for the checkpoints of a run.

    Attributes:
        policy: the policy that is trained.
        env: id of its environment.
    """

    policy: Policy
    env: str

    def write(self, folder: Path) -> None:
        """Write the policy into an existing folder."""
        save_policy(self.policy, folder, env=self.env)

    def read(self, folder: Path) -> None:
        """Give the policy exactly the weights, and the scale of observations, that were saved in a folder.

        Raises:
            Refused: the folder holds no policy, or one of another shape.
        """
        load_policy(self.policy, folder)

    def tensors(self) -> Iterable[Tensor]:
        """Return all that `write` writes, which must be finite."""
        return self.policy.state_dict().values()


def fingerprint(policy: Policy) -> str:
    """Return a hash of a policy's weights and of all else that it saves."""
    digest = hashlib.sha256()
    for name, tensor in policy.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
