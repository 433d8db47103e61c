"""Loads the teacher of a run, a model that is the reference of the KL in place of the policy's start.

The teacher `self` is the policy itself: its weights before training, or their moving average. It is worth a
teacher if it reads another prompt.

Teacher and policy must have the same tokens under the same ids. Their embeddings and heads may still have
different numbers of rows, because these are padded to sizes that are fast. The teacher then gets as many rows
as the policy has (see `fit_rows`), so that both distributions are over the same ids, and each sums to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused
from tokenrl.language.policy.arguments import LoadingArguments
from tokenrl.language.policy.loading import context_of
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.saving import fingerprint
from tokenrl.language.rollout.agreement import check_model
from tokenrl.language.rollout.forward import shape_of
from tokenrl.language.rollout.head import head_of
from tokenrl.language.rollout.scoring import Regime
from tokenrl.language.supervised.base import load_base, policy_of, with_own_weights
from tokenrl.language.training.arguments import OWN, KlArguments, TrainArguments
from tokenrl.language.training.teacher_prompts import TeacherPrompts


class Teacher(NamedTuple):
    """The teacher of a run.

    Attributes:
        name: the name by which the arguments give it.
        policy: its frozen model, with as many rows as the policy's, and its tokenizer; None for the policy itself.
        line: its name and size in words, for the header.
        fingerprint: a hash of its weights as they were loaded; empty for the policy itself.
        prompts: how its prompts are made; None if it reads those of the policy.
    """

    name: str
    policy: Policy | None
    line: str
    fingerprint: str = ""
    prompts: TeacherPrompts | None = None


class MovingAverage:
    """An exponential average of the policy's weights, which the teacher has.

    Attributes:
        policy: the policy, whose reference is the teacher.
        decay: the share of the average that an update keeps.
        weights: the average of each weight that is trained, by name, in float32 or better.
    """

    def __init__(self, policy: Policy, decay: float) -> None:
        """Begin with the weights that the policy has now; the teacher has them too, as `frozen_copy` made it."""
        self.policy = policy
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        for name, weight in policy.model.named_parameters():
            if weight.requires_grad:
                wide = torch.promote_types(weight.dtype, torch.float32)
                self.weights[name] = weight.detach().to(wide, copy=True)

    def update(self) -> None:
        """Add the weights that the policy has now, and give the teacher the average."""
        self.load_state_dict(dict(self.policy.model.named_parameters()), self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average of each weight, by name."""
        return self.weights

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], decay: float = 0.0) -> None:
        """Continue from what `state_dict` returned; `decay` is the share of the present average that is kept."""
        assert self.policy.reference is not None
        of_teacher = dict(self.policy.reference.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(state[name].to(average), 1 - decay)
            of_teacher[name].copy_(average)


def is_named(args: KlArguments) -> bool:
    """Return whether the teacher is another model than the policy itself."""
    return args.teacher is not None and args.teacher != OWN


def read_models(args: TrainArguments, task: Any) -> Policy:
    """Return the policy of a run, within the bounds of its teacher, before any weights are loaded."""
    policy = load_base(args, task, weights=False)
    return with_teacher(policy, _named(args, args, weights=False)) if is_named(args) else policy


def teacher_of(
    args: KlArguments, loading: LoadingArguments, policy: Policy, prompts: TeacherPrompts | None
) -> tuple[Policy, Teacher | None]:
    """Return a policy that has another model as its reference if that is its teacher, and the teacher, if any.

    Args:
        args: which model is the teacher.
        loading: how it is loaded.
        policy: the policy, before it has an adapter.
        prompts: how the teacher's prompts are made; None if it reads those of the policy.
    """
    if args.teacher is None:
        return policy, None
    which = "its weights before training"
    if args.teacher_decay is not None:
        which = f"an average of its weights (decay {args.teacher_decay:g})"
    teacher = Teacher(OWN, None, f"the policy itself, with {which}")
    if is_named(args):
        teacher = load_teacher(args, loading, policy)
    if prompts is not None:
        line = f"{teacher.line}; it reads {prompts.name} in place of the prompt"
        teacher = teacher._replace(prompts=prompts, line=line)
    if teacher.policy is not None:
        return with_teacher(policy, teacher.policy), teacher
    # The run gives its own policy a reference, so that one from Python stays as it is.
    return replace(policy, reference=None), teacher


def _named(args: KlArguments, loading: LoadingArguments, *, weights: bool = True) -> Policy:
    """Return the teacher that the arguments name."""
    try:
        return policy_of(args.teacher, loading, weights=weights)
    except Refused as error:
        raise Refused(f"The teacher cannot be used. {error}") from error


def load_teacher(args: KlArguments, loading: LoadingArguments, policy: Policy) -> Teacher:
    """Load the teacher that the arguments name, and compare it with the policy.

    A model from Python is copied, because the run moves and rounds the teacher's weights.

    Args:
        args: which model is the teacher.
        loading: how it is loaded.
        policy: the policy, before it has an adapter.

    Raises:
        Refused: the teacher cannot be loaded, is the model that is trained, or has another vocabulary.
    """
    teacher = _named(args, loading)
    name = teacher.source
    if teacher.model is policy.model:
        raise Refused(
            "The teacher is the very model that is trained. Leave teacher out for a KL to the policy before "
            "training, or give a copy of the model (copy.deepcopy)."
        )
    check_tokens(policy, teacher)
    model = with_own_weights(teacher, args.teacher).model.requires_grad_(False).eval()
    digest = fingerprint(model)
    line = f"{name} ({teacher.size:,} parameters)"
    rows = rows_of(policy.model)
    if (size := rows_of(model)) != rows:
        fit_rows(model, rows, name)
        line += f"; its head has {size:,} rows, and the policy's {rows:,}"
    if 0 < (teacher.context or 0) < (policy.context or 0):
        line += f"; its context of {teacher.context:,} tokens bounds prompts with their completions"
    if ends := sorted({*teacher.ends} - {*policy.ends}):
        names = teacher.tokenizer.convert_ids_to_tokens(ends)
        line += f"; completions end where it ends too, at {', '.join(names)}"
    if teacher.stops and policy.form.stop is None:
        raise Refused(
            f"The teacher {name!r} ends its completions at {teacher.form.stop}, and the policy does not: give "
            "--stop with the same strings, or alone for none."
        )
    return Teacher(name, replace(teacher, model=model), line, digest)


def with_teacher(policy: Policy, teacher: Policy) -> Policy:
    """Return the policy with the teacher as its reference, and room for texts that both models can take.

    Completions end at the ends of both. The teacher has learnt nothing of what would follow its own, and the
    policy learns to end as the teacher does.
    """
    least = min(filter(None, (policy.context, teacher.context)), default=None)
    ends = tuple(sorted({*policy.eos_ids, *teacher.ends}))
    return replace(policy, reference=teacher.model, context=least, eos_ids=ends)


def without_teacher(policy: Policy) -> Policy:
    """Return the policy of a run, after it, without the reference and the bound that a teacher gave it.

    It still ends where the teacher does, as it has learnt to.
    """
    return replace(policy, reference=None, context=context_of(shape_of(policy)))


def check_tokens(policy: Policy, teacher: Policy) -> None:
    """Refuse a teacher whose tokenizer has another token under any id, or other ids."""
    ours = policy.tokenizer.get_vocab()
    theirs = teacher.tokenizer.get_vocab()
    differing = sorted(ours.items() ^ theirs.items(), key=itemgetter(1))
    if differing:
        token, first = differing[0]
        count = len({number for _, number in differing})
        raise Refused(
            f"The teacher {teacher.source!r} has another vocabulary than the policy {policy.source!r}: {count:,} ids "
            f"differ, first {first}, which is {token!r} for one of them only. A KL compares the same tokens: give a "
            "teacher with the policy's tokenizer. If the ids do mean the same, give from Python teacher=(model, "
            "tokenizer) with the tokenizer of the policy."
        )


def rows_of(model: Any) -> int:
    """Return the number of ids to which a model gives a logit."""
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None) or model.config.get_text_config().vocab_size


