"""The supervised stage before the first step: when it ends, what it leaves, how it goes on, and its refusals."""

import json
import shutil
import signal
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from folders import read_json
from refusals import refused
from tiny_environments import Safe, chat_policy
from tiny_models import PROMPTS, make_policy, make_task, vowel_reward, weights

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Interrupted
from tokenrl.language.policy.model import add_lora, load_policy
from tokenrl.language.policy.saving import save_policy
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.supervised.fit import SupervisedTraining, as_in_episodes, fit
from tokenrl.language.supervised.warm_start import facts_of
from tokenrl.language.training import loop
from tokenrl.language.training.loop import train

ROWS = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "a", "completion": "d"}]


def always_equal(completions, **_):
    return [0.5] * len(completions)


def lengths(completion_ids, **_):
    """Equal where all completions have the same length, as those of an untrained model that are all cut."""
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def run(tmp_path):
    """A training of one step after a warm start of four updates, with other options if given."""

    def run(reward=always_equal, rows=ROWS, prompts=PROMPTS, **options):
        task = make_task(prompts, reward)
        task.demonstrations = rows
        values = {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "cpu": True}
        values |= {"overwrite": True, "eval_every": 0, "eval_generations": 0, "quiet": True}
        values |= {"warm_start": True, "warm_start_steps": 4, "output_dir": tmp_path / "run"}
        return train(task=task, **{"model": make_policy()} | values | options)

    return run


