"""Compiles the forward pass of one more token, whose time goes into hundreds of small operations otherwise.

`torch.compile` makes one piece of code for all numbers of rows and of tokens: keys and values lie in memory
that was set aside, and each call sees as much of it as there are tokens. The first call takes about ten
seconds, or three where the compiler finds its own cache on the disk.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import describe
from tokenrl.language.rollout.cache import Cache

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""The variable that names the directory of the compiler's cache."""


class CompiledStep:
    """Feeds each row of a model one token, by compiled code where that fits.

    Attributes:
        failure: in words, why the model is called as it is; empty while the code does what it should.
    """

    def __init__(self) -> None:
        """Compile nothing yet: the first call does."""
        os.environ.setdefault(CACHE, str(_private_directory()))
        self.failure = ""
        options: dict[str, Any] = {"cpp.dynamic_threads": True}
        self._code: Any = torch.compile(logits_after, dynamic=True, options=options)

    def __call__(self, model: nn.Module, token: Tensor, cache: Cache, places: dict[str, Any]) -> Tensor:
        """Return the logits of the next token [n, V]; the cache then holds `token` [n] too."""
        arguments, length = cache.arguments(places), cache.length
        # A single row would be compiled anew, and nothing is gained by it.
        if self.failure or length is None or length < 2 or len(token) < 2:
            return logits_after(model, token, arguments)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logits: Tensor = self._code(model, token, arguments)
            return logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may be missing, or fail in any way
            self.failure = shorten(describe(error), 140, placeholder=" ...")
        cache.cut(length)
        return logits_after(model, token, arguments)


def logits_after(model: nn.Module, token: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Feed each row one token [n], and return the logits of the next [n, V].

    Args:
        model: a causal language model.
        token: the tokens.
        arguments: the cache of the tokens before, and the places of the new ones; see `Cache.arguments`.
    """
    logits: Tensor = model(token[:, None], **arguments, use_cache=True).logits
    return logits[:, -1]


def _private_directory() -> Path:
    """Return a directory for code that nobody else can write: the compiler runs what it finds there."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenrl" / "compiled"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = home.stat()
        if about.st_uid == os.getuid() and not about.st_mode & 0o022:
            return home
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tokenrl-compiled-"))
