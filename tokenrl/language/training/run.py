"""The state of a policy's training run: its parts, how far it has come, how long it is, and its result."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from tokenrl.core.memories import Memory
from tokenrl.core.schedules import policy_steps
from tokenrl.files import State
from tokenrl.language.evaluation.estimates import estimates
from tokenrl.language.evaluation.evaluation import Evaluation, Evaluator
from tokenrl.language.policy.characters import prompt_warnings
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.calls import TrainerState
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.supervised.defaults import check_prompts
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.records import remarks
from tokenrl.language.tasks.stream import PromptStream, few_prompts
from tokenrl.language.tasks.task import PromptTask, is_unrewarded
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.experience import data_keys
from tokenrl.language.training.learner import Learner
from tokenrl.language.training.search import Search
from tokenrl.language.training.settings import TrainPlan, evaluates
from tokenrl.language.training.teacher import Teacher, without_teacher
from tokenrl.runs.output import duration
from tokenrl.runs.processes import overruled
from tokenrl.runs.reader import Outcome
from tokenrl.runs.session import Session
from tokenrl.settings import shown

OFF = ("", "no", "none", "false", "0", "1", "default")
"""Values with which the others change nothing, as `accelerate launch` sets them."""


@dataclass(frozen=True, repr=False)
class RunResult(Outcome):
    """The result of a training run; see `Outcome` for the other fields.

    Attributes:
        exit_reason: `finished`, also where code of the user's raised `Finished`; `learnt` (ended early: all
            rewards are equal, and higher than before training); `stuck` (ended early too, but below what
            counts as solved); `solved` (a completion reached `stop_at_reward`); `no-improvement` (after `patience`
            evaluations); `callback`; `check`; or the name of the signal that stopped the run, such as `SIGTERM`.
        reason: the words of that `Finished`, or after how many completions it was solved; else empty.
        eval_before: evaluation on held-out prompts before training: `reward` (mean over samples),
            `reward_greedy` and more.
        tokens_per_second: tokens of the completions that were sampled in steps or logged, per second of steps; those
            that are greedy, replaced or replayed are left out.
        flags: warnings about the outcome: `policy-destroyed` (the reward fell and did not recover),
            `nothing-learnt` (no gain of held-out rewards beyond noise), `constant-answer` (all greedy
            completions are the same), `learnt-by-heart` (training prompts gained, held-out ones hardly),
            `critic-useless`, `few-prompts`, `entropy-collapsed`, `greedy-fell`,
            `environment-fails` (episodes of the last evaluation failed). A check has a short name for each
            problem and then for each remark, such as `no-signal` (all rewards are equal). Its exit code is 2
            if there was a problem.
        warm_started: the updates of the warm start and its losses; empty without one.
        best_completions: up to ten distinct completions of training steps, the best first, each with `reward`, `step`,
            `prompt` and `completion`. Those of evaluations are not among them, nor replayed or logged ones.
        completions_until_solved: with `stop_at_reward` the completions of training steps until the first sampled one
            with that reward, itself included, and greedy ones of earlier steps; None without such a completion.
        policy: the trained policy, with the weights that are in model/.
    """

    reason: str
    tokens_per_second: float
    flags: tuple[str, ...]
    warm_started: dict[str, Any]
    best_completions: list[Any]
    completions_until_solved: int | None
    policy: Policy = field(repr=False)


@dataclass
class TrainingRun:
    """The parts of a run, and how far it has come.

    Attributes:
        plan: the settings before the machine decided some, and where they come from.
        task: prompts to train on and to evaluate on.
        rewards: the reward functions.
        learner: the policy, its optimiser and the settings.
        stream: deals the prompts out to steps.
        memory: what the baseline remembers of earlier steps.
        threads: the number of threads of torch, and in words where it comes from.
        teacher: the teacher; None without one.
        warm_started: the updates of the warm start and its losses; empty without one.
        search: the best completions of steps so far, and when one had the reward at which the run ends.
        eval_seconds: seconds of the latest evaluation.
        totals: sums over all steps so far: the seconds of each reward by their names in timings.jsonl,
            `num_tokens` of prompts and completions, `completion_tokens`, and `num_samples`, greedy and
            replaced ones included.
        means: the mean reward of each held-out prompt [B], before training and at the latest evaluation.
        failures: what failed in each episode of the latest evaluation; empty without an environment.
        constant: the greedy completion of the latest evaluation if it is the same for all prompts; else empty.
    """

    plan: TrainPlan
    task: PromptTask
    rewards: Rewards
    learner: Learner
    stream: PromptStream
    memory: Memory
    threads: str
    teacher: Teacher | None
    warm_started: dict[str, Any]
    search: Search = field(init=False)
    eval_seconds: float = 0.0
    totals: Counter[str] = field(default_factory=Counter)
    means: list[list[float]] = field(default_factory=list)
    failures: Sequence[str] = ()
    constant: str = ""

    def __post_init__(self) -> None:
        """Let reward functions know the length of the run, and begin the search."""
        self.search = Search(self.args.stop_at_reward)
        self.tell(0)

    @property
    def args(self) -> TrainArguments:
        """The settings, none of which is open but for the directory."""
        return self.learner.args

    @property
    def title(self) -> str:
        """The run in a few words: task, estimator, seed."""
        return f"{self.task.name}, {self.args.estimator.preset_name}, seed {self.args.seed}"

    @property
    def sampled(self) -> int:
        """The completions of a step, sampled or logged, with greedy ones if the estimator needs them."""
        greedy = "greedy_rewards" in self.args.estimator.needs
        return self.args.completions + self.args.prompts_per_step * greedy

    @property
    def unrewarded(self) -> bool:
        """Whether training steps have no rewards, so that the KL to the teacher is all."""
        return is_unrewarded(self.args.reward)

    @cached_property
    def training_rewards(self) -> Rewards:
        """The rewards of training steps; without any, of the same environments, of which all rewards are 0."""
        if self.unrewarded:
            return Rewards([], environments=self.rewards.environments, unrewarded=True)
        return self.rewards

    @cached_property
    def evaluator(self) -> Evaluator:
        """Evaluates the policy, and its KL to the teacher where that is all that training ascends."""
        learner = self.learner
        policy = learner.forward.policy
        reference = None
        is_scored = self.unrewarded and self.args.eval_generations
        # A function makes what the teacher reads of the completions of a step.
        if policy.reference is not None and is_scored and self.args.teacher_context is None:
            reference = replace(policy, model=policy.reference, reference=None)
        prompts = learner.teacher_prompts
        return Evaluator(
            policy,
            learner.generator,
            learner.forward.regime,
            learner.accelerator,
            reference,
            learner.forward.reference_regime,
            None if prompts is None else partial(prompts.of, policy, sampling=learner.sampling),
        )

    def check_prompts(self) -> None:
        """Refuse prompts of the policy or the teacher that are too long or cannot be read; episodes have others."""
        learner = self.learner
        if self.rewards.environments is None:
            for rows in (self.task.train_prompts, self.task.eval_prompts):
                check_prompts(learner.policy, rows, learner.sampling)
                if learner.teacher_prompts is not None:
                    learner.teacher_prompts.check(learner.policy, rows, learner.sampling)

    def tell(self, step: int) -> None:
        """Tell the reward functions how many steps have been made."""
        self.rewards.state = TrainerState(step, self.args.max_steps, self.stream.epoch)

    def metrics_of(self, evaluation: Evaluation) -> dict[str, float]:
        """Return the metrics of an evaluation; for the control `best_of_n` the best reward of each prompt so far.

        A prompt that no step has sampled yet has the mean of the policy: so n is the same budget over all prompts.
        """
        best = {} if self.learner.replay is None else self.learner.replay.best
        if not best or self.args.control_arm != "best_of_n" or not self.args.eval_generations:
            return evaluation.metrics
        largest = {key: float(table.rewards[0]) for key, table in best.items()}
        keys = data_keys(self.task.eval_prompts).tolist()
        rewards = [*map(largest.get, keys, evaluation.by_prompt["reward"])]
        return evaluation.metrics | estimates({"reward": rewards})

    def state_dict(self) -> State:
        """Return what a continuation needs of the run itself; its parts have states of their own."""
        return {
            "totals": dict(self.totals),
            "means": self.means,
            "failures": list(self.failures),
            "constant": self.constant,
            "late": self.rewards.late,
            "search": self.search.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned."""
        self.totals = Counter(state["totals"])
        self.means = state["means"]
        self.failures = state.get("failures", ())  # a checkpoint of an earlier version has none
        self.constant = state.get("constant", "")
        self.rewards.late = state.get("late", 0)
        self.search.load_state_dict(state.get("search", {}))

    def result(self, session: Session) -> RunResult:
        """Return the result for the caller."""
        policy = self.learner.policy
        policy.trained_prompts = session.provenance.trained_prompts
        return RunResult(
            **session.outcome(),
            reason=session.reason,
            tokens_per_second=session.rate(self.totals["completion_tokens"]),
            flags=tuple(dict.fromkeys(session.flags)),
            warm_started=self.warm_started,
            best_completions=self.search.best,
            completions_until_solved=self.search.until_solved,
            policy=policy if self.teacher is None else without_teacher(policy),
        )

    def forecast_duration(self, step_seconds: float) -> str:
        """Return in words how long the run takes if a step takes `step_seconds`."""
        args = self.args
        # with those before and after training
        count = 1 + math.ceil(args.max_steps / args.eval_every) if args.eval_every else 2
        count *= evaluates(args, self.rewards)
        whole = args.max_steps * step_seconds + count * self.eval_seconds
        words = f"{args.max_steps} steps of {step_seconds:.2g} s"
        words = f"{words}, {count} evaluations of {self.eval_seconds:.2g} s"
        return f"{words}: about {duration(whole)} in all"

    def facts(self) -> dict[str, Any]:
        """Return the last lines of the header, which are printed when the model is ready."""
        policy = self.learner.policy
        trained = sum(p.numel() for p in policy.trainable_parameters())
        device = str(policy.device)
        if device == "cpu" and self.args.cpu is None and torch.accelerator.is_available():
            device = "cpu, as a Mac's GPU is no faster with a small model (--no-cpu takes it all the same)"
        facts = {
            "trained": f"{trained:,} parameters, on {device}",
            "threads": self.threads,
            "computing": self.learner.forward.words,
        }
        if not self.learner.generator.abilities.exact:
            facts["sampling"] = (
                f"by {self.learner.engine}, with random numbers of its own: the run is not bit-exact"
            )
        rules: Any = self.learner.sampling.allowed
        if rules:
            facts["allowed"] = f"{shown(self.args.allowed, 80)}, {len(rules.needed):,} states"
        if self.args.sync_every > 1:
            facts["sampling"] = f"from weights up to {self.args.sync_every - 1} steps old"
        return {**facts, **self.learner.forward.regime.remarks}


