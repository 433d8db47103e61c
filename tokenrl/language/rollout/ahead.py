"""Compiles functions of a model ahead of time, for any sizes, and keeps the code for later runs.

The first argument of such a function, `module`, is a model or a layer. Its weights are read anew in each
call, so that code holds for any module that is built alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from tokenrl.errors import TokenrlError, describe
from tokenrl.runs.directory import processor, versions
from tokenrl.runs.files import replacing

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""By precision: the largest difference from the model's own logits, in their standard deviations."""
COARSE = 0.12
"""The same for other precisions."""
KERNELS = "kernels"
"""Where the compiler's libraries are kept, beside the code that loads them."""


def code_for(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    path: Path | None,
    mark: Callable[..., None],
) -> Any:
    """Load the code of a function, or else compile it and keep it.

    Args:
        function: a function of a module, which can be imported by its name.
        arguments: its arguments in a first call.
        path: where the code is kept; None to keep none.
        mark: marks in the arguments which sizes have to change, with `torch._dynamo.mark_dynamic`: a refusal
            to compile is better than code for one size.

    Returns:
        The code. It is called like the function, but checks nothing; its `guard_check` says whether it holds
        for some arguments.
    """
    code: Any = None
    with _kernels_in(None if path is None else path.parent / KERNELS):
        if path is not None and path.is_file():
            # What cannot be loaded is made again.
            with contextlib.suppress(Exception), path.open("rb") as file:
                code = torch.compiler.load_compiled_function(file)  # type: ignore[attr-defined]
        if code is None or not code.guard_check(*arguments):
            mark(*arguments)  # not before, for kept code holds for unmarked arguments alone
            code = compiled(function, arguments)
            if path is not None:
                _keep(code, path)
    code.disable_guard_check()
    return code


@contextlib.contextmanager
def _kernels_in(directory: Path | None) -> Iterator[None]:
    """Let the compiler keep here what kept code loads: its own directory may be gone after a restart."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    try:
        if directory is not None:
            os.environ[name] = str(directory)
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Compile a function for any sizes of its marked arguments, and for any number of threads."""
    options: dict[str, Any] = {
        "guard_filter_fn": _of_sizes,
        "cpp.threads": os.cpu_count() or 1,  # the most that it can use
        "cpp.dynamic_threads": True,  # of which it uses as many as torch does
    }
    with (
        # The numbers of a model, such as the epsilon of its norms, never change.
        torch._dynamo.config.patch(specialize_float=True),
        # Equal numbers, such as those of rows and of a head's width, are different sizes.
        torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        whole: Any = torch.compile(function, fullgraph=True, dynamic=True, options=options)
        return whole.aot_compile((arguments, {}))


def failure_of(error: Exception) -> str:
    """Say in a line why there is no code: a compiler may be missing, or fail in any way.

    Raises:
        torch.OutOfMemoryError: that is the error; it has nothing to do with compiling.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return shorten(describe(error), 140, placeholder=" ...")


def file_of(
    directory: Path | None, model: nn.Module, part: nn.Module, sources: Sequence[str], **depends: Any
) -> Path | None:
    """Return the file of the code of a part of a model, named after all that the code depends on.

    Args:
        directory: where code is kept; None to keep none.
        model: a causal language model.
        part: the model or one of its layers.
        sources: names of the modules whose source decides what is compiled.
        **depends: what else decides it, as strings and numbers.

    Returns:
        The path; None where no code can be kept.
    """
    # The code of a model that is a program of its own may change without a change of version.
    library = type(model).__module__.partition(".")[0]
    if directory is None or library not in ("transformers", "peft"):
        return None
    inner: Any = model
    known = depends | {
        "source": [inspect.getsource(sys.modules[name]) for name in (__name__, *sources)],
        "versions": versions(),
        "processor": [processor(), str(getattr(torch.cpu, "get_capabilities", list)())],
        "device": str(next(model.parameters()).device),
        "processors": os.cpu_count(),
        "modules": str(part),
        "config": inner.config.to_json_string(use_diff=False),
        "attention": inner.config._attn_implementation,
        "weights": [(n, str(p.dtype), list(p.shape), p.requires_grad) for n, p in part.named_parameters()],
    }
    return directory / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]}.bin"


def _keep(code: Any, path: Path) -> None:
    """Write code where that is possible; it can be used anyway."""
    with contextlib.suppress(OSError, TokenrlError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            code.save_compiled_function(str(temporary))


def _of_sizes(guards: Sequence[Any]) -> list[bool]:
    """Choose the conditions that are checked: those of sizes and strides. All others hold in a run."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]
