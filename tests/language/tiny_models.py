"""Tiny random models of four architectures, and byte-level tokenizers trained on a few sentences."""

from __future__ import annotations

import copy
import dataclasses
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from tokenrl.core.estimator import Estimator
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.generator import Generator, TransformersGenerator
from tokenrl.language.tasks.task import PromptTask, own_task

SENTENCES = [
    "the cat sat on the mat and the dog sat on the log",
    "a café has a naïve 😀 face, 12 34 56 78 90",
    "count to ten: one two three four five six seven eight nine ten.",
]
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gpt_neox")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)
ENDS = tuple(range(1, 90, 9))  # ten ways to end: completions of every length
PROMPTS = ["the cat", "a", "count to ten one two", "sat on the"]


def quickly(values, long):
    """Values of a parameter, of which the long ones are left to the slow tests."""
    return [pytest.param(one, marks=pytest.mark.slow) if one in long else one for one in values]


def llama_decoder():
    """Makes text of pieces as the tokenizers of llama do."""
    from tokenizers import decoders

    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])


def make_tokenizer(kind: str = "pad"):
    """A tokenizer: `no_pad`, `pad`, `pad_is_eos`, `pads_right`, `chat` (adds BOS) or `closing` (adds EOS)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<bos>", "<eos>", "<pad>"], show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if kind == "chat":
        backend.post_processor = processors.TemplateProcessing(
            "<bos> $A", special_tokens=[("<bos>", 0)]
        )
    if kind == "closing":
        backend.post_processor = processors.TemplateProcessing(
            "$A <eos>", special_tokens=[("<eos>", 1)]
        )
    special = {"eos_token": "<eos>"}
    if kind != "no_pad":
        special["pad_token"] = "<eos>" if kind == "pad_is_eos" else "<pad>"
    if kind == "chat":
        special["bos_token"] = "<bos>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right" if kind == "pads_right" else "left",
        **special,
    )
    if kind == "chat":
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(
    architecture: str = "llama",
    *,
    vocabulary: int = 96,
    seed: int = 0,
    dtype: str = "float32",
    **config,
):
    """A random model of 2 layers x 32; its weights are large, so that what comes before matters."""
    import transformers as t

    common = {
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.25,
    }
    heads = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    shape = {**heads, "intermediate_size": 48, **common}
    kinds = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, shape | {"num_key_value_heads": 2}),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM, shape | {"num_key_value_heads": 2}),
        "gpt2": (
            t.GPT2Config,
            t.GPT2LMHeadModel,
            common | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ),
        "gpt_neox": (t.GPTNeoXConfig, t.GPTNeoXForCausalLM, shape),
    }
    config_class, model_class, values = kinds[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**(values | config)))
    return model.to(getattr(torch, dtype)).eval()


def make_policy(architecture: str = "llama", kind: str = "pad", **options) -> Policy:
    """A policy in memory."""
    from tokenrl.language.policy.model import wrap

    tokenizer = make_tokenizer(kind)
    return wrap(make_model(architecture, **options), tokenizer, source=f"tiny {architecture}")


def vowel_reward(completions, completion_ids, **_):
    """Deterministic and varied: a weighted count of the ids, so that groups differ within and among them."""
    return [sum(1.0 for i in ids if i % 3 == 0) - 0.3 * len(ids) for ids in completion_ids]


def make_task(prompts=PROMPTS, reward=vowel_reward) -> PromptTask:
    rows = [{"prompt": prompt} for prompt in prompts]
    return PromptTask("tiny", rows, rows[:2], reward, 8)


LETTERS = [f"{x}{y}>" for x in "abcd" for y in "abcd"]


def letters(context: int = 16):
    """A tiny model of four letters, and its tokenizer."""
    from toy_tasks.models import TinyModel

    return TinyModel(tuple("abcd>"), layers=1, hidden=16, heads=2, context=context)(0)


def letter_task(reward, prompts=LETTERS, **fields) -> PromptTask:
    """A task of short prompts for that model; further fields replace or join those of a task."""
    task = make_task(prompts, reward)
    vars(task).update({"max_completion_length": 4, "demonstrations": []} | fields)
    return task


def letters_trained(folder, task, **options):
    """A quick run of that model in a folder."""
    import tokenrl

    shape = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "learning_rate": 1e-2}
    shape |= {"lr_scheduler_type": "constant", "eval_every": 0}
    given = {"model": letters(), "task": task, "output_dir": folder, "cpu": True, "quiet": True}
    return tokenrl.train(**(given | shape | options))


def make_learner(policy: Policy, estimator: str | Estimator = "rloo", rows=None, **options):
    """A learner on one process, with plain arguments resolved; `rows` are those of the task."""
    from tokenrl.language.training.arguments import TrainArguments
    from tokenrl.language.training.learner import make_learner
    from tokenrl.language.training.settings import settle
    from tokenrl.language.training.teacher import teacher_of
    from tokenrl.language.training.teacher_prompts import teacher_prompts
    from tokenrl.runs.processes import make_accelerator
    from tokenrl.settings import arguments

    estimator = Estimator.preset(estimator) if isinstance(estimator, str) else estimator
    values = {
        "max_steps": 4,
        "prompts_per_step": 4,
        "num_generations": 3,
        "max_completion_length": 6,
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "cpu": True,
    }
    args = arguments(TrainArguments, values | options | {"estimator": estimator})
    task = make_task()
    task.train_prompts = rows or task.train_prompts
    task = own_task(task)
    args = settle(args, task, policy).args
    policy, teacher = teacher_of(args, args, policy, teacher_prompts(args, task))
    options = {"teacher": teacher, "rows": task.train_prompts}
    return make_learner(args, policy, make_accelerator(args.cpu), **options)


def scored(learner, **how):
    """The same learner, which scores in another regime: see the fields of `Regime`."""
    regime = dataclasses.replace(learner.forward.regime, **how)
    learner.forward = dataclasses.replace(learner.forward, regime=regime)
    return learner


def completions(policy: Policy, prompt_ids, *, places=None, step: int = 1, generator=None, **how):
    """A rollout of the default generator with the training's random numbers; 0 generations are greedy."""
    from tokenrl.language.rollout.sampling import Sampling, uniforms

    sampling = Sampling(step=step, **how)
    draws = uniforms("training", sampling, range(len(prompt_ids)) if places is None else places)
    generator = generator or TransformersGenerator(policy)
    return generator.generate(prompt_ids, sampling, draws)


