"""How many completions are sampled and differentiated at once: what they cost, and how many fit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from families import family_policy
from tiny_models import ARCHITECTURES, PROMPTS, make_learner, make_policy

import tokenrl
from tokenrl.language.policy.model import enable_gradient_checkpointing
from tokenrl.language.rollout.head import LOGITS
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training import fitting
from tokenrl.language.training.fitting import Cost, most_bytes, sampling_cost, settle_memory, update_cost
from tokenrl.language.training.forward import make_up
from tokenrl.runs.timings import free_memory, left_to_container

RUN = {
    **{"task": "sort_digits", "max_steps": 2, "eval_size": 2, "eval_generations": 0, "quiet": True},
    **{"prompts_per_step": 4, "num_generations": 4, "warm_start": False, "cpu": True},
}


@pytest.fixture
def scarce(monkeypatch):
    """Every model is measured, and so many bytes are free."""
    monkeypatch.setattr(fitting, "SMALL", 0)

    def leave(free):
        monkeypatch.setattr(fitting, "free_memory", lambda device: int(free / fitting.SHARE) + 1)

    leave(10**12)
    return leave


def test_the_most_bytes_that_live_at_the_same_time_are_counted():
    def work():
        a = torch.zeros(100, dtype=torch.float64)  # 800 bytes
        b = a + 1  # 1600
        view = b[::2].view(-1, 5)  # no further
        a.add_(view.sum())  # and 8 for the sum
        del a, b, view
        return torch.zeros(150, dtype=torch.float64)  # 1200

    assert most_bytes(work) == 1608
    leaf = torch.ones(10, requires_grad=True)
    # A product keeps no copy of its factors; the sum has 4 bytes, its gradient 4, those of the products 40.
    assert 40 + 4 <= most_bytes(lambda: (leaf * leaf).sum().backward()) <= 200
    assert most_bytes(lambda: leaf.view(2, 5).t()) == 0


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("cost", [Cost(0, 10), Cost(100, 10), Cost(7, 3, 50)])
def test_as_many_rows_as_fit(cost, size):
    for free in range(0, 600, 7):
        most = cost.most(free, 32, size)
        assert 1 <= most <= 32
        assert cost.of(most, size) <= free or most == 1
        assert most <= size or most % size == 0
        step = size if most >= size else 1
        assert most == 32 or cost.of(most + step, size) > free


def any_policy(name):
    return make_policy(name) if name in ARCHITECTURES else family_policy(name, vocabulary=96)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mamba", "falcon_h1"])
@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_cost_in_an_update_what_one_and_two_of_them_say(architecture, share):
    policy = any_policy(architecture)
    learner = make_learner(policy, micro_batch_size=None)
    policy.share_prompt = share and policy.share_prompt
    width, length = 6, learner.args.max_completion_length
    cost = update_cost(learner, width)
    rollout = make_up(policy, 12, 4, width, length)
    found = most_bytes(lambda: score(learner.model, rollout, **learner.scoring))
    said = cost.of(12, 4) - cost.fixed
    assert found == pytest.approx(said, rel=0.15)
    weights = sum(p.numel() for p in policy.trainable_parameters())
    assert cost.fixed == 3 * 4 * weights + 8 * LOGITS  # gradient, two moments, two pieces of logits


def test_logits_that_never_exist_whole_are_not_counted():
    policy = make_policy(vocabulary=2000)
    learner = make_learner(policy)
    policy.tokens_at_once = 20  # more than one or two completions have
    some = update_cost(learner, 6).row
    policy.tokens_at_once = None
    whole = update_cost(learner, 6).row
    assert whole - some > 4 * 6 * 2000  # at least the logits themselves


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mamba", "falcon_h1"])
def test_sampling_takes_no_more_than_is_said(architecture):
    learner = make_learner(any_policy(architecture))
    ids, size = [[5, 6, 7, 8, 9, 10]] * 3, learner.sampling.group_size
    cost = sampling_cost(learner, 6)
    draws = torch.full((3 * size, learner.args.max_completion_length), 0.3)
    found = most_bytes(lambda: learner.generator.generate(ids, learner.sampling, draws))
    said = cost.of(3 * size, size) - cost.fixed
    assert 0.3 * said < found < 1.3 * said
    if architecture == "llama":  # keys and values of 12 tokens in 2 layers, 2 heads of 8 numbers of 4 bytes
        assert cost.row == 2 * 12 * 2 * 2 * 8 * 4 + fitting.DRAWN * 96


def test_recomputed_activations_are_left_out_and_change_no_cost_of_sampling():
    learner = make_learner(make_policy())
    kept, cache = update_cost(learner, 6), sampling_cost(learner, 6)
    enable_gradient_checkpointing(learner.policy)
    assert learner.policy.model.training
    assert sampling_cost(learner, 6) == cache
    assert update_cost(learner, 6).row < kept.row
    assert learner.policy.model.training


def test_a_bfloat16_copy_has_a_gradient_too():
    policies = [make_policy() for _ in range(2)]
    plain, half = (
        update_cost(make_learner(policy, mixed_precision=precision), 6).fixed
        for policy, precision in zip(policies, ("no", "bf16"), strict=True)
    )
    assert half - plain == 2 * sum(p.numel() for p in policies[0].trainable_parameters())


def test_where_all_rows_fit_nothing_is_said_or_changed(scarce):
    learner = make_learner(make_policy())
    before = learner.args, learner.generator
    settle_memory(learner, [{"prompt": p} for p in PROMPTS])
    assert (learner.args, learner.generator) == before and "memory" not in learner.policy.remarks


def test_as_many_rows_as_fit_are_taken_and_it_is_said(scarce):
    learner = make_learner(make_policy())
    prompts = [{"prompt": p} for p in PROMPTS]
    size, width = learner.sampling.group_size, fitting._longest(learner, prompts)
    update, sampling = update_cost(learner, width), sampling_cost(learner, width)
    scarce(update.of(size, size))
    settle_memory(learner, prompts)
    assert learner.args.micro_batch_size == size
    assert "completions differentiated at once" in learner.policy.remarks["memory"]
    learner = make_learner(make_policy())
    scarce(sampling.of(size, size))
    settle_memory(learner, prompts)
    assert learner.args.sampling_batch_size == learner.generator.rows_at_once == size
    assert learner.args.micro_batch_size is not None


def test_numbers_that_are_given_stay(scarce):
    learner = make_learner(make_policy(), micro_batch_size=5, sampling_batch_size=7)
    scarce(0)
    settle_memory(learner, [{"prompt": p} for p in PROMPTS])
    assert (learner.args.micro_batch_size, learner.args.sampling_batch_size) == (5, 7)


def test_prompts_that_cannot_be_asked_are_left_to_others(scarce):
    learner = make_learner(make_policy())
    asked = [{"prompt": [{"role": "user", "content": "there is no chat template"}]}, {"prompt": "abc"}]
    assert fitting._longest(learner, asked) == len(learner.policy.encode("abc"))
    settle_memory(learner, asked)


def test_the_longest_prompt_decides_wherever_it_stands():
    learner = make_learner(make_policy())
    many = [{"prompt": "a"}] * 40
    for place in (0, 20, 40):
        prompts = [*many[:place], {"prompt": "abcdefgh"}, *many[place:]]
        assert fitting._longest(learner, prompts) == len(learner.policy.encode("abcdefgh"))


def test_the_process_with_the_least_memory_decides(scarce):
    learner = make_learner(make_policy())
    learner.accelerator = SimpleNamespace(
        num_processes=2, gather=lambda own: torch.cat([own, torch.tensor([[2, 100]])])
    )
    settle_memory(learner, [{"prompt": "a"}])
    assert (learner.args.micro_batch_size, learner.args.sampling_batch_size) == (2, None)


def test_a_run_with_little_memory_is_that_with_much_and_keeps_its_numbers(scarce, tmp_path):
    def run(name, **options):
        ended = tokenrl.train(**RUN, **options, output_dir=str(tmp_path / name))
        config = json.loads((ended.output_dir / "config.json").read_text())
        rows = [json.loads(line) for line in (ended.output_dir / "metrics.jsonl").read_text().splitlines()]
        return config["micro_batch_size"], config["sampling_batch_size"], rows

    *none, plenty = run("plenty")
    assert none == [None, None]
    scarce(0)
    update, sampling, little = run("little")
    assert (update, sampling) == (1, 1)
    for one, other in zip(plenty, little, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    scarce(10**12)
    more = RUN | {"max_steps": 3}
    ended = tokenrl.train(**more, resume="auto", output_dir=str(tmp_path / "little"))
    config = json.loads((ended.output_dir / "config.json").read_text())
    assert (config["micro_batch_size"], config["sampling_batch_size"]) == (1, 1)


def test_a_tiny_model_is_not_measured(monkeypatch):
    monkeypatch.setattr(fitting, "update_cost", None)
    learner = make_learner(make_policy())
    settle_memory(learner, [{"prompt": "a"}])
    assert learner.args.micro_batch_size is None


@pytest.mark.parametrize("limit, expected", [("1000", [1000 - 700 + 50]), ("max", [])])
def test_a_container_may_leave_less(tmp_path, limit, expected):
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert list(left_to_container(tmp_path)) == expected
    assert list(left_to_container(tmp_path / "nowhere")) == []
    old = tmp_path / "old" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2000")
    (old / "memory.usage_in_bytes").write_text("1500")
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 100")
    assert list(left_to_container(old.parent)) == [600]


def test_the_free_memory_is_that_of_the_computer():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
