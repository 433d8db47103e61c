"""Settings that were left open: which task, model and adapter get which, and what is said of their origin."""

import pytest
from folders import read_json
from hypothesis import given, settings, strategies as st
from refusals import refused
from tiny_models import make_model, make_policy, make_task, make_tokenizer

import tokenrl
import toy_tasks
from tokenrl.configuration import configured
from tokenrl.language.policy.model import Policy, wrap
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
from tokenrl.language.supervised.fit import encode_demonstrations
from tokenrl.language.tasks.task import PromptTask, own_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.loop import train
from tokenrl.language.training.settings import settle
from toy_tasks.models import TinyModel, literal_tokenizer

OTHER = "default for other models"


@pytest.fixture(scope="module")
def digits():
    return own_task(toy_tasks.load("sort_digits", eval_size=8))


@pytest.fixture(scope="module")
def own(digits):
    return wrap(*digits.base.build(0))


def test_the_rate_falls_with_size_through_the_known_points():
    defaults = ((50_000, 1e-3), (134_515_008, 1e-5), (10**9, 1e-6))
    assert [default_rate(size, trained=False) for size, _ in defaults] == [
        rate for _, rate in defaults
    ]
    # constant beyond them
    assert default_rate(100, trained=False) == 1e-3 and default_rate(7 * 10**9) == 1e-6
    for size, lora, supervised, expected in (
        (134_515_008, True, False, 1e-4),
        (134_515_008, False, True, 1e-4),
        (10**9, True, False, 1e-5),
        (10**9, False, True, 2e-5),
        (10**9, True, True, 2e-4),
        (500_000, True, True, 1e-3),
    ):
        assert default_rate(size, lora=lora, supervised=supervised) == expected


def test_a_recommendation_holds_for_the_models_of_the_task_only(digits, own):
    for args in (TrainArguments(), TrainArguments(model="x")):
        result = settle(args, digits, own)
        assert vars(result.args).items() >= {**digits.train, "max_completion_length": 8}.items()
        assert (
            result.origins["learning_rate"]
            == result.origins["max_steps"]
            == "recommended by the task"
        )
        assert result.origins["max_completion_length"] == "the task's limit"
    other = make_policy()
    result = settle(TrainArguments(model="x", lora_r=2), digits, other)
    expected = {"max_steps": 60, "prompts_per_step": 8, "num_generations": 8, "eval_every": 6}
    assert vars(result.args).items() >= {**expected, "lr_scheduler_type": "linear"}.items()
    assert result.args.learning_rate == default_rate(parameter_count(other), lora=True)
    assert result.origins["learning_rate"] == f"{parameter_count(other):,} parameters, LoRA"
    assert result.origins["max_steps"] == OTHER
    # 20/3 of the 80 completions of an evaluation, in steps of 64
    long = TrainArguments(model="x", eval_generations=9)
    assert settle(long, digits, other).args.eval_every == 9


def test_the_length_is_that_of_the_demonstrations_as_the_tokenizer_writes_them(digits):
    other = make_policy()
    longest = max(len(ids) for _, ids in encode_demonstrations(other, digits.demonstrations))
    result = completion_limit(digits, "x", other)
    assert longest == 7 and result == (11, "the longest demonstration has 7 with EOS")
    assert room([([1], [5] * 40), ([1, 2, 3], [5])]) == 50
    long = PromptTask(
        "own", [{"prompt": "a" * 200}], [{"prompt": "a"}], len, max_completion_length=20
    )
    assert completion_limit(long, "x", other) == (20, "the task's limit")


@pytest.mark.parametrize(
    ("row", "truncate", "limit", "origin"),
    [
        ({"prompt": "a" * 9}, False, 55, "a prompt has 9 tokens, the model's context 64"),
        ({"prompt": "a" * 9}, True, 32, "a prompt has 9 tokens, the model's context 64"),
        (
            {"prompt": "a", "completion": "b" * 8},
            False,
            13,
            "the longest demonstration has 9 with EOS",
        ),
        (
            {"prompt": "a", "completion": None},
            False,
            63,
            "a prompt has 1 tokens, the model's context 64",
        ),
    ],
)
def test_the_length_of_any_data_fits_the_context_of_the_model(row, truncate, limit, origin):
    task = own_task(PromptTask("own", [{"prompt": "a"}, row], [{"prompt": "b"}], len))
    policy = wrap(*TinyModel(tokens=("a", "b"))(seed=0))
    expected = (limit, origin)
    assert completion_limit(task, "x", policy, truncate=truncate) == expected
    filled = settle(TrainArguments(model="x", truncate_prompts=truncate), task, policy)
    assert (
        filled.args.max_completion_length,
        filled.origins["max_completion_length"],
    ) == expected


