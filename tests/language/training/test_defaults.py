"""Settings that were left open: which task, model and adapter get which, and what is said of their origin."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
from folders import read_json
from hypothesis import given, settings, strategies as st
from tiny_models import make_model, make_policy, make_task, make_tokenizer

import toy_tasks
from tokenrl.configuration import configured
from tokenrl.language.policy.model import wrap
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.supervised.defaults import (
    completion_limit,
    default_rate,
    layers_below,
    parameter_count,
    room,
    settled,
    surely_fits,
)
from tokenrl.language.tasks.task import PromptTask, own_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.loop import train
from tokenrl.language.training.settings import settle
from toy_tasks.models import TinyModel, literal_tokenizer


@pytest.fixture(scope="module")
def digits():
    return own_task(toy_tasks.load("sort_digits", eval_size=8))


@pytest.fixture(scope="module")
def own(digits):
    return wrap(*digits.base.build(0))


def test_the_rate_falls_with_size_through_the_known_points():
    for size, options, rate in (
        (50_000, {"trained": False}, 1e-3),
        (134_515_008, {"trained": False}, 1e-5),
        (10**9, {"trained": False}, 1e-6),
        (100, {"trained": False}, 1e-3),  # constant beyond the known sizes
        (7 * 10**9, {}, 1e-6),
        (134_515_008, {"lora": True}, 1e-4),
        (134_515_008, {"supervised": True}, 1e-4),
        (10**9, {"lora": True, "supervised": True}, 2e-4),
        (500_000, {"lora": True, "supervised": True}, 1e-3),
    ):
        assert default_rate(size, **options) == rate, (size, options)


def test_a_recommendation_holds_for_the_models_of_the_task_only(digits, own):
    for args in (TrainArguments(), TrainArguments(model="x")):
        result = settle(args, digits, own)
        assert vars(result.args).items() >= {**digits.train, "max_completion_length": 8}.items()
        assert result.origins["learning_rate"] == "recommended by the task"
        assert result.origins["max_completion_length"] == "the task's limit"
    other = make_policy()
    result = settle(TrainArguments(model="x", lora_r=2), digits, other)
    expected = {"max_steps": 60, "prompts_per_step": 8, "num_generations": 8, "eval_every": 6}
    expected["learning_rate"] = default_rate(parameter_count(other), lora=True)
    assert vars(result.args).items() >= {**expected, "lr_scheduler_type": "linear"}.items()
    assert result.origins["learning_rate"] == f"{parameter_count(other):,} parameters, LoRA"
    assert result.origins["max_steps"] == "default for other models"
    usual = settle(TrainArguments(model="x"), make_task(), other)
    assert (usual.args.max_steps, usual.args.prompts_per_step) == (200, 16)
    # 20/3 of the 80 completions of an evaluation, in steps of 64
    long = TrainArguments(model="x", eval_generations=9)
    assert settle(long, digits, other).args.eval_every == 9


def test_the_length_is_that_of_the_demonstrations_as_the_tokenizer_writes_them(digits):
    expected = (11, "the longest demonstration has 7 with EOS")
    assert completion_limit(digits, "x", make_policy()) == expected
    assert room([([1], [5] * 40), ([1, 2, 3], [5])]) == 50


@pytest.mark.parametrize(
    ("row", "truncate", "limit", "origin"),
    [
        ({"prompt": "a" * 9}, False, 55, "a prompt has 9 tokens, the model's context 64"),
        ({"prompt": "a" * 9}, True, 32, "a prompt has 9 tokens, the model's context 64"),
        ({"completion": "b" * 8}, False, 13, "the longest demonstration has 9 with EOS"),
        ({"completion": None}, False, 63, "a prompt has 1 tokens, the model's context 64"),
    ],
)
def test_the_length_of_any_data_fits_the_context_of_the_model(row, truncate, limit, origin):
    task = own_task(PromptTask("own", [{"prompt": "a"} | row], [{"prompt": "b"}], len))
    policy = wrap(*TinyModel(tokens=("a", "b"))(seed=0))
    plan = settle(TrainArguments(model="x", truncate_prompts=truncate), task, policy)
    assert plan.args.max_completion_length == limit
    assert plan.origins["max_completion_length"] == origin


def test_the_supervised_run_has_defaults_of_its_own(digits, own):
    def settled_sft(choices, policy):
        return settled(choices, *layers_below(choices, digits, policy))

    expected = {"max_steps": 200, "batch_size": 64, "learning_rate": 1e-3, "eval_every": 20}
    assert vars(settled_sft(SftArguments(), own)[0]).items() >= expected.items()
    other, origins = settled_sft(SftArguments(model="x", max_steps=50), make_policy())
    assert (other.batch_size, other.eval_every) == (16, 5)
    assert origins["max_steps"] == "given" and origins["learning_rate"].endswith(" parameters")


def test_a_run_says_where_its_settings_come_from_and_repeats_with_them(saved, tmp_path, said):
    toy = make_task()
    toy.train, toy.max_completion_length = {"learning_rate": 0.9}, 2
    toy.demonstrations = [{"prompt": "a", "completion": "the cat sat on the mat"}]
    toy.base = SimpleNamespace(build=lambda seed: (make_model(), make_tokenizer()), warm_start=None)
    values = {"max_steps": 1, "eval_every": 0, "cpu": True, "output_dir": str(tmp_path / "run")}
    result = train(task=toy, model=str(saved()), **values)
    output = said()
    assert "1 steps (given) x 8 prompts x 8 completions (default for other models)" in output
    assert f"0.0001 ({parameter_count(make_policy()):,} parameters), linear (default)" in output
    longest = len(make_tokenizer()("the cat sat on the mat").input_ids) + 1
    words = f"up to {longest + 4} tokens (the longest demonstration has {longest} with EOS)"
    assert words in output
    config = read_json(result.output_dir / "config.json")
    assert (config["learning_rate"], config["max_completion_length"]) == (1e-4, longest + 4)
    late = ["threads", "mixed_precision", "training_attention", "tokens_per_pass"]
    assert None not in [config[name] for name in late]  # also what follows from the loaded model
    again = configured(TrainArguments, result.output_dir, "train")
    assert {*settle(again, own_task(toy), make_policy()).origins.values()} == {"given"}


@cache
def policy_of(kind):
    """A policy with a tokenizer of a kind, one of which keeps all that it reads."""
    if kind == "keeps":
        return replace(make_policy(), tokenizer=literal_tokenizer("the ca"))
    return make_policy(kind=kind)


@pytest.mark.parametrize("kind", ["pad", "chat", "closing", "keeps"])
@settings(deadline=None, max_examples=30)
@given(
    text=st.text(max_size=40)
    | st.sampled_from(["the cat", "cat" * 13, "\u3042" * 9, "\ufdfa" * 2]),
    chat=st.booleans(),
    room=st.integers(1, 64),
)
def test_a_prompt_that_surely_fits_does_and_any_text_that_is_far_shorter_surely_does(
    kind, text, chat, room
):
    policy = policy_of(kind)
    text = text.encode(errors="ignore").decode()
    prompt = [{"role": "user", "content": text}] if chat and kind == "chat" else text
    if surely_fits(policy, prompt, room):
        assert len(policy.encode(prompt)) + room <= policy.context
    elif kind == "keeps" and text.strip():
        assert 2 * len(text.encode()) + 16 + room > policy.context
    assert not surely_fits(replace(policy, context=None), prompt, room)
