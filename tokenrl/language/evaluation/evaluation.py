"""Measures a policy by rewarded completions of held-out prompts.

pass@k, best@k, groups of equal rewards and KL are estimated without bias for each prompt and
averaged over prompts, so their standard errors are over prompts; lengths, truncations, entropy and the
rewards of single functions are averaged over completions or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tokenrl.errors import Refused
from tokenrl.language.evaluation.estimates import (
    best_of,
    estimates,
    known_rewards,
    metric_values,
    over_prompts,
)
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import check_model, checked_generator
from tokenrl.language.rollout.allowed import with_allowed
from tokenrl.language.rollout.episodes import ENDINGS
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.rewarded import (
    Rewarded,
    completion_kl,
    completion_rows,
    episode_metrics,
    sample_and_reward,
)
from tokenrl.language.rollout.rollout import cat
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.scoring import USUAL, Regime, score_in_parts, with_missing_fields
from tokenrl.language.tasks.rows import Row
from tokenrl.runs.metric_table import reaches
from tokenrl.runs.output import message_text, with_errors
from tokenrl.runs.processes import agreed, gather_objects
from tokenrl.runs.reader import Tabled

SCORED_AT_ONCE = 32  # completions that are scored at once, which bounds their logits
RARE = ("/abstained", *(f"episodes/{ending}" for ending in ENDINGS))
"""Ends of the names of metrics that are left out where they are 0."""
LEFT_OUT: Any = dict.fromkeys(
    ("data", "logs", "environments", "openings", "sampling_distribution", "hidden")
)
"""The columns that no process sends to the others."""


@dataclass(frozen=True, repr=False)
class Evaluation(Tabled):
    """An evaluation. It is shown as a small table of its metrics.

    Attributes:
        metrics: the metrics by name.
        rows: the greedy completions as table rows, one for each prompt, see `completion_rows`.
        by_prompt: the metrics that are means over prompts, for each prompt by itself.
        sampling: how completions were sampled, such as its `max_completion_length`.
        failures: what failed in each episode, an empty text if nothing did; none without an environment.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    by_prompt: dict[str, list[float]]
    sampling: Sampling
    failures: Sequence[str] = ()

    @property
    def constant(self) -> str:
        """The greedy completion with quotes, if it is the same for different prompts; else an empty text."""
        prompts, answers = (
            {repr(row[name]) for row in self.rows} for name in ("prompt", "completion")
        )
        return max(answers) if len(answers) == 1 < len(prompts) else ""

    def _rows(self) -> list[tuple[str, ...]]:
        return [(type(self).__name__, "value"), *with_errors(self.metrics).items()]

    def _ending(self) -> list[str]:
        return [
            f"{len(self.rows)} prompts, a greedy completion and {self.sampling.num_generations} samples of each, "
            f"of at most {self.sampling.max_completion_length} tokens"
        ]


