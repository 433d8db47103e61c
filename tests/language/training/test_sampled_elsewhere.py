"""Whole runs with engines that report the trainer's log-probabilities: one is honest, one samples elsewhere."""

from __future__ import annotations

import dataclasses
import math

from refusals import stopped
from tiny_models import Engine, make_policy, make_task

import tokenrl
from tokenrl.language.rollout.scoring import USUAL, score_in_parts
from tokenrl.runs.metrics import read_metrics


class Reporting(Engine):
    temperature = 1.0

    def __init__(self, policy, _):
        super().__init__(policy)
        self.trainer = policy.model

    def generate(self, prompt_ids, sampling, draws):
        own = dataclasses.replace(sampling, temperature=self.temperature)
        rollout = super().generate(prompt_ids, own, draws)
        logp = score_in_parts(self.trainer, rollout, USUAL, distribution=sampling).logprobs
        return dataclasses.replace(rollout, sampling_logprobs=logp)


class Colder(Reporting):
    temperature = 0.85


def trained(folder, engine, **options):
    """The rows of a run of a policy that is not sure of its tokens, and in no step sure of the same."""
    settings = {"model": make_policy("gpt2", initializer_range=0.4), "task": make_task()}
    settings |= {"prompts_per_step": 4, "num_generations": 8, "learning_rate": 3e-3}
    settings |= {"eval_every": 0, "eval_generations": 0, "lr_scheduler_type": "constant"}
    settings |= {"cpu": True, "quiet": True, "generator": engine, "output_dir": folder}
    tokenrl.train(**settings | options)
    return read_metrics(folder / "metrics.jsonl")[1:]


def test_an_engine_that_samples_elsewhere_is_stopped_and_nothing_else_tells_it(tmp_path):
    words = (
        "generate returned a rollout that cannot be used.*not drawn from the probabilities that it"
    )
    with stopped(rf"At step \d+: Colder.{words}"):
        trained(tmp_path, Colder, max_steps=30, num_generations=32)
    rows = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert max(row["sampling/logp_difference/max"] for row in rows) < 1e-4


def test_an_honest_engine_is_not_and_goes_on_to_the_same_evidence(tmp_path):
    whole = trained(tmp_path / "whole", Reporting, max_steps=4)
    trained(tmp_path / "parts", Reporting, max_steps=2)
    resumed = trained(tmp_path / "parts", Reporting, resume="auto", max_steps=4)
    assert resumed[2:] == whole[2:]
    assert 0 != max(row["sampling/evidence"] for row in whole) < math.log(1e3)
    assert max(abs(row["sampling/surprise"]) for row in whole) < 0.3
