"""Measures seconds per training step against TRL's GRPOTrainer, in one run on one machine.

Both train the same new model on the same prompts, with the same group size, completion length,
optimiser and number of updates; TRL with the loss it calls "grpo", tokenrl with its preset of that name.
Rounds alternate, so that a machine that slows down slows both. The program prints the median ratio
over the rounds.

    pip install -c constraints.txt -e '.[benchmarks]'
    python recipes/benchmarks/step_against_trl.py
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, TrainerCallback

import tokenrl
from toy_tasks.models import TinyModel

LETTERS = "".join(chr(c) for c in range(33, 127))

# name: (layers, prompts a step, tokens a prompt, new tokens, whether completions may end early)
WORK = {
    "fixed": (4, 8, 10, 32, False),
    "long_prompt": (4, 8, 64, 32, False),
    "short": (4, 16, 10, 8, False),
    "variable": (4, 8, 10, 32, True),
}


def reward(completions, **columns):
    """Something cheap that differs within a group."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds, self.began = [], 0.0

    def on_step_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)


def time_trl(model, tokenizer, prompts, args, work, folder):
    from trl import GRPOConfig, GRPOTrainer

    _, per_step, _, length, early = work
    config = GRPOConfig(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=per_step * args.generations,
        num_generations=args.generations,
        max_completion_length=length,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        generation_kwargs={} if early else {"min_new_tokens": length},
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def time_tokenrl(model, tokenizer, prompts, args, work, folder):
    from types import SimpleNamespace

    from tokenrl.language import wrap
    from tokenrl.runs import read_metrics

    _, per_step, _, length, early = work
    policy = wrap(model, tokenizer)
    if not early:
        policy.eos_ids = ()
    task = SimpleNamespace(
        name="benchmark",
        train_prompts=prompts,
        eval_prompts=prompts[:1],
        reward=reward,
        max_completion_length=length,
    )
    tokenrl.train(
        model=policy,
        task=task,
        estimator="grpo",
        output_dir=folder,
        max_steps=args.steps,
        prompts_per_step=per_step,
        num_generations=args.generations,
        learning_rate=1e-4,
        eval_every=0,
        eval_generations=0,
        log_completions=0,
        mixed_precision="bf16" if args.bf16 else "no",
        quiet=True,
    )
    rows = read_metrics(f"{folder}/timings.jsonl")
    return [row["collect"] + row["update"] for row in rows]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--steps", type=int, default=20, help="steps a round; the first three are left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    disable_progress_bars()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds of {args.steps} steps"
    )
    for name in args.work:
        work = WORK[name]
        generator = torch.Generator().manual_seed(0)
        letters = torch.randint(len(LETTERS), (work[1] * (args.steps + 1), work[2]), generator=generator)
        prompts = [{"prompt": "".join(LETTERS[i] for i in row)} for row in letters.tolist()]
        base, tokenizer = TinyModel(tuple(LETTERS), layers=work[0], context=256)(0)
        ratios, ours, theirs = [], [], []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                a = time_trl(copy.deepcopy(base), tokenizer, prompts, args, work, folder)
            with tempfile.TemporaryDirectory() as folder:
                b = time_tokenrl(copy.deepcopy(base), tokenizer, prompts, args, work, f"{folder}/run")
            theirs.append(statistics.median(a[3:]))
            ours.append(statistics.median(b[3:]))
            ratios.append(theirs[-1] / ours[-1])
        print(
            f"{name:12} TRL {statistics.median(theirs):.3f} s, "
            f"tokenrl {statistics.median(ours):.3f} s a step; "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
