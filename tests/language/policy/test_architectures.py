"""Whole short runs on four architectures, with all weights and with LoRA; the result is a plain model."""

import pytest
import torch
from tiny_models import ARCHITECTURES, make_task

import tokenrl


def ends_early(completions, completion_ids, **_):
    return [float(len(ids) < 6) + 0.1 * len(set(ids)) for ids in completion_ids]


def train(directory, output, **options):
    values = {
        "task": make_task(
            ["the cat", "a", "count to ten one two", "sat on the", "dog", "on the log"], ends_early
        ),
        "max_steps": 2,
        "prompts_per_step": 3,
        "num_generations": 3,
        "learning_rate": 0.003,
        "eval_generations": 2,
        "cpu": True,
        "quiet": True,
    }
    return tokenrl.train(model=str(directory), output_dir=output, **(values | options))


ADAPTED = ("llama", "gpt2")
"""Architectures whose adapters are tested quickly: of plain and of transposed matrices."""


@pytest.mark.parametrize(
    ("architecture", "lora_r"),
    [
        *((name, 0) for name in ARCHITECTURES),
        *(pytest.param(name, 2, marks=() if name in ADAPTED else pytest.mark.slow) for name in ARCHITECTURES),
    ],
)
def test_train_save_and_load_in_plain_transformers(architecture, lora_r, saved, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(saved(architecture), tmp_path / "run", lora_r=lora_r, micro_batch_size=4)
    assert result.exit_code == 0 and result.steps == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(saved(architecture))
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        trained = result.policy.model.cpu()(ids).logits
        torch.testing.assert_close(model(ids).logits, trained, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3)
    text = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert text.startswith("the cat")


OPTIONS = [
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "lora_r": 2},
    {"dtype": "bfloat16"},
    {"estimator": "grpo", "num_iterations": 2, "num_minibatches": 3, "micro_batch_size": 2},
    {"estimator": "reinforce_running_mean", "num_generations": 1},
]


def both(options):
    """Two architectures with these options, which take turns to be the quick test."""
    names = ("llama", "gpt2")
    quick = names[OPTIONS.index(options) % 2]
    ids = "-".join(options)
    for name in names:
        marks = () if name == quick else pytest.mark.slow
        yield pytest.param(name, options, marks=marks, id=f"{ids}-{name}")


@pytest.mark.parametrize(("architecture", "options"), [one for options in OPTIONS for one in both(options)])
def test_options_run(architecture, options, saved, tmp_path):
    result = train(saved(architecture), tmp_path / "run", **options)
    assert result.steps == 2 and (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("lora_r", [0, 2])
def test_mixed_precision_keeps_what_is_trained_in_float32(lora_r, saved, tmp_path):
    result = train(saved(), tmp_path / "run", mixed_precision="bf16", lora_r=lora_r)
    assert result.steps == 2
    for p in result.policy.model.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)


def test_tokenizers_without_pad_and_with_chat(saved, tmp_path):
    assert train(saved("llama", "no_pad"), tmp_path / "no_pad").steps == 2
    chats = [[{"role": "user", "content": text}] for text in ("the cat", "a", "dog", "on the log")]
    result = train(saved("llama", "chat"), tmp_path / "chat", task=make_task(chats, ends_early))
    assert result.steps == 2


def test_a_training_prompt_too_long_is_refused_before_the_first_step(saved, tmp_path):
    from tokenrl.errors import Refused

    task = make_task(["the cat", "a", "dog", "the cat " * 40], ends_early)
    task.eval_prompts = task.train_prompts[:2]
    with pytest.raises(Refused, match="row 3"):
        train(saved(), tmp_path / "run", task=task)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train(saved(), tmp_path / "run", task=task, truncate_prompts=True).steps == 2
