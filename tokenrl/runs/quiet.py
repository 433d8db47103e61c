"""Keeps libraries from printing: their progress bars and advice always, their warnings in a quiet run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def hush_libraries() -> None:
    """Turn off what would hide the lines of a run; a user can turn it on again by the same variables.

    The libraries read these environment variables when they are imported, so call this first.
    """
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)


@contextmanager
def without_warnings(quiet: bool) -> Iterator[None]:
    """Hide Python's warnings inside the block if `quiet`, such as a library's about its next version."""
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets` inside the block, and leave them as they were before.

    From Python, `datasets` may have been imported before `hush_libraries` could be called. Whoever turns the
    bars on by HF_DATASETS_DISABLE_PROGRESS_BARS=0 sees them.
    """
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    if shown and os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS") is None:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown and datasets.are_progress_bars_disabled():
            datasets.enable_progress_bars()