def test_all_weights_learn_the_demonstrations_before_the_adapter_is_added(run, tmp_path, capsys):
    result = run(lora_r=2, estimator=Estimator(beta=0.1), quiet=False)
    by_hand = make_policy()
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 10, "batch_size": 16}
    losses = fit(by_hand, ROWS, max_steps=4, learning_rate=1e-3, **settings)
    with result.policy.reference_model() as reference:  # what the KL compares with
        base = [p for name, p in reference.named_parameters() if "lora" not in name]
        for value, expected in zip(base, by_hand.model.parameters(), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    warmed = result.warm_started
    assert warmed["updates"] == 4
    assert (warmed["loss_before"], warmed["loss_after"]) == pytest.approx((losses[0], losses[3]))
    output = capsys.readouterr().out
    assert output.index("step 1/4") < output.index("step 1/1")
    for file in ("config.json", "summary.json"):
        assert read_json(tmp_path / "run" / file)["warm_started"] == warmed
    assert "loss of demonstrations" in (tmp_path / "run" / "report.html").read_text()
    assert "4 updates, loss" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_auto_skips_it_where_rewards_differ_and_completions_end_and_the_flag_never_does(run):
    def ending():
        policy = make_policy()
        policy.eos_ids = tuple(range(1, 90, 3))  # completions of every length, most of which end
        return policy

    def numbers(completions, **_):
        return list(range(len(completions)))

    options = {"reward": lengths, "max_steps": 2, "callback": lambda step, _: step == 1}
    skipped = run(model=ending(), warm_start="auto", **options)
    assert skipped.warm_started["updates"] == 0
    options |= {"overwrite": False, "resume": "auto"}
    again = run(model=ending(), warm_start="auto", **options)
    assert again.steps == 2 and again.warm_started == skipped.warm_started
    assert run(lengths, model=ending()).warm_started["updates"] == 4
    assert run(numbers, warm_start="auto").warm_started["updates"] == 4  # all are cut


def ended_after(monkeypatch, count):
    """A signal comes before the last of so many updates; returns the steps of all updates."""
    update, steps = SupervisedTraining.update, []

    def counted(training):
        steps.append(training.step)
        if len(steps) == count:
            signal.raise_signal(signal.SIGTERM)
        return update(training)

    monkeypatch.setattr(SupervisedTraining, "update", counted)
    return steps


def flip_last_bit(file):
    """The last byte is one of a weight: a model whose weights have one other bit loads without a word."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_warm_start_that_a_signal_ends_goes_on(run, tmp_path, monkeypatch):
    whole = run(warm_start_steps=6, output_dir=str(tmp_path / "whole"))
    assert whole.warm_started["loss_after"] < whole.warm_started["loss_before"]

    steps = ended_after(monkeypatch, 4)
    match = "SIGTERM in the warm start, of which 4 updates are saved.*run --resume auto continues"
    with pytest.raises(Interrupted, match=match) as raised:
        run(warm_start_steps=6)
    assert raised.value.exit_code == 143
    ended = run(warm_start_steps=6, overwrite=False, resume="auto")
    assert steps == list(range(6)) and ended.warm_started == whole.warm_started
    for name in ("warm_start/metrics.jsonl", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert torch.equal(weights(ended.policy.model), weights(whole.policy.model))


def test_a_training_that_ends_before_its_first_step_has_its_warm_start_for_the_next(
    run, tmp_path, monkeypatch
):
    folder = tmp_path / "run" / "warm_start"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "adapt", lambda *_: signal.raise_signal(signal.SIGINT))
        run(overwrite=False)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "warm_start"]
    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTraining, "update", lambda training: 1 / 0)
        assert run(overwrite=False).steps == 1
    with refused("warm_start_steps: 4, now 6"):
        run(max_steps=2, resume="auto", overwrite=False, warm_start_steps=6)
    run(warm_start=False)
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with refused(r"holds no run, but thesis\.tex"):
        run()


def test_a_training_that_has_begun_goes_on_whatever_becomes_of_its_warm_start(run, tmp_path):
    """It is made again, or continued to where it had ended, unless it is whole."""
    usual = {"max_steps": 2, "learning_rate": 0.01, "reward": vowel_reward, "lora_r": 2}
    whole = run(**usual, output_dir=tmp_path / "whole")
    run(**usual, callback=lambda step, _: step == 1)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "run" / "warm_start")
    flip_last_bit(tmp_path / "other" / "warm_start" / "model" / "model.safetensors")
    for folder in (tmp_path / "run", tmp_path / "other"):
        ended = run(**usual, overwrite=False, resume="auto", output_dir=folder)
        assert ended.steps == 2 and ended.warm_started == whole.warm_started
        assert torch.equal(weights(ended.policy.model), weights(whole.policy.model))
        assert (folder / "warm_start" / "model" / "model.safetensors").exists()


def test_a_warm_start_whose_template_reads_the_clock_goes_on_at_its_own_time(
    run, tmp_path, monkeypatch
):
    policy = chat_policy()
    clock = "{{ strftime_now('%d %b %Y, %H') if strftime_now is defined }} "
    policy.tokenizer.chat_template = clock + policy.tokenizer.chat_template
    save_policy(policy, tmp_path / "chat")
    options = {"model": str(tmp_path / "chat"), "rows": CHAT, "prompts": [CHAT[0]["prompt"]]}
    options |= {"max_completion_length": 4, "resume": "auto", "overwrite": False}
    ended_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        run(**options)
    time = read_json(tmp_path / "run" / "warm_start" / "config.json")["chat_time"]
    clock = SimpleNamespace(
        now=lambda: datetime(2031, 5, 6, 7), fromisoformat=datetime.fromisoformat
    )
    monkeypatch.setattr("tokenrl.language.policy.prompts.datetime", clock)
    run(**options)
    assert time and read_json(tmp_path / "run" / "config.json")["chat_time"] == time


def test_a_check_makes_no_warm_start_and_takes_one_that_is_there(run, tmp_path):
    policy = make_policy()
    before = weights(policy.model).clone()
    assert run(model=policy, check=True).exit_code == 0
    assert torch.equal(weights(policy.model), before) and not (tmp_path / "run").exists()
    run()
    # now the model is warm, and its rewards are all equal
    assert "no-signal" in run(check=True).flags
    folder = tmp_path / "run" / "warm_start"
    assert facts_of(folder)["updates"] == 4
    config = (folder / "config.json").rename(folder / "moved")
    assert not facts_of(folder)
    config.rename(folder / "config.json")
    for damaged in ({}, [], None, {"exit_reason": "finished", "steps": 4}):
        (folder / "summary.json").write_text(json.dumps(damaged))
        assert not facts_of(folder)
    assert run(overwrite=False, resume="auto", max_steps=2).warm_started["updates"] == 4
    assert facts_of(folder)["updates"] == 4


def test_what_cannot_be_warm_started_is_refused(run):
    with refused("'tiny' has no demonstrations"):
        run(rows=[])
    adapted = make_policy()
    add_lora(adapted, r=2)
    with refused("has an adapter"):
        run(model=adapted)


def test_an_adapter_on_a_warm_start_finds_it_as_its_base_in_its_run(run, tmp_path):
    save_policy(make_policy(), tmp_path / "base")
    run(model=str(tmp_path / "base"), lora_r=2)
    folder = tmp_path / "run" / "model" / "adapter"
    assert not read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    merged = weights(load_policy(folder).model)  # it may be given to others
    assert torch.equal(merged, weights(load_policy(tmp_path / "run").model))


CHAT = [{"prompt": [{"role": "user", "content": "the cat"}], "completion": "sat"}]


def test_the_prompts_of_demonstrations_describe_the_tools_of_the_environment(run):
    environments = Environments(Safe)
    shown = as_in_episodes(CHAT, environments, str)
    settings = {"max_steps": 1, "batch_size": 16, "learning_rate": 1e-30}
    losses = fit(chat_policy(), shown, environments=environments, **settings)
    options = {"rows": CHAT, "prompts": [CHAT[0]["prompt"]], "max_completion_length": 4}
    result = run(model=chat_policy(), environment=Safe, **options)
    assert result.warm_started["loss_before"] == pytest.approx(losses[0])
