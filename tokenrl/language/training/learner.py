"""Makes and holds what outlives a training step: the policy, its optimiser, the critic, the generator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenrl.core.divergences import next_beta
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Stopped
from tokenrl.files import State
from tokenrl.language.policy.copies import frozen_copy
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.allowed import with_allowed
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.forward import Forward, choose_forward, shape_of
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.rollout import Rollout, Table, lengths, to_device
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import (
    Regime,
    Scores,
    score,
    score_in_parts,
    with_missing_fields,
)
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.engines import check_vocabulary, engine_of, start_engine
from tokenrl.language.training.optimizer import make_optimizer
from tokenrl.language.training.replay import Replay
from tokenrl.language.training.teacher import MovingAverage, Teacher, teacher_regime
from tokenrl.language.training.teacher_prompts import TeacherPrompts
from tokenrl.runs.processes import all_reduce_sum, broadcast_weights, sum_gradients
from tokenrl.settings import part_of

if TYPE_CHECKING:
    from tokenrl.language.training.experience import Experience

COUNTS = ("nonfinite", "skipped", "idle")  # from which a continuation goes on


class Critic:
    """A linear head on the policy's last hidden state, with an optimiser of its own.

    The critic's loss does not reach the policy's weights, so the policy's gradient is the estimator's alone.
    A value depends on the prompt and the tokens before the action alone, so it is a valid baseline, even if wrong.

    Attributes:
        head: layer norm and linear map, in float32; at the start all values are 0.
        optimizer: AdamW over the head's parameters.
        iterations: passes over the step's rows in each update.
    """

    def __init__(
        self, hidden_size: int, device: torch.device, learning_rate: float, iterations: int
    ) -> None:
        """Make a critic on a device, whose values are all 0, for hidden states of width H."""
        linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), linear).to(device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=learning_rate, weight_decay=0.0
        )
        self.iterations = iterations

    def values(self, hidden: Tensor | None) -> Tensor:
        """Return the values [n, T] of the states whose features are `hidden` [n, T, H]."""
        assert hidden is not None, "sample with keep_hidden=True"
        return self.head(hidden.float()).squeeze(-1)

    def update(
        self,
        estimator: Estimator,
        hidden: Tensor | None,
        returns: Tensor,
        weights: Tensor,
        accelerator: Any,
    ) -> float:
        """Fit the values to the returns; return the loss before it, summed over all processes.

        Args:
            estimator: defines the loss.
            hidden: features of this process's rows [n, T, H].
            returns: return from each state on, the target of its value [n, T].
            weights: weight of each state in the loss of the step [n, T]; over all processes they sum to 1.
            accelerator: sums gradients over processes.
        """
        old = self.values(hidden).detach()
        returns, weights = (to_device(x.float(), old.device) for x in (returns, weights))
        first = old.new_zeros(())
        for i in range(self.iterations):
            self.optimizer.zero_grad()
            values = self.values(hidden)
            loss = estimator.critic_loss(values, returns, weights, old_values=old)
            loss.backward()
            sum_gradients(accelerator, self.head.parameters())
            first = first if i else loss.detach()
            self.optimizer.step()
        return float(all_reduce_sum(accelerator, first))

    def state_dict(self) -> State:
        """Return the weights of the head and the state of its optimiser."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass
