"""Private and undocumented names of libraries that the package uses, each held against the installed release.

A library may take such a name away in any release. This says at once which one, and which file needs it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import reduce
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
MODEL, SAVING = "language/policy/model.py", "language/policy/saving.py"
CACHE, HEAD, FORWARD = (
    "language/rollout/cache.py",
    "language/rollout/head.py",
    "language/rollout/forward.py",
)
VLLM = "language/rollout/vllm.py"
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
    "torch._dynamo:OptimizedModule._orig_mod": "language/policy/copies.py",
    "torch:OutOfMemoryError": "language/rollout/agreement.py",
    "torch.cpu:get_capabilities": FORWARD,
    "torch.distributed:DistError": "errors.py",  # known by its name alone
    "datasets:are_progress_bars_disabled": "runs/output.py",
    "datasets:config.HF_DATASETS_CACHE": "language/tasks/sources.py",
    "gymnasium:registry": AGENTS,
    "gymnasium.envs.registration:EnvSpec.vector_entry_point": AGENTS,
    "gymnasium.vector:AutoresetMode.NEXT_STEP": AGENTS,
    "huggingface_hub.errors:GatedRepoError": "language/policy/loading.py",
    "vllm:LLM.collective_rpc": VLLM,
    "vllm:LLM.apply_model": VLLM,
    "vllm:LLM.reset_prefix_cache": VLLM,
    "vllm:LLM.llm_engine": VLLM,
    "vllm.v1.engine.llm_engine:LLMEngine.engine_core": VLLM,
    "vllm.logprobs:FlatLogprobs.start_indices": VLLM,
}
"""By name, as `module:object.attribute`, a file of the package that uses it."""


LATER = {"torch.cpu:get_capabilities": "2.11"}
"""Names that the lowest release of their library lacks, with a release that has them; the package asks for them."""


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
    if Version(metadata.version(library)) < Version(LATER.get(name, "0")):
        pytest.skip(f"{library} has it from {LATER[name]} on")
    assert exists(name), f"{library} has no {name} any more, which tokenrl/{NAMES[name]} needs"
