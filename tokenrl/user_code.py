"""Runs user code, such as rewards: gives it copies, and restores the settings of torch and numpy that it changed.

A process that the code forks ends where it would come out of the call. Imports no torch.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

from tokenrl.errors import USER_CODE_FAILED, Ended, Stopped, TokenrlError, describe, raised

# The older interface to precision comes before the newer one, and the general before the particular.
SETTINGS = """get_float32_matmul_precision set_float32_matmul_precision
backends.cudnn.allow_tf32
backends.fp32_precision
backends.cudnn.fp32_precision
backends.mkldnn.fp32_precision
backends.cuda.matmul.fp32_precision
backends.cudnn.conv.fp32_precision
backends.cudnn.rnn.fp32_precision
backends.mkldnn.matmul.fp32_precision
backends.mkldnn.conv.fp32_precision
backends.mkldnn.rnn.fp32_precision
backends.cuda.matmul.allow_fp16_reduced_precision_reduction
backends.cuda.matmul.allow_bf16_reduced_precision_reduction
backends.cuda.matmul.allow_fp16_accumulation
backends.cuda.flash_sdp_enabled backends.cuda.enable_flash_sdp
backends.cuda.mem_efficient_sdp_enabled backends.cuda.enable_mem_efficient_sdp
backends.cuda.math_sdp_enabled backends.cuda.enable_math_sdp
backends.cuda.cudnn_sdp_enabled backends.cuda.enable_cudnn_sdp
backends.cuda.fp16_bf16_reduction_math_sdp_allowed backends.cuda.allow_fp16_bf16_reduction_math_sdp
backends.cuda.preferred_blas_library backends.cuda.preferred_blas_library
_C._get_sdp_priority_order _C._set_sdp_priority_order
backends.mha.get_fastpath_enabled backends.mha.set_fastpath_enabled
backends.cudnn.enabled
backends.cudnn.benchmark
backends.cudnn.deterministic
backends.mkldnn.enabled
backends.mkldnn.deterministic
is_autocast_enabled set_autocast_enabled cpu
is_autocast_enabled set_autocast_enabled cuda
is_autocast_enabled set_autocast_enabled mps
get_autocast_dtype set_autocast_dtype cpu
get_autocast_dtype set_autocast_dtype cuda
get_autocast_dtype set_autocast_dtype mps
is_grad_enabled set_grad_enabled
get_default_dtype set_default_dtype
get_num_threads set_num_threads
get_deterministic_debug_mode set_deterministic_debug_mode"""
"""Settings of torch that decide numbers: the function that returns one and the function that sets it, with
their argument, or an attribute. Releases of torch lack some."""


PLAIN = {str, int, float, bool, type(None)}
"""Types of values that cannot be changed in place."""


class Setting(NamedTuple):
    """A setting of torch: its name, and the functions that return and set it."""

    name: str
    read: Callable[[], Any]
    set: Callable[[Any], Any]


def _values(settings: Iterable[Setting]) -> list[Any]:
    """Return the values; None where torch refuses to tell, as where both interfaces to precision were used."""
    values = []
    for setting in settings:
        try:
            values.append(setting.read())
        except RuntimeError:
            values.append(None)
    return values


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """Give settings of torch and numpy back as they were after code of a user has run in the block.

    A process that the code forks never comes out of the block. StopIteration comes out as `Ended`:
    context managers and generators around the block would take it for an end of their own. So does what no
    handler of `USER_CODE_FAILED` catches, such as the CancelledError of asyncio.

    Raises:
        Stopped: a setting could not be given back.
        Ended: the code raised one of these errors.
    """
    settings = _settings()
    before = _values(settings)
    errors = sys.modules["numpy"].errstate() if "numpy" in sys.modules else contextlib.nullcontext()
    try:
        with own_process(), errors:
            yield
    except BaseException as error:
        is_usual = isinstance(error, (KeyboardInterrupt, *USER_CODE_FAILED))
        if is_usual and not isinstance(error, StopIteration):
            raise
        # contextlib raises the first error again if it is named as the cause
        raise Ended(describe(error)).with_traceback(error.__traceback__) from None
    finally:
        if _values(settings) != before:
            _restore(settings, before)


@contextlib.contextmanager
def guarded(
    failure: str, kind: type[TokenrlError] = Stopped, context: Any = user_code
) -> Iterator[None]:
    """Run code of a user in the block as `user_code` does; what it raises becomes one sentence.

    Args:
        failure: the beginning of the sentence: what has failed.
        kind: the error that is raised.
        context: what takes the place of `user_code` for code that is known to leave settings alone.

    Raises:
        TokenrlError: the code raised an error. One that is in plain words already stays as it is.
    """
    try:
        with context():
            yield
    except TokenrlError:
        raise
    except USER_CODE_FAILED as error:
        raise kind(f"{failure}: {raised(error)}.") from error


def copied(value: Any) -> Any:
    """Return a value that shares nothing with this one which could be changed in place.

    Lists and dicts of texts and numbers are copied as a whole, as there may be millions of them.
    """
    kind = type(value)
    if kind in PLAIN or kind not in (list, tuple, dict):
        return value if kind in PLAIN else copy.deepcopy(value)
    parts = value.values() if kind is dict else value
    if {*map(type, parts)} <= PLAIN:
        return value if kind is tuple else value.copy()
    copies = map(copied, parts)
    return dict(zip(value, copies, strict=True)) if kind is dict else kind(copies)


def _restore(settings: list[Setting], before: list[Any]) -> None:
    """Give all settings their values, one after the other, since one may decide others.

    Raises:
        Stopped: a setting is still another.
    """
    for setting, value in zip(settings, before, strict=True):
        if value is not None and _values([setting]) != [value]:
            with contextlib.suppress(RuntimeError):
                setting.set(value)
    for setting, value, left in zip(settings, before, _values(settings), strict=True):
        if value is not None and left != value:
            raise Stopped(
                f"Code of this run's rewards, environments, baseline, engine or callback has changed "
                f"{setting.name} of torch from {value} to {left}, and left it so that it cannot be set "
                "back. Let it change settings in a with statement."
            )


def _settings() -> list[Setting]:
    """Return the settings of this release of torch; none before torch is imported."""
    return _settings_of(sys.modules["torch"]) if "torch" in sys.modules else []


@cache
def _settings_of(torch: Any) -> list[Setting]:
    def set_device(device: Any) -> None:
        torch.set_default_device(None if device.type == "cpu" else device)  # None is the fast way

    inference = contextlib.ExitStack()  # it is kept, as a mode ends when its context is collected

    def set_inference_mode(is_on: bool) -> None:
        inference.close()
        inference.enter_context(torch.inference_mode(is_on))

    modes = torch.is_inference_mode_enabled, set_inference_mode
    settings = [
        Setting("default_device", torch.get_default_device, set_device),
        Setting("is_inference_mode_enabled", *modes),  # before the gradients, which it decides
    ]
    for entry in SETTINGS.splitlines():
        name, *setter = entry.split()
        owner, _, attribute = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            if setter:
                read = partial(attrgetter(name)(torch), *setter[1:])
                write = partial(attrgetter(setter[0])(torch), *setter[1:])
            else:
                holder = attrgetter(owner)(torch)
                read = partial(getattr, holder, attribute)
                write = partial(setattr, holder, attribute)
            setting = Setting(name, read, write)
            _values([setting])  # an AttributeError where this release lacks it
            settings.append(setting)
    return settings


@contextlib.contextmanager
def own_process() -> Iterator[None]:
    """End a process that user code forks in the block, where it would come out of the block (see `leave`)."""
    owner = os.getpid()
    try:
        yield
    finally:
        leave(owner)


def leave(owner: int) -> None:
    """End this process at once if it is not the one with the id `owner`, but was forked by user code.

    A helper that ends by `sys.exit`, by an error or by returning would otherwise do what only the owner may
    do: go on training, report a failure, or remove files and locks. Its exit code is that of Python.
    """
    if os.getpid() == owner:
        return
    error = sys.exc_info()[1]
    code = error.code if isinstance(error, SystemExit) else None
    with contextlib.suppress(Exception):  # its output may be closed
        if isinstance(code, str) or not isinstance(error, SystemExit | None):
            traceback.print_exception(error)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)