def warnings_of(run: TrainingRun) -> list[str]:
    """Return warnings about prompts and settings that are probably mistakes."""
    rows = run.task.train_prompts
    environments = run.rewards.environments
    warnings = [] if environments else few_prompts(rows)  # equal prompts begin different episodes
    if not run.args.check:  # which counts the characters that are lost among its problems
        warnings += prompt_warnings(run.learner.policy.tokenizer, rows)
    rewards = run.rewards
    judges = {f"the reward {n}": f for n, f in zip(rewards.names, rewards.functions, strict=True)}
    models = {"the model": run.learner.policy, "the teacher": run.teacher and run.teacher.policy}
    warnings += remarks(rows)
    warnings += division_of(run.task, run.args.eval_size, models | judges)[1]
    if environments and environments.has_tools and any(rows.column("tools")):
        warnings.append(
            f"the chat template describes the tools of {environments.__name__}, which alone can be called, and "
            "not those of the column tools."
        )
    drawn = run.args.max_steps * run.args.prompts_per_step
    if drawn <= len(rows) and run.args.prompt_weights not in ("uniform", *rows.columns):
        warnings.append(
            "prompt_weights sets its chances when a pass over the training prompts begins, and this run draws "
            f"{drawn:,} of {len(rows):,}: its rewards never change a chance. Give fewer rows, more steps, or a "
            "column of weights."
        )
    return [*warnings, *without_effect(run.args)]


