"""Private and undocumented names of libraries that the package uses, each held against the installed release.

A library may take such a name away in any release. This says at once which one, and which file needs it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import reduce
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from test_house import PACKAGE_SOURCES, Source

ROOT = Path(__file__).parents[2]
MODEL, SAVING = "language/policy/model.py", "language/policy/saving.py"
CACHE, HEAD, FORWARD = (
    "language/rollout/cache.py",
    "language/rollout/head.py",
    "language/rollout/forward.py",
)
VLLM, CHAT = "language/rollout/vllm.py", "language/rewards/environments.py"
AGENTS, METRICS = "control/environments.py", "runs/metrics.py"

NAMES = {
    "transformers.cache_utils:DynamicLayer.keys": CACHE,
    "transformers.cache_utils:DynamicLayer.values": CACHE,
    "transformers.cache_utils:DynamicLayer.is_initialized": CACHE,
    "transformers.cache_utils:DynamicLayer.update": CACHE,
    "transformers.cache_utils:DynamicLayer.get_seq_length": CACHE,
    "transformers.cache_utils:DynamicLayer.get_mask_sizes": CACHE,
    "transformers.cache_utils:DynamicLayer.reorder_cache": CACHE,
    "transformers.cache_utils:DynamicSlidingWindowLayer.sliding_window": CACHE,
    "transformers.cache_utils:DynamicSlidingWindowLayer.cumulative_length": CACHE,
    "transformers:DynamicCache.layers": CACHE,
    "transformers:DynamicCache.reorder_cache": CACHE,
    "transformers.cache_utils:LinearAttentionLayer.update_recurrent_state": CACHE,
    "transformers:PreTrainedModel._keep_in_fp32_modules_strict": FORWARD,
    "transformers:PreTrainedModel.set_attn_implementation": FORWARD,
    "transformers:PretrainedConfig._attn_implementation": FORWARD,
    "transformers:AttentionInterface.register": FORWARD,
    "transformers:AttentionMaskInterface.register": FORWARD,
    "transformers.integrations.sdpa_attention:sdpa_attention_forward": FORWARD,
    "transformers.masking_utils:sdpa_mask": FORWARD,
    "transformers:PreTrainedModel.get_output_embeddings": HEAD,
    "transformers:PreTrainedModel.enable_input_require_grads": MODEL,
    "transformers:PreTrainedModel.gradient_checkpointing_enable": MODEL,
    "transformers:PreTrainedModel.base_model_prefix": "language/preferences/data.py",
    "transformers:PretrainedConfig.get_text_config": MODEL,
    "transformers.pytorch_utils:Conv1D": MODEL,
    "transformers.utils:find_adapter_config_file": MODEL,
    "transformers.utils:cached_file": "language/policy/loading.py",
    "transformers.utils:chat_template_utils.datetime": "language/policy/prompts.py",
    "transformers.utils:logging.is_progress_bar_enabled": "language/policy/loading.py",
    "transformers.utils:logging.disable_progress_bar": "language/policy/loading.py",
    "transformers.utils:logging.enable_progress_bar": "language/policy/loading.py",
    "transformers.utils:get_json_schema": "language/rewards/tools.py",
    "transformers:PreTrainedTokenizerFast.parse_response": "language/rewards/tools.py",
    "transformers:PreTrainedTokenizerFast.backend_tokenizer": SAVING,
    "transformers.core_model_loading:revert_weight_conversion": VLLM,
    "peft.tuners.tuners_utils:BaseTunerLayer.merge": VLLM,
    "peft.tuners.tuners_utils:BaseTunerLayer.get_base_layer": VLLM,
    "peft:PeftModel.disable_adapter": MODEL,
    "peft:PeftModel.get_base_model": SAVING,
    "peft:get_peft_model_state_dict": SAVING,
    "peft:set_peft_model_state_dict": SAVING,
    "accelerate:PartialState._shared_state": "runs/processes.py",
    "accelerate.state:AcceleratorState._reset_state": "runs/processes.py",
    "accelerate.tracking:LOGGER_TYPE_TO_CLASS": METRICS,
    "accelerate.tracking:GeneralTracker.store_init_configuration": METRICS,
    "accelerate.tracking:get_available_trackers": METRICS,
    "accelerate.utils:gather_object": "runs/processes.py",
    "accelerate.utils:broadcast": "runs/processes.py",
    "torch.utils._pytree:tree_map": "runs/checkpoint.py",
    "torch.autograd.function:once_differentiable": HEAD,
    "torch.compiler:set_stance": VLLM,
    "torch:OutOfMemoryError": "language/rollout/agreement.py",
    "torch.cpu:get_capabilities": FORWARD,
    "torch.distributed:DistError": "errors.py",  # known by its name alone
    "datasets:are_progress_bars_disabled": "runs/output.py",
    "datasets:config.HF_DATASETS_CACHE": "language/tasks/sources.py",
    "gymnasium:registry": AGENTS,
    "gymnasium.envs.registration:EnvSpec.vector_entry_point": AGENTS,
    "gymnasium.vector:AutoresetMode.NEXT_STEP": AGENTS,
    "huggingface_hub.errors:GatedRepoError": "language/policy/loading.py",
    "multiprocessing.pool:ExceptionWithTraceback": "language/rewards/worker.py",
    "vllm:LLM.collective_rpc": VLLM,
    "vllm:LLM.apply_model": VLLM,
    "vllm:LLM.reset_prefix_cache": VLLM,
    "vllm:LLM.llm_engine": VLLM,
    "vllm.v1.engine.llm_engine:LLMEngine.engine_core": VLLM,
    "vllm.logprobs:FlatLogprobs.start_indices": VLLM,
}
"""By name, as `module:object.attribute`, a file of the package that uses it."""
LATER = {
    "torch.cpu:get_capabilities": ("torch", "2.10"),
}
"""Names that the lowest supported releases lack, with their own; the package asks whether they are there."""
DOCUMENTED = {"_replace", "_make", "_asdict", "_fields", "_exit"}
"""Names with which Python documents named tuples, and `os._exit`."""
UNDOCUMENTED = {"transformers", "peft", "accelerate", "datasets", "huggingface_hub", "vllm"}
"""Libraries whose documented names can be imported from the top, for the most part."""


def exists(name: str) -> bool:
    """Whether the installed library has a name; an attribute of instances counts, too."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    try:
        owner = reduce(getattr, owners, importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    declared = hasattr(owner, last) or last in getattr(owner, "__annotations__", {})
    return declared or any(re.search(rf"self\.{last}\b.* = ", text) for text in texts_of(owner))


def texts_of(owner: Any) -> list[str]:
    """The source of a class and of those that it inherits from; nothing for any other object."""
    return [inspect.getsource(c) for c in owner.__mro__[:-1]] if isinstance(owner, type) else []


@pytest.mark.parametrize("name", NAMES)
def test_the_library_still_has_the_name(name):
    library = name.partition(":")[0].partition(".")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    needed, first = LATER.get(name, (library, "0"))
    if name in LATER and Version(metadata.version(needed)) < Version(first):
        pytest.skip(f"{needed} has it from {first} on")
    assert exists(name), f"{library} has no {name} any more, which tokenrl/{NAMES[name]} needs"


def test_a_name_that_is_gone_is_noticed():
    assert exists("torch.utils._pytree:tree_map") and exists("transformers:DynamicCache.layers")
    gone = (
        "torch.utils._pytree:tree",
        "torch.utils._trees:tree_map",
        "transformers:DynamicCache.levels",
    )
    assert not any(map(exists, gone))


def test_the_files_of_the_table_use_the_names():
    texts = {name: (ROOT / "tokenrl" / file).read_text() for name, file in NAMES.items()}
    last = {name: re.split("[.:]", name)[-1] for name in NAMES}
    assert [name for name, text in texts.items() if last[name] not in text] == []


# ---- what the table lacks ----


def own_names(sources: list[Source]) -> set[str]:
    """Names with an underscore in front that the package defines itself."""
    names = set()
    for node in (node for source in sources for node in source.nodes):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        of_self = isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
        if of_self and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def private_names(source: Source, own: set[str]) -> Iterator[str]:
    """Attributes and imports with an underscore in front that are a library's; imports from inside one."""
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield from () if ast.unparse(node.value) in ("self", "cls") else (node.attr,)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
        ):
            words = [word.value for word in node.args[1:2] if isinstance(word, ast.Constant)]
            yield from (word for word in words if is_private(str(word)))
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            yield from (module for module in modules if any(map(is_private, module.split("."))))
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            library, *inner = node.module.split(".")
            names = [f"{node.module}:{alias.name}" for alias in node.names if library != "tokenrl"]
            inside = bool(inner) and library in UNDOCUMENTED
            yield from (n for n in names if inside or any(map(is_private, re.split("[.:]", n))))