class Learner:
    """What an update reads and changes, such as the policy and its optimiser.

    Attributes:
        policy: the policy, with the weights that the optimiser changes.
        forward: how forward passes are computed: what is sampled and scored, and what gradients flow through.
        optimizer: the optimiser of the policy's trainable parameters, wrapped by accelerate.
        accelerator: accelerate's handle of device, precision and processes.
        estimator: turns rewards into advantages and a loss. KL control replaces it to change its `beta`.
        args: the settings of the run, none of which is open.
        engine: the engine of the run, as messages call it.
        sampling: how the run samples; callers set the step.
        generator: samples the run's completions.
        critic: predicts values, for the estimators that need them; else None.
        teacher_prompts: makes the prompts of the teacher; None if it reads those of the policy.
        average: the moving average of the policy's weights that the teacher has; None if it has others.
        replay: the best completions of each prompt, of which some join those of a step; None where nobody reads them.
        log: the `PromptStream` that draws groups of rows that somebody else sampled; None without any.
        nonfinite, skipped: numbers of updates without a finite gradient, the consecutive ones up to now and all.
        idle: number of all updates so far that were left out because no row could have a gradient.
    """

    policy: Policy
    forward: Forward
    optimizer: Any
    accelerator: Any
    estimator: Estimator
    args: TrainArguments
    engine: str
    sampling: Sampling
    generator: Generator
    critic: Critic | None = None
    teacher_prompts: TeacherPrompts | None = None
    average: MovingAverage | None = None
    replay: Replay | None = None
    log: Any = None
    nonfinite: int = 0
    skipped: int = 0
    idle: int = 0

    @cached_property
    def kept(self) -> dict[str, Any]:
        """The fields of a sampling that say what the estimator reads of the sampled tokens."""
        needs = self.estimator.needs
        return {
            "keep_score_norms": "score_norms" in needs,
            "keep_hidden": "values" in needs,
            "keep_distribution": self.estimator.importance_centre,
        }

    @property
    def group_size(self) -> int:
        """The completions of a prompt in a step, new and replayed ones."""
        return self.args.num_generations + self.args.replay

    def score(self, rows: Experience) -> Scores:
        """Score rows under the policy and the distribution of sampling, with a gradient and all that the loss needs."""
        estimator = self.estimator
        reference = None
        if "token_kl" in estimator.needs:
            states: Any = rows.ref_states
            if states is None:
                states = self.ref_scores(rows, rows.teacher_prompts, states=True).states
            reference = states, self.forward.ref_head
        return score(
            self.forward.model,
            rows,
            self.forward.regime,
            distribution=self.sampling,
            entropy=estimator.entropy_coef > 0,
            centres=estimator.score_centres if estimator.importance_centre else None,
            reference=reference,
        )

    def ref_scores(
        self, rows: Rollout, prompts: Sequence[list[int]] | None, *, states: bool
    ) -> Scores:
        """Score rows under the reference, without a gradient, at the same temperature over all tokens.

        Args:
            rows: n rows.
            prompts: ids of the prompts that a teacher reads in place of theirs; None where it reads the same.
            states: whether what the head is given is returned too.
        """
        if prompts is not None:
            rows = rows.behind(prompts, self.policy.pad_id)
        regime = self.forward.reference_regime
        with self.forward.policy.reference_model() as reference:
            return self.scores(rows, reference, regime, self.sampling.whole, states=states)

    def scores(
        self,
        rows: Rollout,
        model: nn.Module,
        regime: Regime,
        distribution: Distribution,
        **also: bool,
    ) -> Scores:
        """Score n rows under a model, without a gradient; with `states` return what its head is given too."""
        parts = self.micro_batches(rows, regime)
        return score_in_parts(model, rows, regime, parts=parts, distribution=distribution, **also)

    def with_missing_fields(self, rows: Table) -> Table:
        """Return sampled rows with the columns of the policy that the estimator needs, where they are missing."""
        model, regime = self.forward.policy, self.forward.regime
        sampling = replace(self.sampling, **self.kept)
        return with_missing_fields(model, rows, regime, sampling, self.micro_batches(rows))

    def micro_batches(
        self, rows: Rollout, regime: Regime | None = None, computed: Any = ...
    ) -> Iterator[Tensor]:
        """Yield the numbers of the rows of each pass, as `Passes.divide` divides them.

        Args:
            rows: this process's n rows. A group that is divided has its prompt computed in each pass.
            regime: how they are scored; None for as the policy is.
            computed: True for the rows that are computed [n]; all by default.
        """
        regime = regime or self.forward.regime
        numbers = torch.arange(len(rows))
        groups = rows.distinct_prompts()[1] if regime.share_prompt else numbers
        shapes = torch.stack([lengths(rows.mask), rows.prompt_mask.sum(dim=1), groups])
        for part in self.forward.divide(shapes[:, computed].tolist(), self.args.micro_batch_size):
            yield numbers[computed][part]

    @property
    def largest_norm(self) -> float:
        """The norm to which gradients are clipped; infinite without a limit."""
        return self.args.max_grad_norm or math.inf

    def sync(self) -> None:
        """Sample and score with the present weights."""
        self.forward.copy_weights()
        self.generator.sync(self.policy)

    def accepts(self, norm: float, learns: bool) -> bool:
        """Return whether the optimiser may take a step, and count the updates in which it may not.

        Without a row to learn from, AdamW would still move the weights along its momentum and decay them.

        Args:
            norm: length of the gradient, which never reaches the weights if it is not finite.
            learns: whether any row, of any process, can have a gradient.

        Raises:
            Stopped: too many consecutive updates had a gradient that was not finite.
        """
        if not learns:
            self.idle += 1
            return False
        if math.isfinite(norm):
            self.nonfinite = 0
            return True
        self.skipped += 1
        self.nonfinite += 1
        if self.nonfinite >= self.args.stop_after_nonfinite:
            raise Stopped(
                f"The gradient was not finite in {self.nonfinite} updates in a row (all skipped). Lower the "
                "learning rate or the scale of the rewards; in low precision try float32. On a GPU a kernel may be at "
                "fault, as of torch's attention: try --training-attention eager."
            )
        return False

    def adapt_beta(self, metrics: Mapping[str, float], learns: bool) -> dict[str, float]:
        """Set the weight of the KL for the next step from the KL measured in this step (see `next_beta`).

        Without a `target_kl` the weight stays as it is, and so it does in a step in which the policy does not
        learn. All processes measure the same KL.

        Returns:
            `kl_coef`, the weight that this step used; nothing without a KL.
        """
        used = self.estimator.beta
        target, gain = self.args.target_kl, self.args.kl_gain
        if used and target is not None and learns:
            beta = next_beta(used, metrics["kl"], target=target, gain=gain)
            self.estimator = replace(self.estimator, beta=beta)
        return {"kl_coef": used} if used else {}

    def state_dict(self) -> State:
        """Return what a continuation needs besides the weights; tensors are references, not copies."""
        counts = {name: getattr(self, name) for name in COUNTS}
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {"kl_coef": self.estimator.beta} | counts | parts

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned; the policy has its weights already."""
        self.estimator = replace(self.estimator, beta=state["kl_coef"])
        for name in COUNTS:
            setattr(self, name, int(state[name]))
        for name, part in self._parts().items():
            part.load_state_dict(state.get(name, {}))  # an engine may be another one now

    def _parts(self) -> dict[str, Any]:
        """Return the parts that have a state to be saved, by name."""
        parts = {
            "optimizer": self.optimizer,
            "critic": self.critic,
            "sampler": self.generator if hasattr(self.generator, "state_dict") else None,
            "teacher": self.average,
            "replay": self.replay,
            "log": self.log,
        }
        return {name: part for name, part in parts.items() if part is not None}


def make_learner(
    args: TrainArguments,
    policy: Policy,
    accelerator: Any,
    teacher: Teacher | None = None,
    *,
    rows: Iterable[Any] = (),
    turns: bool = False,
    **decided: Any,
) -> Learner:
    """Make the learner, with optimiser, reference, generator and critic.

    Args:
        args: the settings of the run.
        policy: the policy to train.
        accelerator: accelerate's handle of device, precision and processes.
        teacher: the teacher; None without one. The model of another policy is this policy's reference already.
        rows: all rows of the task that are sampled, whose completions a rule may allow.
        turns: whether episodes of several turns are sampled.
        **decided: settings that the run has decided, which join those about computing.

    Raises:
        Refused: a model cannot be sampled and scored, or not in the regime that the settings ask for.
    """
    device = accelerator.device
    check_vocabulary(args.estimator, policy)  # before anything is computed
    policy.model.to(device)
    sampling = with_allowed(policy, rows, part_of(args, Sampling))
    broadcast_weights(policy.model)
    if args.estimator.needs_reference:
        if teacher is not None and teacher.policy is None:
            policy.reference = frozen_copy(policy.model)
        policy.add_reference()
        if policy.reference is not None:
            policy.reference.to(device)
    forward, computing = choose_forward(
        args,
        policy,
        accelerator,
        length=args.max_completion_length,
        hidden="values" in args.estimator.needs,
        turns=turns,
    )
    if teacher is not None and teacher.policy is not None:
        regime = teacher_regime(teacher.policy, forward.policy.reference, accelerator)
        forward = replace(forward, reference_regime=regime)
    engine = engine_of(args.generator, args.generator_cache)
    at_once = args.sampling_batch_size
    generator = start_engine(engine.make, forward.policy, forward.regime, at_once, args.sync_every)
    learner = Learner(
        policy=policy,
        forward=forward,
        optimizer=accelerator.prepare(make_optimizer(args, policy)),
        accelerator=accelerator,
        estimator=args.estimator,
        args=replace(args, **decided, **computing),
        engine=engine.name,
        sampling=sampling,
        generator=generator,
        teacher_prompts=None if teacher is None else teacher.prompts,
    )
    if args.teacher_decay is not None:
        learner.average = MovingAverage(policy, args.teacher_decay)
    if args.replay or args.control_arm == "best_of_n":
        learner.replay = Replay(args.replay, args.replay_memory, args.seed)
    if "values" in args.estimator.needs:
        width = shape_of(policy).hidden_size
        learner.critic = Critic(width, device, args.value_learning_rate, args.value_iterations)
    return learner