@torch.no_grad()
def fit_rows(model: Any, rows: int, name: str) -> None:
    """Give the embedding and the head of a frozen model another number of rows, in place.

    Ids beyond the tokenizer's are padding, and no text has them. Of a larger head the first rows are kept,
    and the model's distribution is renormalised over them. Of a smaller one the rows that it lacks are the
    mean of its rows: their logit is the mean of all logits, so each of them has at most the probability of a
    token on average, and the log-probability of a padding id that the policy samples is finite.

    Args:
        model: the model; its weights are replaced, not changed.
        rows: the number of rows afterwards.
        name: what the message calls the model.

    Raises:
        Refused: the embedding or the head is of a kind that has no such rows.
    """
    embedding = model.get_input_embeddings()
    head = head_of(model)
    if head is None or type(embedding) is not nn.Embedding:
        raise Refused(
            f"The head of the teacher {name!r} has {rows_of(model):,} rows and that of the policy {rows:,}, and "
            f"its layers are of another kind than nn.Embedding and nn.Linear: give a teacher of {rows:,} rows."
        )
    fitted: dict[nn.Parameter, nn.Parameter] = {}
    for layer in (embedding, head):
        for part, old in list(layer.named_parameters()):
            if old not in fitted:  # a head may share the weights of the embedding
                wide = torch.promote_types(old.dtype, torch.float32)
                mean = old.mean(dim=0, keepdim=True, dtype=wide).to(old.dtype)
                missing = mean.expand(max(0, rows - len(old)), *old.shape[1:])
                fitted[old] = nn.Parameter(torch.cat([old[:rows], missing]), requires_grad=False)
            setattr(layer, part, fitted[old])
    embedding.num_embeddings = rows
    head.out_features = rows
    model.config.get_text_config().vocab_size = rows


def teacher_regime(teacher: Policy, model: Any, accelerator: Any) -> Regime:
    """Return how completions are scored under a teacher, which may be of another architecture than the policy.

    Args:
        teacher: the teacher.
        model: its model as the run computes it, on its device and in its precision.
        accelerator: accelerate's handle of the processes.

    Raises:
        Refused: a weight or a log-probability of the teacher is not finite, or it cannot be scored in batches.
    """
    ids = torch.arange(1, 9, device=accelerator.device)[None] * rows_of(model) // 9
    with torch.no_grad():
        logp = model(ids, use_cache=False).logits.float().log_softmax(-1)
        tensors = [*model.parameters(), logp]
        is_finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    if not is_finite:
        raise Refused(
            f"The teacher {teacher.source!r} has weights or log-probabilities that are not finite, so no KL to it "
            "exists: give another teacher, or one that is held in another dtype."
        )
    return check_model(replace(teacher, model=model), gradient=False, accelerator=accelerator)
