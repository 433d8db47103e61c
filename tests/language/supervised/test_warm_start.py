"""The supervised stage before the first step: when it ends, what it leaves, its cache, and its refusals."""

import json
import signal

import pytest
import torch
from filelock import FileLock
from rich.filesize import decimal
from tiny_models import make_policy, make_task, quickly, weights

import toy_tasks
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Interrupted, Refused
from tokenrl.language.policy.model import add_lora, load_policy
from tokenrl.language.policy.saving import save_policy
from tokenrl.language.rollout import forward
from tokenrl.language.supervised import warm_start as stage
from tokenrl.language.supervised.fit import SupervisedTraining, fit
from tokenrl.language.supervised.warm_start import warm_started_base
from tokenrl.language.training.loop import train

ROWS = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "a", "completion": "d"}]


def always_equal(completions, **_):
    return [0.5] * len(completions)


def lengths(completion_ids, **_):
    """Equal where all completions have the same length, as those of an untrained model that are all cut."""
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(tmp_path):
    """`run(reward, **options)`: a training of one step after a warm start of four updates."""

    def run(reward=always_equal, rows=ROWS, **options):
        task = make_task(reward=reward)
        task.demonstrations = rows
        values = {
            "model": make_policy(),
            "max_steps": 1,
            "prompts_per_step": 2,
            "num_generations": 2,
        }
        more = {
            "cpu": True,
            "overwrite": True,
            "eval_every": 0,
            "eval_generations": 0,
            "output_dir": str(tmp_path / "run"),
        }
        warm = {"warm_start": True, "warm_start_steps": 4}
        return train(task=task, **(values | more | warm | options))

    return run


