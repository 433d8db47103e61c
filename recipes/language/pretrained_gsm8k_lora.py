"""LoRA on a pretrained instruct model: grade-school mathematics (GSM8K) with an exact-number reward.

    python recipes/language/pretrained_gsm8k_lora.py --check        everything before training
    python recipes/language/pretrained_gsm8k_lora.py

NOT RUN AT FULL SIZE IN THIS REPOSITORY. Model and data come from the Hugging Face hub, which the tests do not
use: they run this script on a tiny local model and a local file (--model DIR --task FILE.jsonl, with the
columns question and answer). The settings are a starting point, and the memory below is calculated.

GPU memory for the 0.5 B model, with the defaults below:

    weights        494 M parameters x 2 bytes (bfloat16)                                             1.0 GB
    adapter        8.8 M parameters x 16 bytes (float32 weight, gradient and two moments of Adam)    0.1 GB
                   rank 16 x (inputs + outputs of the 7 linear layers = 22,912) x 24 layers
    activations    4 completions x 320 tokens + 150 of the prompt = 1,430 tokens x 24 layers
                   x 85 kB (counted on CPU: hidden 896, feed-forward 4,864, adapters in float32)     2.9 GB
    logits         4 x 320 tokens x 151,936 words x 14 bytes (bfloat16 and float32, with gradients)  2.7 GB
                                                                                            in all   6.8 GB
    while sampling 64 rows x 470 tokens x 12 kB of keys and values (24 layers x 2 heads x 64)        0.4 GB

So a card of 12 GB is comfortable, and one of 8 GB needs --micro-batch-size 2 (activations and logits halve).
The micro-batch changes memory and nothing else; the update is the same. There is no critic and, with LoRA, no
second copy of the weights for a KL: the reference is the model with its adapter switched off.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import re
from decimal import Decimal

import tyro

import tokenrl
from tokenrl import PromptTask
from tokenrl.language import read_splits

SYSTEM = "Reason step by step, briefly. End with a line of the form: #### number"
NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


def as_chat(row: dict) -> dict:
    """Make a row: the question as chat messages, and the number behind the answer's last ####."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
    return {"prompt": messages, "answer": row["answer"].rpartition("####")[2].strip()}


def number_in(text: str) -> Decimal | None:
    """The number after the last ####, or else the last number at all; None if there is none."""
    _, mark, result = text.rpartition("####")
    numbers = re.findall(NUMBER, result)
    return Decimal(re.sub(r"[$,]", "", numbers[0 if mark else -1])) if numbers else None


def right(completions: list[list[dict]], answer: list[str], **_) -> list[float]:
    """Reward 1 for exactly the right number in any form: 1,200 and $1200.00 are 1200."""
    pairs = zip(completions, answer, strict=True)
    return [
        float(number_in(messages[0]["content"]) == number_in(expected))
        for messages, expected in pairs
    ]


def well_formed(completions: list[list[dict]], **_) -> list[float]:
    """Reward 0.1 for ending as asked, far less than for the right number."""
    ends = re.compile(rf"####\s*{NUMBER}\s*$")
    return [0.1 * bool(ends.search(messages[0]["content"])) for messages in completions]


def load(source: str) -> PromptTask:
    """Prompts for training and evaluation, with the two rewards, which are added.

    200 held-out questions are of the test split, or without one at most half of the training split, from its end.
    """
    splits = {name: [as_chat(row) for row in rows] for name, rows in read_splits(source).items()}
    train = splits["train"]
    if "test" in splits:
        held_out = splits["test"][:200]
    else:
        size = min(200, len(train) // 2)
        train, held_out = train[:-size], train[-size:]
    return PromptTask("gsm8k", train, held_out, [right, well_formed])


def main(
    model: str = "Qwen/Qwen2.5-0.5B-Instruct",
    task: str = "openai/gsm8k:main",
    estimator: str = "rloo",
    check: bool = False,
    beta: float = 0.0,
    lora_r: int = 16,
    max_steps: int = 300,
    prompts_per_step: int = 8,
    num_generations: int = 8,
    max_completion_length: int = 320,
) -> None:
    """Train an adapter of an instruct model on questions whose answers are numbers.

    Args:
        model: Hub name or directory of a model with a chat template.
        task: `datasets` name, or a JSON/CSV/Parquet file, with the columns question and answer.
        estimator: Preset, such as rloo or grpo.
        check: Stop before the first update.
        beta: Weight of the KL to the model without adapter.
        lora_r: Rank of the adapter.
        max_steps: Rollouts to train on.
        prompts_per_step: Questions per step.
        num_generations: Answers per question; if all are right or all wrong there is no gradient, so more is
            safer.
        max_completion_length: Tokens an answer may have. Watch `completions/clipped_ratio`: an answer that is
            cut has no result.
    """
    preset = tokenrl.Estimator.preset(estimator, beta=beta)
    print(f"bias of the gradient: {preset.bias_status} ({preset.bias_reason})")
    result = tokenrl.train(
        task=load(task),
        model=model,
        dtype="bfloat16",  # of the frozen weights; float32 on old cards
        lora_r=lora_r,
        estimator=preset,
        max_steps=max_steps,
        prompts_per_step=prompts_per_step,
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        micro_batch_size=4,  # answers in a forward and backward pass
        learning_rate=5e-5,
        warmup_steps=10,
        save_every=50,
        eval_every=50,
        eval_generations=1,
        output_dir="runs/gsm8k",
        check=check,
    )
    if check:  # 2 if it found a problem
        raise SystemExit(result.exit_code)
    before, after = result.eval_before["reward_greedy"], result.eval_after["reward_greedy"]
    print(f"held-out reward, greedy (1.1 at most): {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