@dataclass(frozen=True)
class Evaluator:
    """Samples, rewards and scores completions of a policy; a run makes one for all its evaluations.

    Attributes:
        policy: the policy.
        generator: samples the completions.
        regime: how the policy is scored, for what a generator of another engine does not return.
        accelerator: accelerate's handle, in a run of several processes; None for a single process.
        reference: the policy to which the KL of the sampled completions is estimated; both policies at the
            temperature of sampling, and this one over all tokens. Where it ends before a completion does, no
            later token counts. None for no KL.
        reference_regime: how the reference is scored.
        reference_prompts: returns the ids of the prompts that the reference reads in place of those of a batch;
            None for the same.
    """

    policy: Policy
    generator: Generator
    regime: Regime = USUAL
    accelerator: Any = None
    reference: Policy | None = None
    reference_regime: Regime = USUAL
    reference_prompts: Callable[[Rewarded], Sequence[list[int]]] | None = None

    def evaluate(
        self, prompts: Sequence[Row], rewards: Rewards, sampling: Sampling, k: Sequence[int] = ()
    ) -> Evaluation:
        """Evaluate the policy on held-out prompts, as `evaluate_policy` says; several processes share them."""
        size = sampling.num_generations
        k = check_sizes(k, size)
        if not prompts:
            raise Refused(
                "There are no prompts to evaluate on: give an eval_split or an eval_size."
            )
        if self.reference is not None:
            single = prompts if rewards.environments is None else ()
            _check_reference(self.policy, self.reference, single, sampling)
        tables = []
        # The greedy completions, then those that are sampled.
        for count in dict.fromkeys((0, size)):
            draw = replace(sampling, num_generations=count)
            tables.append(self.table(prompts, rewards, draw, "evaluation"))
        greedy = tables[0]
        by_prompt = {}
        if rewards.functions:
            by_prompt["reward_greedy"] = greedy.reward_list()
        if size:
            by_prompt |= _by_prompt(tables[-1], size, rewards, k)
        metrics = _metrics(tables[-1], by_prompt, rewards.names)
        rows = completion_rows(self.policy, greedy, rewards.names)
        failures = [failure for table in tables for failure in table.failures or ()]
        return Evaluation(metrics, rows, by_prompt, sampling, failures)

    def table(
        self, prompts: Sequence[Row], rewards: Rewards, sampling: Sampling, stream: str
    ) -> Rewarded:
        """Sample, reward and score completions; return those of all processes, in the order of the prompts.

        With a reference, sampled completions have its log-probabilities, up to where it ends: those of the policy
        stand after that, so that they add nothing to the KL. What only its own process needs is left out, as what
        functions logged.

        Args:
            prompts: rows with a `prompt`; other columns reach the rewards.
            rewards: the reward functions.
            sampling: how to sample.
            stream: the stream of random numbers, a name in `STREAMS`.
        """
        sampling = with_allowed(self.policy, prompts, sampling)
        collect = self._batches if self.accelerator is None else agreed(self._batches)
        batches = collect(prompts, rewards, sampling, stream)
        table = cat(batches if self.accelerator is None else gather_objects(batches))
        table = table.take(table.prompt_index.argsort(stable=True))
        data = [prompts[i] for i in table.prompt_index.tolist()]
        return replace(table, data=data, logs=[{}] * len(data))

    def _batches(
        self, prompts: Sequence[Row], rewards: Rewards, sampling: Sampling, stream: str
    ) -> list[Rewarded]:
        """Return the batches of this process, without what is left out."""
        batches = []
        for batch in sample_and_reward(
            self.policy,
            self.generator,
            prompts,
            rewards,
            sampling,
            stream=stream,
            accelerator=self.accelerator,
        ):
            parts = torch.arange(len(batch)).split(SCORED_AT_ONCE)
            batch = with_missing_fields(self.policy, batch, self.regime, sampling, parts)
            if sampling.num_generations:
                self.generator.check(batch, sampling)
                if self.reference is not None:
                    logprobs = self._ref_logprobs(self.reference, batch, sampling, parts)
                    batch = replace(batch, ref_logprobs=logprobs)
            batches.append(replace(batch, **LEFT_OUT))
        return batches

    def _ref_logprobs(
        self, reference: Policy, batch: Rewarded, sampling: Sampling, parts: Sequence[Tensor]
    ) -> Tensor:
        """Return the log-probabilities under the reference, up to where it ends [N, T]."""
        read = batch
        if self.reference_prompts is not None:
            read = batch.behind(self.reference_prompts(batch), reference.pad_id)
        scores = score_in_parts(
            reference.model,
            read,
            self.reference_regime,
            parts=parts,
            distribution=sampling.whole,
        )
        # Of what follows where the reference ends, but the policy does not, it has learnt nothing.
        ends = {*reference.ends} - {*self.policy.ends}
        ids = torch.tensor([*ends], dtype=torch.int64)
        over = torch.isin(batch.completion_ids, ids) & batch.mask
        earlier = over.cumsum(dim=1) - over.long()
        return torch.where(earlier == 0, scores.logprobs, batch.logprobs)


def evaluate_policy(
    policy: Policy,
    prompts: Sequence[Row],
    rewards: Rewards,
    sampling: Sampling,
    *,
    k: Sequence[int] = (),
    reference: Policy | None = None,
    generator: Generator | None = None,
) -> Evaluation:
    """Evaluate a policy on held-out prompts.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions; `binary` and `pass_threshold` say what a right answer is.
        sampling: how completions are sampled; with 0 generations only the greedy completion is evaluated.
            Evaluations with the same seed use the same random numbers in every step of a run.
        k: the values of k for pass@k or best@k.
        reference: the policy to which the KL is estimated, see `Evaluator`.
        generator: samples the completions; None for the policy's own model, which is tried on a few tokens first.

    Returns:
        The metrics, with standard errors over prompts (`..._stderr`). `completions/mean_length` in tokens,
        `completions/clipped_ratio` and `entropy` in nats per token; with environments also `episodes/turns`
        and the share of each ending, `episodes/{ending}`. If nothing is sampled, these describe the greedy
        completions. With reward functions `reward_greedy` and `rewards/{name}/mean`, and of sampled
        completions `reward`, `pass@k` if the rewards have a `pass_threshold`, and `best@k` unless they are
        binary. With a reference `kl` and `kl_k3`.

    Raises:
        Refused: there are no prompts, a prompt is too long, a k is larger than the number of generations, or
            the reference has another vocabulary.
        Stopped: a reward function failed.
    """
    regime = USUAL if reference is None else check_model(reference, gradient=False)
    generator = generator or checked_generator(policy, rewards.environments)
    evaluator = Evaluator(policy, generator, reference=reference, reference_regime=regime)
    return evaluator.evaluate(prompts, rewards, sampling, k)


