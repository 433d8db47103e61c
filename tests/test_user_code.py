"""Code of a user changes settings of torch for itself alone, in either interface, whichever the program used."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os

import numpy as np
import pytest
import torch
from refusals import stopped

from tokenrl.errors import USER_CODE_FAILED, Stopped, raised
from tokenrl.user_code import copied, user_code

PRECISIONS = [
    "backends.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.cudnn.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.mkldnn.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
]
NEW = [f"torch.{name} = 'ieee'" for name in PRECISIONS]
OLD = [
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
]
OTHERS = """torch.set_default_dtype(torch.float64)
torch.set_default_device('meta')
torch.set_num_threads(torch.get_num_threads() + 1)
torch.set_grad_enabled(False)
torch.use_deterministic_algorithms(True)
torch.set_deterministic_debug_mode('warn')
torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_mem_efficient_sdp(False)
torch.backends.cuda.enable_math_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)
torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.mha.set_fastpath_enabled(False)
torch.backends.cudnn.enabled = False
torch.backends.cudnn.benchmark = True
torch.backends.cudnn.deterministic = True
torch.set_autocast_enabled('cpu', True)
torch.set_autocast_dtype('cpu', torch.float16)
torch.autocast('cpu', torch.bfloat16).__enter__()
torch.no_grad().__enter__()
kept.append(torch.inference_mode()); kept[-1].__enter__()
kept.append(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)); kept[-1].__enter__()
np.seterr(all='raise')""".splitlines()
READ = """torch.get_float32_matmul_precision()
torch.backends.cuda.matmul.allow_tf32
torch.backends.cudnn.allow_tf32
torch.get_default_dtype()
torch.empty(0).device
torch.get_num_threads()
torch.is_grad_enabled()
torch.is_inference_mode_enabled()
torch.get_deterministic_debug_mode()
torch.backends.cuda.flash_sdp_enabled()
torch.backends.cuda.mem_efficient_sdp_enabled()
torch.backends.cuda.math_sdp_enabled()
torch.backends.cuda.cudnn_sdp_enabled()
torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
torch.backends.mha.get_fastpath_enabled()
torch.backends.cudnn.enabled
torch.backends.cudnn.benchmark
torch.backends.cudnn.deterministic
torch.is_autocast_enabled('cpu')
torch.get_autocast_dtype('cpu')
np.geterr()""".splitlines()
READ += [f"torch.{name}" for name in PRECISIONS]
kept = []
"""Contexts that were left open, which Python would otherwise close."""
HAS_NEW = hasattr(torch.backends, "fp32_precision")
new_interface = pytest.mark.skipif(not HAS_NEW, reason="a release of torch with the old interface")


def settings():
    """Every setting, or the error of torch where both interfaces to precision were used."""
    found = {}
    for expression in READ:
        try:
            found[expression] = str(eval(expression))
        except (RuntimeError, AttributeError) as error:
            found[expression] = type(error).__name__
    return found


@pytest.fixture(autouse=True)
def undone():
    with user_code():
        yield
    kept.clear()


CASES = [*OLD, *OTHERS, *(pytest.param(change, marks=new_interface) for change in NEW)]


@pytest.mark.parametrize("change", CASES)
def test_a_setting_that_user_code_changes_is_given_back(change):
    before = settings()
    with user_code():
        exec(change)
        assert settings() != before
    assert settings() == before


@new_interface  # an older one sets the device of the run above the one that was left
def test_what_cannot_be_given_back_is_told():
    left = torch.device("meta")
    with (
        stopped("changed default_device of torch from cpu to meta, and left"),
        user_code(),
    ):
        left.__enter__()
    left.__exit__(None, None, None)
    assert torch.empty(0).device == torch.device("cpu")


def test_an_error_of_user_code_goes_on_and_the_settings_are_given_back():
    before = settings()
    with contextlib.suppress(ZeroDivisionError), user_code():
        torch.set_default_dtype(torch.float16)
        raise ZeroDivisionError
    assert settings() == before and np.geterr()["divide"] == "warn"


@pytest.mark.parametrize(("error", "code"), [(None, 0), (SystemExit(3), 3), (ValueError("x"), 1)])
def test_a_process_that_user_code_forks_ends_where_it_would_come_out_of_the_call(error, code):
    owner = os.getpid()
    try:
        with user_code():
            child = os.fork()
            if child == 0 and error is not None:
                raise error
    finally:
        if os.getpid() != owner:
            os._exit(7)  # it would go on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


@pytest.mark.parametrize("error", [StopIteration("x"), asyncio.CancelledError("x")])
def test_what_handlers_around_would_miss_comes_out_as_a_failure_of_user_code(error):
    @contextlib.contextmanager
    def told():
        try:
            with user_code():
                yield
        except USER_CODE_FAILED as failure:
            raise Stopped(raised(failure)) from failure

    with (
        stopped(rf"raised {type(error).__name__}: x \(test_user_code.py"),
        told(),
    ):
        raise error
    with pytest.raises(KeyboardInterrupt), told():
        raise KeyboardInterrupt


def test_learning_goes_on_after_each_inference_mode_that_was_left_on():
    weight = torch.ones(1, requires_grad=True)
    for _ in range(3):
        with user_code():
            kept.append(torch.inference_mode())
            kept[-1].__enter__()
        (weight * 2).backward()
    assert weight.grad == 6


def test_a_million_texts_are_not_copied_one_by_one(monkeypatch):
    monkeypatch.delattr(copy, "deepcopy")
    state = {"scored": {str(number): 0.5 for number in range(1000)}, "pairs": [("a", 1)] * 9}
    assert copied(state) == state and copied(state)["scored"] is not state["scored"]
