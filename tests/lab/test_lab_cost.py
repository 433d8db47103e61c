"""What a measurement costs is known before it is paid; and an adapter is measured by itself."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from tiny_lab_model import WORDS, points, tiny_policy

from tokenrl.errors import Refused
from tokenrl.lab.measure import cost
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.lab.measure.cost import Budget, bytes_of_group, rows_at_once
from tokenrl.lab.measure.measurement import measure_gradients, measure_with
from tokenrl.lab.measure.projections import chosen_parameters
from tokenrl.language.policy.lora import add_lora
from tokenrl.language.policy.model import load_policy
from tokenrl.language.policy.saving import save_policy
from tokenrl.runs.console import Console

torch.set_num_threads(1)
ROWS = [{"prompt": word} for word in WORDS * 8]
TASK = SimpleNamespace(
    name="points", train_prompts=ROWS, eval_prompts=ROWS, reward=points, max_completion_length=2
)
FEW = {"num_prompts": 16, "num_generations": 4, "prompts_per_step": 2, "probes": 8}


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(cost.time, "monotonic", lambda: now.seconds)
    return now


def test_a_stage_that_would_take_too_long_ends_after_its_first_part(clock):
    budget = Budget(Console(quiet=True), max_minutes=30)
    with budget.stage("sampling", 2) as after:
        for _ in range(2):
            clock.seconds += 60
            after()
    words = "at least 52 minutes, and max_minutes is 30: differentiating took 60 seconds .* of 50 parts"
    with (
        pytest.raises(Refused, match=words) as caught,
        budget.stage("differentiating", 50) as after,
    ):
        clock.seconds += 60
        after()
    assert "--num-prompts" in str(caught.value) and "--lora-r" in str(caught.value)


def test_a_stage_within_its_time_is_left_alone_and_without_a_limit_too(clock):
    for minutes in (50, None):
        budget = Budget(Console(quiet=True), minutes)
        with budget.stage("differentiating", 50) as after:
            for _ in range(50):
                clock.seconds += 59
                after()
        assert clock.seconds % (50 * 59) == 0  # it went to its end


@pytest.mark.parametrize(("each", "shown"), [(5, True), (0.1, False)])
def test_a_long_stage_shows_what_is_left_and_a_short_one_does_not(clock, each, shown):
    page = io.StringIO()
    with Budget(Console(file=page), None).stage("differentiating", 20) as after:
        for _ in range(20):
            clock.seconds += each
            after()
    assert ("step  1/20  ETA 1:35" in page.getvalue()) is shown
    assert bool(page.getvalue()) is shown


def fitting(monkeypatch, groups, *, rows=None, policy=None):
    """The rows that are chosen when the memory is enough for so many groups of four, and a half."""
    policy = policy or tiny_policy()
    parameters = chosen_parameters(policy)
    args = MeasureArguments(task="points", rows_at_once=rows, **FEW)
    group = bytes_of_group(policy, parameters, 2, 2, 4, entropy=False)
    probes = 8 * 8 * sum(p.numel() for p in parameters.values())
    room = probes + 24 * 16 * 4 * 2 * 8 + (groups + 0.5) * group
    monkeypatch.setattr(cost, "free_memory", lambda device: int(room / cost.FREE))
    return rows_at_once(policy, parameters, [1, 2] * 8, 2, args, entropy=False)


def test_as_many_rows_as_fit_into_memory_are_taken_at_once(monkeypatch):
    assert [fitting(monkeypatch, groups) for groups in (1, 3, 1000)] == [4, 12, 1024]
    assert fitting(monkeypatch, 3, rows=8) == 8


def test_what_does_not_fit_is_refused_with_what_it_needs(monkeypatch):
    with pytest.raises(Refused, match=r"would need about .* for 4 completions at once.*--lora-r 8"):
        fitting(monkeypatch, 0)
    with pytest.raises(Refused, match=r"for 16 completions at once. Give rows_at_once=12"):
        fitting(monkeypatch, 3, rows=16)


def test_entropies_longer_texts_and_a_differentiated_head_cost_more():
    policy = tiny_policy("llama")
    whole = chosen_parameters(policy)
    plain = bytes_of_group(policy, whole, 2, 2, 4, entropy=False)
    assert bytes_of_group(policy, whole, 2, 2, 4, entropy=True) > plain
    assert bytes_of_group(policy, whole, 2, 3, 4, entropy=False) > plain
    assert bytes_of_group(policy, whole, 3, 2, 4, entropy=False) > plain
    block = chosen_parameters(policy, ["layers.0"])
    assert bytes_of_group(policy, block, 2, 2, 4, entropy=False) == plain - 8 * 4 * 8 * 8  # V x H in float64


def test_a_new_adapter_is_measured_by_itself():
    page = io.StringIO()
    policy = tiny_policy()
    args = MeasureArguments(model=policy, task=TASK, estimators=("rloo",), lora_r=2, **FEW)
    found = measure_with(args, Console(file=page))
    own = sum(p.numel() for p in policy.trainable_parameters())
    assert f"Differentiating 64 completions in {own:,} parameters (all)." in page.getvalue()
    whole = measure_gradients(model=tiny_policy(), task=TASK, estimators=("rloo",), **FEW)
    assert 0 < found.estimators[0].variance.value < whole.estimators[0].variance.value


def test_of_a_run_that_trained_an_adapter_that_adapter_is_measured(tmp_path):
    base = tiny_policy()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    policy = load_policy(tmp_path / "base", dtype="float64")
    add_lora(policy, r=2)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(0.1)
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_policy(policy, tmp_path / "run" / "model")
    how = {"task": TASK, "estimators": ("rloo",), "dtype": "float64", **FEW}
    page = io.StringIO()
    found = measure_with(MeasureArguments(model=str(tmp_path / "run"), **how), Console(file=page))
    assert "trained an adapter" in page.getvalue() and found.model.endswith("adapter")
    again = measure_gradients(model=policy, **how)
    assert found.estimators[0].variance.value == pytest.approx(again.estimators[0].variance.value, rel=1e-9)
    merged = measure_gradients(model=str(tmp_path / "run" / "model"), **how)  # all weights
    assert merged.estimators[0].variance.value > 2 * found.estimators[0].variance.value
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(Refused, match="cannot be loaded on its base model"):
        measure_gradients(model=str(tmp_path / "run"), **how)