def without_effect(args: TrainArguments) -> Iterator[str]:
    """Yield a warning for each setting, or variable, that was changed but has no effect with the others."""
    for name in overruled():
        if os.environ[name].lower() not in OFF:
            yield (
                f"{name}={os.environ[name]} has no effect: a run computes as its recorded settings say."
            )
    if args.warmup_steps >= policy_steps(args, args.max_steps) > 0:
        critic_first = f" - value_warmup={args.value_warmup}" if args.value_warmup else ""
        yield (
            f"warmup_steps={args.warmup_steps} is not less than max_steps={args.max_steps}{critic_first}, so the "
            "learning rate stays below its peak."
        )
    critic = "values" in args.estimator.needs, "the estimator has no critic"
    needs = {
        "replay_memory": (args.replay, "replay is 0"),
        "prompt_floor": (args.prompt_weights != "uniform", "prompt_weights is uniform"),
        "max_refills": (args.estimator.zero_spread == "refill", "zero_spread is not 'refill'"),
        "value_learning_rate": critic,
        "value_iterations": critic,
        "stop_at_reward": (not is_unrewarded(args.reward), "reward is none"),
        "rows_share": (args.rows is not None, "rows is not set"),
        "on_reward_timeout": (args.reward_timeout is not None, "reward_timeout is not set"),
        "allow_own_feedback": (args.teacher_context, "teacher_context is not set"),
        "kl_gain": (args.target_kl is not None, "target_kl is not set"),
        "warm_start_steps": (args.warm_start, "warm_start is not set"),
    }
    for name, (is_met, reason) in needs.items():
        value = getattr(args, name)
        if value != getattr(TrainArguments, name) and not is_met:
            yield f"{name}={value} has no effect, because {reason}."
