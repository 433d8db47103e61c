"""Finds the files of a saved model, and refuses damaged or unsuitable ones before a library reads them.

Libraries quote the error of a damaged file without its name, and go on in silence without a
generation_config.json that cannot be read, although the tokens that end a completion stand there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.arguments import TINY
from tokenrl.runs.files import model_directory

LARGE = 10_000_000
"""Parameters of a large model, which is bound by its matrix products. A smaller one is bound by the number of
its operations: bfloat16 does not make it faster, nor does a device whose operations take long to start."""
SLOW_WITH_SMALL = ("mps",)
"""Types of such devices."""


def find_model(name_or_path: str | Path) -> str:
    """Return the local directory or the hub name from which a model can be loaded.

    Args:
        name_or_path: a directory, a hub name, or the directory of a run, which means the model it saved.

    Raises:
        Refused: neither a directory nor a model of the hub has this name; the directory is a damaged
            checkpoint or holds no language model; or one of its files is cut short or no JSON. The message
            names the file.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(model_directory(name_or_path))
    if name_or_path == TINY and not folder.is_dir():
        raise Refused(
            "tiny is a new model, to be trained: name the directory of the run that trained it."
        )
    if not folder.is_dir():
        _check_hub(str(name_or_path))
        return str(name_or_path)
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # its header must cover the whole file
                    pass
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            problem = f"The file {file.name} of the model in {folder} is damaged ({error})"
            raise Refused(f"{problem}. Copy or save the model once more.") from error
    _check_contents(folder, Path(name_or_path))
    return str(folder)


def _check_hub(name: str) -> None:
    """Ask the hub once whether it has a model; transformers itself would ask for a minute without a network.

    Raises:
        Refused: there is no such model, or the hub cannot be asked and no copy of the model is in its cache.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError

    try:
        if not any(
            try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")
        ):
            HfApi().model_info(name, timeout=10)
    except GatedRepoError:
        return  # transformers says how to ask for access
    except (
        Exception
    ) as error:  # names that cannot be, unknown models, and a network in all its states
        problem = f"There is no directory {name!r} in {Path.cwd()}, and no such model was found on the hub"
        raise Refused(f"{problem} ({describe(error)}).") from error


def _check_contents(folder: Path, named: Path) -> None:
    """Refuse a directory without a model or without a tokenizer, and say what it is instead.

    Args:
        folder: the directory that should hold the model.
        named: the directory that the user named, which may be that of a run.
    """
    if "control" in map(_kind, (folder, named, named.parent)):
        fault = "is of an agent that tokenrl control trained, which is no language model"
    elif _kind(folder) is not None:
        latest = max((folder / "checkpoints").glob("step_*"), default="none yet")
        fault = f"is a run that has not saved its model yet. Its latest checkpoint: {latest}"
        with suppress(OSError, ValueError, KeyError):
            error = json.loads((folder / "summary.json").read_bytes())["error"]
            fault = (
                f"is a run that failed and has no model ({error}). Its latest checkpoint: {latest}"
            )
    elif (folder / "plan.json").exists():
        fault = "is the directory of a comparison; give that of one of its runs"
    elif not ((folder / "config.json").exists() or (folder / "adapter_config.json").exists()):
        fault = "holds no saved model: it has no config.json of one"
    elif not [file for name in ("tokenizer*", "vocab*", "*.model") for file in folder.glob(name)]:
        fault = "has no tokenizer beside its model: save it there with save_pretrained too"
    else:
        return
    raise Refused(
        f"{named} {fault}. A model is a local directory written by save_pretrained, or a hub name."
    )


def _kind(folder: Path) -> Any:
    """Return the `kind` of the run that config.json describes; None for a model, or if it cannot be read."""
    try:
        return json.loads((folder / "config.json").read_bytes()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None


@contextmanager
def loading(kind: str, source: str, *, trust_remote_code: bool = False) -> Iterator[None]:
    """Load a model inside the block: without the libraries' progress bars, and refused where they fail.

    Args:
        kind: the kind of model, such as "causal language model", for the message.
        source: the directory or hub name that `find_model` returned.
        trust_remote_code: whether Python code that is shipped with the model may run.

    Raises:
        Refused: something in the block raised an error; the message quotes it.
    """
    hint = (
        "" if trust_remote_code else " (code shipped with a model runs only with trust_remote_code)"
    )
    try:
        with quietly():
            yield
    except Refused:
        raise
    except (
        Exception
    ) as error:  # configuration, weights and tokenizer files each have errors of their own
        cause = " ".join((str(error) or type(error).__name__).split())
        if type(error).__name__ == "UnpicklingError":  # torch's message says how to run it
            cause = "its weights are a pickle with more in it than weights, which could run as a program"
        raise Refused(
            f"No {kind} could be loaded from {source!r}{hint}: {shorten(cause, 300).rstrip('.')}. Give a "
            "local directory written by save_pretrained, or a hub name."
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block, and warnings between it and peft.

    A run has a progress bar of its own. Peft asks a model whether it recomputes activations under the name
    that this had before transformers 5, and warns of tied embeddings, which `merged` takes care of.
    """
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
            )
            warnings.filterwarnings("ignore", ".*tied", UserWarning)
            yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def device_for(parameters: int, cpu: bool | None = None) -> torch.device:
    """Return the device on which a model is computed: the accelerator if there is one, else the CPU.

    Args:
        parameters: number of the model's parameters.
        cpu: True for the CPU, False for the accelerator; None for the CPU if the accelerator is no faster.
    """
    from accelerate import PartialState

    device = PartialState().device
    if cpu is None:
        cpu = not gains_from(device, parameters)
    return torch.device("cpu") if cpu else device


def gains_from(device: torch.device | None, parameters: int) -> bool:
    """Return whether a model with so many parameters may be faster on a device than on the CPU."""
    return device is None or device.type not in SLOW_WITH_SMALL or parameters >= LARGE


def switch_dropout_off(model: nn.Module) -> None:
    """Set every dropout rate to zero, and leave the logits of routers out of the output.

    With dropout, what is scored is not what was sampled from. Of the logits the model would make a loss.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(
            vars(module).items()
        ):  # rates that the forward pass hands to functions
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
    model.eval()