def test_own_tasks_and_given_values_win():
    own = make_task()
    own.train = {"max_steps": 7, "learning_rate": 0.5}
    result = settle(TrainArguments(model="x", max_steps=3), own, make_policy())
    assert (result.args.learning_rate, result.args.max_completion_length) == (0.5, 8)
    assert result.origins["max_steps"] == "given" and result.args.eval_every == 1
    plain = settle(TrainArguments(model="x"), make_task(), make_policy())
    assert (plain.args.max_steps, plain.args.prompts_per_step) == (200, 16)


def test_the_supervised_run_has_defaults_of_its_own(digits, own):
    def settled_sft(choices, policy):
        return settled(choices, *layers_below(choices, digits, policy))

    result = settled_sft(SftArguments(), own)[0]
    expected = {"max_steps": 200, "batch_size": 64, "learning_rate": 1e-3, "eval_every": 20}
    assert vars(result).items() >= expected.items()
    policy = make_policy()
    other, origins = settled_sft(SftArguments(model="x", max_steps=50), policy)
    assert other.batch_size == 16 and other.eval_every == 5
    size = f"{parameter_count(policy):,} parameters"
    expected = {"max_steps": "given", "batch_size": OTHER, "learning_rate": size}
    assert origins.items() >= expected.items()


def test_a_run_says_where_its_settings_come_from_and_repeats_with_them(saved, tmp_path, capsys):
    toy = make_task()
    toy.train, toy.max_completion_length = {"learning_rate": 0.9}, 2
    toy.demonstrations = [{"prompt": "a", "completion": "the cat sat on the mat"}]
    toy.build, toy.fingerprint = lambda seed: (make_model(), make_tokenizer()), "toy"
    values = {"max_steps": 1, "eval_every": 0, "cpu": True, "output_dir": str(tmp_path / "run")}
    result = train(task=toy, model=str(saved()), **values)
    output = capsys.readouterr().out
    assert "1 steps (given) x 8 prompts x 8 completions (default for other models)" in output
    assert f"0.0001 ({parameter_count(make_policy()):,} parameters), linear (default)" in output
    longest = len(make_tokenizer()("the cat sat on the mat").input_ids) + 1
    assert (
        f"up to {longest + 4} tokens (the longest demonstration has {longest} with EOS)" in output
    )
    config = read_json(result.output_dir / "config.json")
    assert (config["learning_rate"], config["max_completion_length"]) == (1e-4, longest + 4)
    late = ["threads", "mixed_precision", "training_attention", "tokens_per_pass"]
    assert None not in [config[name] for name in late]  # also what follows from the loaded model
    again = configured(TrainArguments, result.output_dir, "train")
    assert {*settle(again, own_task(toy), make_policy()).origins.values()} == {"given"}


def test_no_rate_of_adamw_is_called_usual_for_sgd(tmp_path, said):
    settings = {"model": make_policy(), "task": make_task(), "cpu": True, "prompts_per_step": 2}
    settings |= {"learning_rate": 5.0, "optimizer": "sgd", "check": True}
    result = train(**settings, output_dir=tmp_path / "run")
    output = said()
    assert "5 (given), linear (default), sgd" in output and "unusual-rate" not in result.flags


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
    policy = make_policy(kind="pad" if kind == "keeps" else kind)
    if kind == "keeps":
        policy.tokenizer = literal_tokenizer("the ca")
    text = text.encode(errors="ignore").decode()
    prompt = [{"role": "user", "content": text}] if chat and kind == "chat" else text
    if surely_fits(policy, prompt, room):
        assert len(policy.encode(prompt)) + room <= policy.context
    elif kind == "keeps" and text.strip():
        assert 2 * len(text.encode()) + 16 + room > policy.context
    policy.context = None
    assert not surely_fits(policy, prompt, room)


def test_prompts_that_surely_fit_are_not_tokenised_before_the_first_step_and_others_are_refused(
    tmp_path, monkeypatch
):
    encoded = []
    encode = Policy.encode
    monkeypatch.setattr(Policy, "encode", lambda *a: encoded.append(a[1]) or encode(*a))
    model = make_policy(max_position_embeddings=512)
    model.tokenizer = literal_tokenizer("the ca0123456789")
    short = [f"the cat {i}" for i in range(300)]
    options = {"reward": len_reward, "max_steps": 1, "prompts_per_step": 2, "num_generations": 2}
    options |= {"eval_size": 2, "cpu": True, "quiet": True, "threads": 1}
    options |= {"output_dir": tmp_path, "stop_after_zero_spread": 0, "eval_generations": 0}
    for length in ({"max_completion_length": 9}, {}):
        encoded.clear()
        rows = [{"prompt": prompt} for prompt in short]
        tokenrl.train(model=model, task=rows, **options, **length, overwrite=True)
        assert len(set(encoded)) < 20
    rows[7]["prompt"] = "cat the " * 180
    with refused(r"row 7 has 1440 tokens.*context of 512"):
        tokenrl.train(model=model, task=rows, **options, max_completion_length=9, overwrite=True)


def len_reward(completions, **_):
    return [float(len(text)) for text in completions]
