"""Whole runs with engines that sample from other probabilities than they report: told in words, and stopped."""

from __future__ import annotations

import dataclasses
import math

from refusals import stopped
from tiny_models import Engine, make_policy, make_task

import tokenrl
from tokenrl.language.rollout.scoring import USUAL, score_in_parts
from tokenrl.runs.metrics import read_metrics

NAMES = ("sampling/surprise", "sampling/evidence")


class Reporting(Engine):
    """Samples from a policy of its own, and reports the log-probabilities of the trainer."""

    temperature = 1.0

    def __init__(self, policy, _):
        super().__init__(policy)
        self.trainer = policy

    def generate(self, prompt_ids, sampling, draws):
        own = dataclasses.replace(sampling, temperature=self.temperature)
        rollout = super().generate(prompt_ids, own, draws)
        logp = score_in_parts(self.trainer.model, rollout, USUAL, distribution=sampling).logprobs
        return dataclasses.replace(rollout, sampling_logprobs=logp)


class Colder(Reporting):
    temperature = 0.7


def trained(folder, engine=None, **options):
    """A run of a policy that is not sure of its tokens, and in no step sure of the same."""
    policy = make_policy("gpt2", initializer_range=0.4)
    sizes = {"prompts_per_step": 4, "num_generations": 64, "max_steps": 12}
    rate = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "eval_every": 0}
    how = {"eval_generations": 0, "cpu": True, "quiet": True, "generator": engine or "transformers"}
    settings = {"model": policy, "task": make_task(), "output_dir": folder} | sizes | rate | how
    tokenrl.train(**settings | options)
    return read_metrics(folder / "metrics.jsonl")[1:]


def test_an_engine_that_reports_the_numbers_of_the_trainer_for_other_samples_is_stopped(tmp_path):
    words = (
        "generate returned a rollout that cannot be used.*not drawn from the probabilities that it"
    )
    with stopped(rf"At step \d+: Colder.{words}"):
        trained(tmp_path / "run", Colder, max_steps=30)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(row["sampling/logp_difference/max"] < 1e-4 for row in rows[1:]), "nothing else tells"


def test_an_honest_engine_goes_on_to_the_same_bits_and_without_one_nothing_is_bet(tmp_path):
    few = {"num_generations": 8}
    whole = trained(tmp_path / "whole", Reporting, max_steps=4, **few)
    trained(tmp_path / "parts", Reporting, max_steps=2, **few)
    resumed = trained(tmp_path / "parts", Reporting, resume="auto", max_steps=4, **few)
    assert resumed[2:] == whole[2:]
    evidence = [row["sampling/evidence"] for row in whole]
    assert max(evidence) < math.log(1e3) and len({*evidence}) == len(whole)
    assert all(abs(row["sampling/surprise"]) < 0.3 for row in whole)
    plain = trained(tmp_path / "plain", max_steps=4, **few)
    others = [{name: x for name, x in row.items() if name not in NAMES} for row in whole]
    assert [row.keys() for row in others] == [row.keys() for row in plain]
