"""Finds saved models, and refuses what is none before a library reads it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenrl.configuration import read_config
from tokenrl.errors import Refused, read_file, refusing
from tokenrl.files import model_directory
from tokenrl.language.policy.arguments import TINY, run_of
from tokenrl.runs.threads import alone

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
        Refused: neither a directory nor a model of the hub has this name, or the directory is a damaged
            checkpoint, holds no language model, or one of its files is cut short or no JSON.
    """
    from safetensors import safe_open

    folder = Path(model_directory(name_or_path))
    if not folder.is_dir():
        if name_or_path == TINY:
            raise Refused(
                "tiny is a new model, to be trained: name the directory of the run that trained it."
            )
        _check_hub(str(name_or_path))
        return str(name_or_path)
    for file in sorted(folder.iterdir()):  # transformers goes on without a generation_config.json
        fault = f"The file {file.name} of the model in {folder} is damaged"
        with refusing(fault, "Copy or save the model once more."):
            if file.suffix == ".json":
                json.loads(read_file(file))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # its header must cover the whole file
                    pass
    if fault := _fault_of(folder, name_or_path):
        raise Refused(
            f"{name_or_path} {fault}. A model is a local directory written by save_pretrained, or a hub name."
        )
    return str(folder)


def _check_hub(name: str) -> None:
    """Ask the hub once whether it has a model; transformers itself would ask for a minute without a network.

    Raises:
        Refused: there is no such model, or the hub cannot be asked and no copy of the model is in its cache.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError

    fault = (
        f"There is no directory {name!r} in {Path.cwd()}, and no such model was found on the hub"
    )
    files = "config.json", "adapter_config.json"
    # transformers says how to ask for access to a gated model
    with refusing(fault, "Give one that is there."), suppress(GatedRepoError):
        if not any(try_to_load_from_cache(name, file) for file in files):
            HfApi().model_info(name, timeout=10)


def _fault_of(folder: Path, name_or_path: str | Path) -> str:
    """Say what a directory is instead of a model with its tokenizer; an empty text if it is a model.

    Args:
        folder: the directory that should hold the model.
        name_or_path: the directory that the user named, which may be the directory of a run.
    """
    files = {file.name for file in folder.iterdir()}
    run = run_of(name_or_path)
    kind = None if run is None else read_config(run).get("kind")  # a model's config.json has none
    if kind is not None and run == folder.resolve():
        latest = max((folder / "checkpoints").glob("step_*"), default="none yet")
        return f"is a run that has saved no model. Its latest checkpoint: {latest}"
    if not files & {"config.json", "adapter_config.json"}:
        return "holds no saved model: it has no config.json"
    if not any(re.match(r"tokenizer|vocab|.*\.model$", name) for name in files):
        return "has no tokenizer beside its model: save it there with save_pretrained too"
    return ""


def refuse_attention_of_hub(name: str, revision: str | None = None) -> None:
    """Refuse a model whose configuration names an attention that transformers would get from the hub.

    Args:
        name: a directory or hub name.
        revision: the revision on the hub; None for the newest.
    """
    from transformers.utils import cached_file

    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(name, "config.json", revision=revision, **options)
    if file is None:  # an adapter has none
        return
    text = json.dumps(json.loads(read_file(Path(file))))  # without escapes
    if match := re.search(r'attn_implementation[^"]*": (\{[^}]*|"[^"]*/[^"]*")', text):
        raise Refused(
            f"The configuration of {name!r} asks for a program from the hub ({match[0]}): take that out of its "
            "config.json, or allow it with trust_remote_code."
        )


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
    hint = "" if trust_remote_code else " Code shipped with a model runs with trust_remote_code."
    remedy = f"Give a local directory written by save_pretrained, or a hub name.{hint}"
    with refusing(f"No {kind} could be loaded from {source!r}", remedy), quietly():
        if not trust_remote_code:
            refuse_attention_of_hub(source)
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """Hide progress bars and warnings of transformers inside the block, and warnings between it and peft.

    Its table of weights that do not fit is for `load_policy` to tell in a sentence. A run has a progress bar of
    its own. Peft asks a model whether it recomputes activations under the name that this had before transformers
    5. It warns of tied embeddings, which `merged` takes care of, and of adapters whose weights are not loaded.
    """
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with alone(), warnings.catch_warnings():  # which loads in a type of the whole process
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
            )
            warnings.filterwarnings("ignore", ".*tied|.*is a no-op", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
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


CONTEXTS = """max_position_embeddings n_positions max_seq_len max_sequence_length max_seq_length n_ctx
seq_length context_length max_target_positions"""
"""Names under which configurations have the size of a context."""


def context_of(config: Any) -> int | None:
    """Return the most tokens of a sequence, as the configuration of a model says; None without a limit."""
    sizes = [getattr(config, name, None) or 0 for name in CONTEXTS.split()]
    return next((size for size in sizes if size > 0), None)  # XLNet's is -1


def switch_dropout_off(model: nn.Module) -> None:
    """Set every dropout rate to zero, leave the logits of routers out of the output, and name its parts.

    With dropout, what is scored is not what was sampled from. Of the logits the model would make a loss. Models
    of transformers fail where a configuration asks for tuples.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config.return_dict = True
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        clear_rates(module)
    model.eval()


def clear_rates(part: Any) -> None:
    """Set the dropout rates to zero that a module hands to functions, or reads in its configuration."""
    for name, value in list(vars(part).items()):
        if isinstance(value, float) and re.search("dropout|^layerdrop$", name):
            setattr(part, name, 0.0)