def drawing(draw_prompts):
    """A stream of prompts that a function draws."""
    return SimpleNamespace(draw_prompts=draw_prompts, learn=lambda numbers, rewards: {})


def one_step(
    learner,
    *,
    step: int = 1,
    prompts=PROMPTS,
    reward=vowel_reward,
    running_mean=None,
    places=None,
    stream=None,
):
    """One `training_step` on fixed prompts, or on those at some places; returns its record."""
    from tokenrl.core.memories import RunningMean
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.training.step import training_step

    rows = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
    numbered = [(place, rows[place]) for place in places or range(len(prompts))]
    spare = [
        (100 + i, {"prompt": word}) for i, word in enumerate(["mat", "log", "dog", "face", "eight"])
    ]
    following, mean = iter(numbered + spare), running_mean or RunningMean(0.9, 0.2)
    stream = stream or drawing(lambda count: [*islice(following, count)])
    rewards = reward if isinstance(reward, Rewards) else Rewards(reward)
    return training_step(learner, rewards, mean, step, stream)


def gradient(model) -> torch.Tensor:
    """All gradients in one vector; 0 where there is none."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def weights(model) -> torch.Tensor:
    """All trainable weights in one vector."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters() if p.requires_grad])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance."""
    return float((a - b).norm() / b.norm())


def flat_on(names, value=0.5):
    """A reward of one value, or of none, for all completions of some prompts."""

    def flat(prompts, completion_ids, **_):
        scores = vowel_reward(completion_ids=completion_ids, completions=None)
        return [value if p in names else s for p, s in zip(prompts, scores, strict=True)]

    return flat


flat_second_prompt = flat_on(PROMPTS[1:2])
"""Equal rewards for one of the prompts: three rows of zero advantage."""