def test_all_weights_learn_the_demonstrations_before_the_adapter_is_added(run, tmp_path, capsys):
    result = run(lora_r=2, estimator=Estimator(beta=0.1))
    assert result.warm_started["updates"] == 4 and result.warm_started["spread_after"] == 0
    with result.policy.reference_model() as reference:  # what the KL compares with
        frozen, by_hand = dict(reference.named_parameters()), make_policy()
        settings = {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": stage.WARMUP}
        fit(by_hand, ROWS, max_steps=4, batch_size=stage.BATCH, **settings)
        for name, value in by_hand.model.named_parameters():
            values = [
                p
                for n, p in frozen.items()
                if n.replace(".base_layer", "").endswith(f"model.{name}")
            ]
            torch.testing.assert_close(values[0], value, atol=1e-6, rtol=0)
            assert values[0].grad is None  # of the supervised stage, which would take memory
    output = capsys.readouterr().out
    assert "warm start: 4 updates of all weights on 16 of 2 demonstrations" in output
    assert "after 4 updates only 0% of the groups have unequal rewards" in output
    assert output.index("loading the model") < output.index("warm start 1/4")
    for file in ("config.json", "summary.json"):
        assert (
            json.loads((tmp_path / "run" / file).read_text())["warm_started"] == result.warm_started
        )
    assert "4 updates, loss" in result.warm_started["in_words"]
    assert "loss of demonstrations" in (tmp_path / "run" / "report.html").read_text()
    for file in ("report.html", "model/README.md"):
        assert "4 updates, loss" in (tmp_path / "run" / file).read_text()


def test_auto_skips_the_stage_where_rewards_differ_and_completions_end_and_the_flag_never_does(
    run, capsys
):
    policy = make_policy()
    policy.eos_ids = tuple(range(1, 90, 3))  # completions of every length, most of which end
    skipped = run(lengths, model=policy, warm_start="auto").warm_started
    assert skipped["updates"] == 0 and skipped["loss_after"] is None
    output = " ".join(capsys.readouterr().out.split())
    assert "4 updates unless the rule of auto skips it" in output
    assert (
        "skipped by the rule of auto" in output
        and "--warm-start without auto always runs" in output
    )
    policy = make_policy()
    policy.eos_ids = tuple(range(1, 90, 3))
    always = run(lengths, model=policy).warm_started  # not what the cache holds of auto
    assert always["updates"] == 4 and always["spread_before"] == skipped["spread_before"] > 0.5
    facts = run(
        lambda completions, **_: list(range(len(completions))), warm_start="auto"
    ).warm_started
    assert facts["updates"] == 4  # all are cut
    assert run(warm_start=False).warm_started == {}


def test_the_result_is_made_once_for_what_it_depends_on(run, cache, capsys):
    def entries():
        return results(cache)

    first = run(learning_rate=1e-9)
    assert len(entries()) == 1
    capsys.readouterr()
    second = run(learning_rate=1e-9)
    assert "warm start, from the cache: 4 updates" in capsys.readouterr().out
    assert second.warm_started == first.warm_started and len(entries()) == 1
    assert torch.equal(weights(second.policy.model), weights(first.policy.model))
    run(learning_rate=1e-5, prompts_per_step=4)  # the stage does not depend on these
    assert len(entries()) == 1
    for number, change in enumerate(({"model": make_policy(seed=1)}, {"rows": ROWS[:1]})):
        run(**change)
        assert len(entries()) == number + 2


def results(cache, runs=False):
    folders = (path.name for path in cache.glob("warm-start-*") if path.is_dir())
    return {name for name in folders if ("-run-" in name) == runs}


def test_the_oldest_that_no_run_uses_are_removed_when_the_cache_is_full(
    run, cache, capsys, monkeypatch
):
    def stages(*seeds):
        for seed in seeds:
            run(model=make_policy(seed=seed))
        return results(cache), results(cache, runs=True)

    (first, _), (two, two_runs) = stages(0), stages(1)
    assert len(two) == len(two_runs) == 2  # nothing is removed while there is room
    size = sum(file.stat().st_size for file in cache.rglob("warm-start-*/**/*") if file.is_file())
    words = f"the cache, {cache}, has {decimal(size)} of at most 8.0 GB; delete it to empty it"
    assert words in capsys.readouterr().out
    (used,), (other,) = first, two - first
    run(model=make_policy())  # from now on it is the newer one
    weight = sum(file.stat().st_size for file in (cache / used).iterdir())
    monkeypatch.setattr(stage, "MOST_BYTES", 2.5 * weight)
    three, three_runs = stages(2)
    assert used in three and other not in three and len(three) == 2
    assert len(three_runs) == 1 and not three_runs & two_runs  # the results stay longer
    monkeypatch.setattr(stage, "MOST_BYTES", 0)
    with FileLock(cache / f"{used}.lock"):  # as a run at work holds it
        four, _ = stages(3)
    assert used in four and len(four) == 2 and len(stages(4)[0]) == 1


def flip_last_bit(file):
    """The last byte is one of a weight: a model whose weights have one other bit loads without a word."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_base_is_made_again_and_a_cache_that_cannot_be_written_refused(
    cache, monkeypatch
):
    task, output = toy_tasks.load("vowels"), []
    base = warm_started_base(task)
    whole = (base / "model.safetensors").read_bytes()
    flip_last_bit(base / "model.safetensors")
    assert warm_started_base(task, announce=output.append) == base
    assert "model.safetensors" in output[0] and (base / "model.safetensors").read_bytes() == whole
    monkeypatch.setenv("TOKENRL_CACHE", str(base / "model.safetensors"))
    with pytest.raises(Refused, match=r"kept in .* cannot be written .* TOKENRL_CACHE"):
        warm_started_base(task)


@pytest.mark.parametrize("half", quickly([False, True], {False}), ids=["float32", "bfloat16"])
def test_a_stage_that_a_signal_ends_goes_on_and_so_does_a_longer_one(
    half, run, cache, tmp_path, monkeypatch
):
    """One that was ended, and a longer one after a shorter one; a shorter one starts anew."""
    monkeypatch.setattr(forward, "LARGE", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": half}, raising=False)
    whole, update, made = run(warm_start_steps=6), SupervisedTraining.learn, []
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "other"))
    dtype = torch.bfloat16 if half else torch.float32
    assert whole.warm_started["loss_after"] < whole.warm_started["loss_before"]

    def counted(training):
        made.append(training.step)
        assert {p.dtype for p in training._forward.model.parameters()} == {dtype}
        assert {p.dtype for p in training.parameters} == {torch.float32}
        if len(made) == 4:
            signal.raise_signal(signal.SIGTERM)
        return update(training)

    monkeypatch.setattr(SupervisedTraining, "learn", counted)
    with pytest.raises(
        Interrupted, match="SIGTERM in the warm start, of which 4 updates are saved"
    ) as raised:
        run(warm_start_steps=6)
    assert raised.value.exit_code == 143 and not results(tmp_path / "other")
    assert run(warm_start_steps=6).warm_started["loss_after"] == whole.warm_started["loss_after"]
    assert run(warm_start_steps=8).warm_started["updates"] == 8
    assert made == list(range(8))
    shorter = run(warm_start_steps=4).warm_started
    assert (
        made == [*range(8), *range(4)]
        and shorter["loss_before"] == whole.warm_started["loss_before"]
    )
    ended, other = (load_policy(kept(folder, 6)).model for folder in (cache, tmp_path / "other"))
    assert torch.equal(weights(ended), weights(other))


def kept(cache, updates):
    """The result of so many updates."""
    facts = {path.parent: json.loads(path.read_text()) for path in cache.glob("*/warm_start.json")}
    (folder,) = (folder for folder, result in facts.items() if result["updates"] == updates)
    return folder


def test_a_check_makes_a_few_updates_and_takes_them_back(run, cache, capsys):
    policy = make_policy()
    before, task = weights(policy.model).clone(), {"check": True, "prompts_per_step": 2}
    result = run(model=policy, **task)
    assert (
        result.exit_code == 0 and torch.equal(weights(policy.model), before) and not results(cache)
    )
    output = " ".join(capsys.readouterr().out.split())
    assert "a warm start of 4 updates of" in output and "in all" in output
    run()
    assert run(**task).exit_code == 2  # now the model is warm, and its rewards are all equal
    assert "warm-start-steps" not in capsys.readouterr().out.split("Check")[-1]


def test_what_cannot_be_warm_started_is_refused(run):
    with pytest.raises(Refused, match="'tiny' has no demonstrations"):
        run(rows=[])
    adapted = make_policy()
    add_lora(adapted, r=2)
    with pytest.raises(Refused, match="has an adapter"):
        run(model=adapted)


def test_an_adapter_on_a_warm_start_names_it_as_its_base(run, cache, tmp_path):
    save_policy(make_policy(), tmp_path / "base")
    trained = run(model=str(tmp_path / "base"), lora_r=2).policy
    (entry,) = (cache / name for name in results(cache))
    folder = tmp_path / "run" / "model" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(entry.resolve())
    merged = weights(load_policy(folder).model)
    assert torch.equal(merged, weights(load_policy(tmp_path / "run").model))
    assert len(trained.trainable_parameters()) > 3