def check_sizes(k: Iterable[int], num_generations: int) -> tuple[int, ...]:
    """Sort the values of k and drop repeated ones.

    Raises:
        Refused: a k is larger than the number of completions per prompt, so there is no unbiased estimate.
    """
    sizes = tuple(sorted(set(k)))
    if sizes and not (sizes[0] >= 1 and sizes[-1] <= num_generations):
        listed = " ".join(map(str, sizes))
        raise Refused(
            f"k={listed} with num_generations={num_generations}: the best of k needs k samples. Give k from 1 "
            f"to {num_generations}, or more samples."
        )
    return sizes


def _check_reference(
    policy: Policy, reference: Policy, prompts: Sequence[Row], sampling: Sampling
) -> None:
    """Refuse a reference to which no KL can be estimated: another vocabulary, no room, or no samples."""
    rows = [p.model.get_input_embeddings().num_embeddings for p in (policy, reference)]  # type: ignore[operator]
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab() or rows[0] != rows[1]:
        raise Refused(
            f"The reference {reference.source!r} has another vocabulary than {policy.source!r}, so the KL is "
            "not defined. Give the model that training started from."
        )
    if not sampling.num_generations:
        raise Refused(
            "num_generations=0 samples none, but the KL to a reference is estimated from samples."
        )
    if reference.context != policy.context:
        whole = replace(sampling, truncate_prompts=False)
        encode(reference, prompts, whole, remedy="shorter prompts")


def _by_prompt(
    table: Rewarded, size: int, rewards: Rewards, k: Sequence[int]
) -> dict[str, list[float]]:
    """Compute the metrics that are means over prompts, for each of B prompts; nan where there is no value.

    Args:
        table: the B * G sampled completions, prompt by prompt.
        size: G.
        rewards: the reward functions.
        k: values of k for pass@k or best@k, at most G.
    """
    each = {}
    if rewards.functions:
        rewarded = known_rewards(table.rewards, table.valid, size)
        mark = rewards.pass_threshold
        each["reward"] = [over_prompts(total).value for total in rewarded]
        for subset in k:
            if not rewards.binary:
                each[f"best@{subset}"] = [best_of(total, subset) for total in rewarded]
            if mark is not None:
                each[f"pass@{subset}"] = [
                    best_of(reaches(total, mark), subset) for total in rewarded
                ]
    if table.ref_logprobs is not None:
        for name, kl in completion_kl(table.logprobs, table.ref_logprobs, table.mask).items():
            each[name] = [fmean(group) for group in kl.view(-1, size).tolist()]
    return each


def _metrics(
    table: Rewarded, by_prompt: Mapping[str, Sequence[float]], names: Sequence[str]
) -> dict[str, float]:
    """Average rewards of single functions over completions, the entropy over tokens, others over prompts."""
    metrics = estimates(by_prompt, always=("reward", "reward_greedy"))
    if "reward" in by_prompt:
        metrics["reward"] = over_prompts(table.reward_list()).value
    means = {name: over_prompts(x.numpy()).value for name, x in metric_values(table, names).items()}
    if table.turns is not None:
        means |= episode_metrics(table)
    metrics |= {name: mean for name, mean in means.items() if mean or not name.endswith(RARE)}
    entropies = table.entropy.double().sum(dim=1).tolist()
    metrics["entropy"] = sum(entropies) / max(1, int(table.mask.sum()))
    return metrics


def transcript(prompt: str, messages: Sequence[Row], ending: str, failure: str | None) -> str:
    """Return an episode as text for people: what each role wrote, and how it ended."""
    if failure:
        ending = f"{ending}. {failure}"
    turns = [(message["role"], message_text(message)) for message in messages]
    turns = [("prompt", prompt), *turns, ("ending", ending)]
    indent = "\n           "
    return "\n".join(f"{role:<11}{text}".replace("\n", indent) for role, text in turns)
