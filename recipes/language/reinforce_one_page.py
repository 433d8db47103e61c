"""REINFORCE on a language model, the whole method on one page.

The policy pi is a causal language model. For a prompt x it writes a completion y token by token, so

    log pi(y | x) = sum_t log pi(y_t | x, y_1 ... y_(t-1)).

A completion is an episode, a token is an action, and the reward R(y) comes at the end. We maximise

    J = E[R(y)],  y drawn from pi.

J is a sum over all completions, which are far too many to list. But since grad pi = pi * grad log pi,

    grad J = sum_y R(y) grad pi(y) = E[R(y) grad log pi(y)]          (the score-function identity)

which is again an expectation over pi: draw completions, multiply the gradient of each one's log-probability
by its reward, and average. The reward need not be differentiable; it is only evaluated.

The average is unbiased but noisy. A baseline b can lower its variance, and adds no bias if b does not depend
on y:

    E[b grad log pi(y)] = b * sum_y grad pi(y) = b * grad(1) = 0.

So R(y) may be replaced by the advantage A = R(y) - b. A good b is close to the mean reward of this prompt:
completions better than that become more likely, worse ones less likely. RLOO (REINFORCE leave-one-out) draws
G completions of each prompt; the baseline of each is the mean reward of the G - 1 OTHERS. Leaving the
completion itself out keeps b independent of y: with it inside, 1/G of the gradient would be lost.

Run it (under a minute on two cores):   python recipes/language/reinforce_one_page.py
Left out, see `tokenrl train`: prompts of unequal length, KL to a reference, records, saving, GPUs.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import dataclass

import torch
import tyro
from transformers import DynamicCache

import toy_tasks
from tokenrl import Estimator
from tokenrl.core import RunningMean, completion_mask


@dataclass
class Args:
    """REINFORCE on a tiny language model that learns to sort digits."""

    estimator: str = "rloo"
    """Preset: reinforce, reinforce_running_mean, rloo, grpo, dr_grpo or ppo_clip."""
    seed: int = 0
    """Seed of the initial weights, the order of prompts, and sampling."""


STEPS = 100  # updates by policy gradient
WARM_STEPS = 200  # before that: a policy that never gets a reward has nothing to reinforce
PROMPTS, GROUP = 16, 8  # of a step, and completions per prompt
args = tyro.cli(Args)
estimator = Estimator.preset(args.estimator)
# 402715> should become 012457; the reward is 1 for exactly that, else 0
task = toy_tasks.load("sort_digits")
model, tokenizer = task.build(args.seed)  # a Llama of half a million parameters, random so far
eos, length = tokenizer.eos_token_id, task.max_completion_length
dice = torch.Generator().manual_seed(args.seed)


def encode(texts):
    """Token ids, [N, P]; all prompts of this task have one length, so nothing needs padding."""
    return torch.tensor(tokenizer(list(texts)).input_ids)


def logprobs_of(prompt_ids, ids):
    """Score: log pi(y_t | x, y_<t) of every completion token, [N, T], with its gradient."""
    logits = model(torch.cat([prompt_ids, ids], dim=1)).logits
    logits = logits[:, prompt_ids.shape[1] - 1 : -1]  # logits at a position predict the NEXT token
    return logits.log_softmax(-1).gather(-1, ids[:, :, None]).squeeze(-1)


@torch.no_grad()
def sample(prompt_ids, dice=None):
    """One completion per row and its mask, [N, T]; without dice always the most likely token (greedy)."""
    ids, cache, tokens = prompt_ids, DynamicCache(), []
    for _ in range(length):
        # releases name the cache differently
        probs = model(ids, None, None, cache).logits[:, -1].softmax(-1)
        ids = probs.multinomial(1, generator=dice) if dice else probs.argmax(-1, keepdim=True)
        tokens.append(ids)  # a row that has ended goes on, but its mask ends at the first eos
    ids = torch.cat(tokens, dim=1)
    # ending is an action like any other, so the eos is inside
    return ids, completion_mask(ids, [eos])


def rewards_of(prompts, ids, mask):
    """Reward of each completion, [N]."""
    written = [row[is_action] for row, is_action in zip(ids, mask, strict=True)]
    return torch.tensor(
        task.reward(prompts, tokenizer.batch_decode(written, skip_special_tokens=True))
    )


def evaluate(when):
    """Print the mean reward on held-out prompts, whose digits never occur together in training."""
    prompts = [row["prompt"] for row in task.eval_prompts]
    for method, generator in (("greedy", None), ("sampled", torch.Generator().manual_seed(1))):
        reward = rewards_of(prompts, *sample(encode(prompts), generator)).mean()
        print(f"{when}: {method} reward {reward:.3f}", flush=True)


# 1. Warm start: imitate demonstrations. Seven in ten sort DOWN, so the model mostly does that; it sorts up
# only sometimes, which the reward then reinforces.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
for _ in range(WARM_STEPS):
    chosen = torch.randint(len(task.demonstrations), (64,), generator=dice).tolist()
    ids = encode(task.demonstrations[i]["completion"] for i in chosen)
    ids = torch.cat([ids, torch.full((64, 1), eos)], dim=1)
    loss = -logprobs_of(encode(task.demonstrations[i]["prompt"] for i in chosen), ids).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
evaluate("after the warm start")

# 2. REINFORCE: sample, reward, advantage, score, loss, step.
print(
    f"estimator {args.estimator}; its gradient is {estimator.bias_status}: {estimator.bias_reason}"
)
running_mean = RunningMean(estimator.running_mean_decay, estimator.running_mean_init)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
for step in range(1, STEPS + 1):
    chosen = torch.randint(len(task.train_prompts), (PROMPTS,), generator=dice).tolist()
    prompts = [task.train_prompts[i]["prompt"] for i in chosen for _ in range(GROUP)]
    prompt_ids = encode(prompts)  # [N, P], the G rows of a prompt together
    ids, mask = sample(prompt_ids, dice)  # [N, T]
    rewards = rewards_of(prompts, ids, mask)  # [N]

    # A = R - b, scaled if the estimator says so. The running mean is read before this step updates it.
    b = running_mean.value
    advantages, _ = estimator.advantages(rewards, mask, group_size=GROUP, baseline_value=b)  # [N]
    running_mean.update(rewards)

    # loss = -sum_it w_it A_i log pi(y_it), with w = 1/N for rloo: the gradient estimates -grad J. The number
    # itself says nothing about progress. (The old logprobs serve presets with PPO's ratio, which is 1 here.)
    weights = estimator.token_weights(mask, max_length=length)  # [N, T]
    logprobs = logprobs_of(prompt_ids, ids)
    loss = estimator.loss(logprobs, advantages, weights, mask, old_logprobs=logprobs.detach())
    optimizer.zero_grad()
    loss.backward()
    # one unlucky batch must not undo the rest
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:4d}  reward {rewards.mean():.3f}", flush=True)
evaluate("after training")