def listed(name: str) -> bool:
    if ":" in name:
        return any(row == name or row.startswith(f"{name}.") for row in NAMES)
    return any(row.endswith(f".{name}") for row in NAMES)


def test_every_private_name_of_a_library_is_in_the_table():
    own = own_names(PACKAGE_SOURCES)
    used = {source.module: [*private_names(source, own)] for source in PACKAGE_SOURCES}
    assert {m: n for m, names in used.items() if (n := [x for x in names if not listed(x)])} == {}
    private = {
        last
        for last in (row.split(".")[-1] for row in NAMES)
        if is_private(last) and ":" not in last
    }
    # none is hidden by one of our own
    assert private <= {name for names in used.values() for name in names}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("schedule._last_rates = rates", "_last_rates"),
        ("getattr(model, '_no_such_modules', None)", "_no_such_modules"),
        ("from torch._dynamo import reset", "torch._dynamo:reset"),
        ("import torch._dynamo", "torch._dynamo"),
        (
            "from transformers.cache_utils import StaticLayer",
            "transformers.cache_utils:StaticLayer",
        ),
    ],
)
def test_a_name_that_is_not_in_the_table_is_noticed(line, name):
    source = Source("tokenrl.x", f"{line}\nself._mine = cls._mine = other._mine._replace(x=0)")
    assert [*private_names(source, {"_mine"})] == [name] and not listed(name)