class Engine(Generator):
    """A generator with weights of its own, which returns ids and its log-probabilities and nothing else."""

    gap = 0.0  # by which these differ from the policy's

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy)
        self.prompts, self.synced, self.closed = 0, 0, False

    def generate(self, prompt_ids, sampling, draws):
        self.prompts += len(prompt_ids)
        bare = dataclasses.replace(sampling, keep_hidden=False)
        rollout = TransformersGenerator(self.policy).generate(prompt_ids, bare, draws)
        reported = torch.where(rollout.mask, rollout.sampling_logprobs + self.gap, 0)
        missing = dict.fromkeys(("logprobs", "entropy", "score_norms"))
        return dataclasses.replace(rollout, sampling_logprobs=reported, **missing)

    def sync(self, policy: Policy) -> None:
        self.synced += 1
        self.policy.model.load_state_dict(policy.model.state_dict())

    def close(self) -> None:
        self.closed = True


def preset_for_groups_of_three(name):
    """The estimator of a preset, with an order or a share of which two of three rows count."""
    estimator = Estimator.preset(name)
    usual = {"objective_order": 2, "objective_share": 0.7}
    changes = {field: value for field, value in usual.items() if getattr(estimator, field)}
    if estimator.scale == "target":
        # With 1 a text has nearly all of the group's probability, and hardly a gradient is left.
        changes["eta"] = 0.1
    return dataclasses.replace(estimator, **changes)


def raised(reward):
    """The reward plus 3, for objectives that take no negative rewards; abstentions stay."""
    return lambda **columns: [None if score is None else score + 3 for score in reward(**columns)]


def stepped(
    estimator,
    *,
    architecture="llama",
    dtype="float32",
    reward=flat_second_prompt,
    engine=None,
    **options,
):
    """One step from the same weights; the reference differs from the policy if there is one."""
    # Weights small enough that float32's rounding stays below the tolerances.
    policy = make_policy(architecture, dtype=dtype, initializer_range=0.1)
    policy.eos_ids = ENDS
    if estimator.beta:
        policy.reference = make_policy(architecture, dtype=dtype, seed=1).model.requires_grad_(
            False
        )
    learner = make_learner(policy, estimator, **options)
    if engine is not None:
        learner.generator = engine(policy)
    if learner.critic is not None:  # values that are not 0, as after some steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            torch.nn.init.normal_(learner.critic.head[1].weight, std=0.1)
    record = one_step(learner, reward=reward)
    return gradient(policy.model), record, learner


def textbook_logprobs(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probabilities [T, V] of a truncated distribution, by transformers and in its order."""
    from transformers.generation import logits_process

    steps = [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    steps += [logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [logits_process.MinPLogitsWarper(min_p)] if min_p else []
    return logits_process.LogitsProcessorList(steps)(None, logits / temperature).log_softmax(-1)


def alone(model, prompts, rollout, **distribution):
    """Log-probabilities and entropies of all tokens of completions, each row in a forward pass of its own."""
    logprobs, entropies = [], []
    rows = zip(rollout.prompt_index, rollout.completion_ids, rollout.mask, strict=True)
    for index, ids, mask in rows:
        prompt, ids = prompts[int(index)], ids[mask]
        logits = model(torch.tensor([[*prompt, *ids.tolist()]]), use_cache=False).logits[0]
        logp = textbook_logprobs(logits[len(prompt) - 1 : -1], **distribution)
        logprobs.append(logp.gather(1, ids[:, None])[:, 0])
        entropies.append(-torch.xlogy(logp.exp(), logp.exp()).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def textbook(model, rows, **distribution):
    """-(1/N) sum_i A_i sum_t log pi over (prompt ids, completion ids, A_i), one sequence at a time."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss = 0.0
    for prompt, completion, advantage in rows:
        ids = torch.tensor([[*prompt, *completion]])
        logp = textbook_logprobs(model(ids).logits[0, len(prompt) - 1 : -1], **distribution)
        chosen = logp.gather(1, ids[0, len(prompt) :, None])
        loss = loss - advantage * chosen.sum() / len(rows)
    loss.backward()
    return gradient(model), loss.item()


def recorded(reward, into):
    def f(prompts, completion_ids, **columns):
        rewards = reward(prompts=prompts, completion_ids=completion_ids, completions=None)
        into.extend(zip(prompts, completion_ids, rewards, strict=True))
        return rewards

    return f
