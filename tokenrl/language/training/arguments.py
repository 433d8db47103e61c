"""Defines the arguments of `tokenrl train` and `tokenrl sft`, which are also the keywords of the functions.

`None` stands for what the task recommends for its own model, or else for the default in the field's text. A task
without a model of its own recommends other settings too, which hold unless they were given. The settings of a
run are an object of the same class in which no field is open any more. The module imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, nearest
from tokenrl.language.policy.arguments import LoraArguments, ModelArguments, check_model
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.supervised.arguments import RECOMMENDED, PassArguments
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.training.bias import bias_of_run
from tokenrl.runs.checkpoint import SavingArguments
from tokenrl.runs.metrics import TrackerArguments
from tokenrl.runs.threads import ThreadArguments
from tokenrl.settings import (
    MEASURED,
    OPEN,
    OR_FUNCTION,
    OR_OBJECT,
    Bounds,
    Count,
    Natural,
    NonNegative,
    Number,
    Positive,
    Seed,
    Settings,
    field_types,
    lay,
)

if TYPE_CHECKING:
    from tokenrl.language.tasks.task import PromptTask

OWN = "self"  # the name of the teacher that is the policy itself


@dataclass(frozen=True)
class SamplingArguments(Distribution, group="sampling"):
    """How completions are sampled in training, and from which prompts."""

    generator: Annotated[Literal["transformers", "vllm"], OR_FUNCTION] = "transformers"
    """What samples in training and in its evaluations. vllm: an engine in the same process, made for large
    models on a GPU; small ones on a CPU are slower with it. It holds a second copy of the weights, and draws
    random numbers of its own, so that a run is not bit-exact. Needs the extra vllm. A function of the policy
    and of sampling_batch_size makes an engine of your own (Generator of tokenrl.language), whose rollouts are
    checked."""
    generator_cache: Positive = 2.0
    """GiB for keys and values. With transformers: what rows of episodes keep of earlier turns; what does not
    fit is read again in each turn. With vllm: all; rows that do not fit wait, and it bounds the length of
    prompt and completion together."""
    sync_every: Count = 1
    """Sample k steps from the same copy of the weights, so up to k - 1 steps old, as where sampling and training
    overlap. The copy needs transformers as generator. A generator of your own that has `announce` samples each
    step during the update of the step before, so give it 2; it is not told what follows in episodes or with
    zero_spread refill. An importance of the estimator corrects for old weights. Evaluations sample from the
    present ones."""
    sampling_batch_size: Count | None = None
    """Completions that one process samples at once, of whole groups; changes memory only. Default: all."""
    truncate_prompts: bool = False
    """Cut prompts that are too long for the context on the left, instead of refusing them. What a teacher reads in
    place of a prompt is never cut."""
    replay: Natural = 0
    """Completions of earlier steps that join the new ones of each prompt in a step, with the rewards and the
    log-probabilities that they had. They are drawn from the best distinct texts of this prompt so far, each with
    its largest reward, and count where rewards are compared and in the loss, but in no other metric and no memory
    of rewards. The importance of the estimator (none, token, sequence) weights them; rewards choose them, and equal
    texts count once, so the gradient is biased with each. For tasks of one or few prompts."""
    replay_memory: Count = 100
    """With replay: the texts that are kept of each prompt. A text keeps the largest of its rewards, with the
    log-probabilities of that sample; of a reward that draws random numbers this is above the mean."""
    prompt_weights: Annotated[str, OR_FUNCTION] = "uniform"
    """How often each training prompt is drawn. uniform: equally often. variance: in proportion to the variance of its
    rewards in this run, for rewards of 0 and 1 p (1 - p). A column of the data: in proportion to its numbers. Or
    `module:function` or `file.py:function`, of the completions so far, their mean reward and its variance, arrays of
    a number for each training row. Rewards change the chances when a new pass over the training rows begins.
    By default each prompt's gradient is divided by its chance, so that the objective stays the mean over all prompts;
    estimator.prompts weighted leaves it."""
    prompt_floor: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.5
    """With prompt_weights, the share of all chances that is divided equally among the prompts."""
    max_refills: Natural = 4
    """Rounds in which groups of equal rewards may be replaced by new prompts, with zero_spread refill
    (dapo)."""


@dataclass(frozen=True)
class LoggedArguments(Settings, group="logged rows"):
    """Completions that somebody else sampled, of which a run learns."""

    rows: Annotated[str, OR_OBJECT] | None = None
    """Rows that somebody else sampled: a file, a folder or a hub name, or data from Python, as the task may be; also
    the folder completions of another run. A row has a prompt, and a completion or its ids in completion_ids, EOS
    included. It may have a reward, in place of the reward functions (none: the row is left out of the comparison); the
    log-probabilities of whoever sampled it in logprobs, one for each token and for EOS; and truncated, for a completion
    without an end. Rows that are marked replayed or logged are left out. Rows of one prompt are cut into groups of
    num_generations, in random order; smaller rests are left out. Evaluations sample, from the held-out prompts of the
    task, and rows of these are left out."""
    rows_share: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """The share of the prompts of a step whose completions are of the rows, to the nearest whole number of at least
    one. The policy samples those of the others from prompts of the task."""


@dataclass(frozen=True)
class OptimiserArguments(PassArguments, group="optimiser"):
    """How the weights are updated from a rollout."""

    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw divides each weight's step by the usual size of its gradient, so a factor of the loss changes
    nothing. sgd, without momentum, subtracts learning_rate x gradient, and shows factors if max_grad_norm is 0. muon
    moves all directions of a matrix equally far; embeddings, head and vectors have AdamW at the same rate. It is for
    all weights, not for an adapter. sgd and muon need a learning_rate. A critic always learns with AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = OPEN
    """Schedule of the learning rate after the warm-up; linear and cosine fall to 0. Default: linear."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    weight_decay: NonNegative = 0.0
    """Each update also shrinks the weights by learning_rate x weight_decay of their size, with sgd as with
    adamw (decoupled)."""
    max_grad_norm: NonNegative = 1.0
    """Gradients with a larger norm are scaled down to this norm; 0: never."""
    num_iterations: Count = 1
    """Passes over each rollout."""
    num_minibatches: Count = 1
    """Updates per pass, each on a share of the prompts; their numbers of prompts differ by at most 1."""
    training_attention: Literal["as_loaded", "eager"] = OPEN
    """Attention of updates, and of sampling too in bfloat16 on a CPU: as the model was loaded (mostly sdpa),
    or by its plain formula. Default: eager on a CPU from 10 M parameters on, with completions of at most 128
    tokens; else as loaded."""
    value_learning_rate: Positive = 1e-3
    """Learning rate of the critic, for estimators that have one (a2c, ppo)."""
    value_iterations: Natural = 4
    """Updates of the critic per step."""
    value_warmup: Natural = 0
    """Steps at the beginning in which the critic alone learns, from completions of the policy as it starts. They
    are among max_steps; the learning rate's schedule, kl_gain and patience begin after them."""

    @property
    def updates(self) -> int:
        """The updates from each rollout."""
        return self.num_iterations * self.num_minibatches


@dataclass(frozen=True)
class KlArguments(Settings, group="KL control"):
    """Which model is the reference of the KL, what it reads, and how the KL is held near a target."""

    teacher: Annotated[str, OR_OBJECT] | None = None
    """A frozen model whose log-probabilities stand in the KL in place of those of the policy before training
    (distillation on samples of the student): a directory, a hub name, or the directory of a run; from Python
    also a pair (model, tokenizer), which is copied. It must have the policy's vocabulary, and is loaded with
    dtype. It needs an --estimator.beta above 0. With --reward none it is all that there is to learn from.
    Completions end where either of the two models ends. self: the policy itself, with its weights before
    training (./self for a directory of that name); it is worth a teacher if it reads another prompt, from
    teacher_template, teacher_context or a column teacher_prompt of the data, which is text or chat messages."""
    teacher_decay: Annotated[float, Bounds(at_least=0, below=1)] | None = None
    """With teacher self: the teacher's weights are an average of the policy's, updated after each step to
    teacher_decay x teacher + (1 - teacher_decay) x policy; 0: the policy's present weights. Default: its
    weights before training stay."""
    teacher_template: str | None = None
    """Template of the text that the teacher reads in place of the prompt, or in chat messages in place of the
    last one of the user: '{prompt} The answer is {answer}.' It may name columns of the data, and prompt, the
    text that it replaces; of an episode this has the first observation."""
    teacher_context: Annotated[str, OR_FUNCTION] | None = None
    """`module:function` or `file.py:function` that returns what the teacher reads in place of the prompt of a
    row, as text or chat messages. It is called for each row of a step, after the rewards, with those it takes
    of prompt, row (the data's), and completions and rewards, lists of the other rows of the prompt. Evaluations
    have no such teacher, so no KL to it is evaluated."""
    allow_own_feedback: bool = False
    """Allow a teacher_context that also takes completion and reward of the row itself. Then the KL is none
    between two policies, and the gradient is biased."""
    target_kl: Positive | None = None
    """Target of the KL to the reference, in nats per completion. The weight starts at --estimator.beta and is
    then adapted to reach the target (Ziegler et al. 2019). Default: the weight stays constant."""
    kl_gain: Annotated[float, Bounds(above=0, below=5)] = 0.1
    """How fast that weight adapts: one step changes it by at most the fraction kl_gain / 5."""

    def __post_init__(self) -> None:
        """Check the values, and refuse objects that are no model with its tokenizer."""
        super().__post_init__()
        check_model("teacher", self.teacher)


@dataclass(frozen=True)
class EvaluationArguments(Settings, group="evaluation", measured=True):
    """What is measured during training."""

    eval_every: Natural = OPEN
    """Steps between evaluations on held-out prompts; 0: only before and after training. Default: a tenth of
    the run; with a model of your own so many that evaluations take at most a tenth of the time, or so."""
    eval_generations: Natural = 4
    """Sampled completions per held-out prompt, besides the greedy one."""


@dataclass(frozen=True)
class LogArguments(Settings, group="logs"):
    """What a run prints, and what it records of its completions."""

    logging_steps: Count = 1
    """Steps between printed lines (1: every tenth step), and between records to trackers."""
    log_completions: Natural = OPEN
    """Steps between tables of sampled completions, printed and saved in completions/. Default: with each
    evaluation."""


@dataclass(frozen=True)
class SafetyArguments(Settings, group="safety stops"):
    """When a run is refused or stopped."""

    stop_after_zero_spread: Natural = 50
    """Stop after this many consecutive steps in which all groups have equal rewards, and save a checkpoint;
    0: never. Such a step changes no weight, unless the loss has a KL or entropy term."""
    stop_after_nonfinite: Count = 5
    """Stop after this many consecutive updates with a gradient that is not finite."""
    allow_no_baseline: bool = False
    """Allow training without a baseline when completions may be longer than 500 tokens."""


@dataclass(frozen=True)
class WarmStartArguments(Settings, group="warm start"):
    """A supervised stage before the first step, for models that never write anything like an answer."""

    warm_start: bool | Literal["auto"] = False
    """First train all weights on the task's demonstrations, as tokenrl sft does with 16 of them an update and
    a learning rate that is constant after 10 updates of warm-up. An adapter is added afterwards.
    Demonstrations are those of the task, or else training rows with a completion. The stage is a run in
    warm_start of the output_dir; one that has ended there is taken as it is. For many trainings from one
    start, run tokenrl sft once and give its directory to --model. auto: samples 32 training prompts, and skips
    the stage if at least half of the groups have unequal rewards and at least half of the completions end.
    Graded rewards are often unequal for a model that knows nothing. Default: no such stage."""
    warm_start_steps: Count = 240
    """Updates of this stage."""


@dataclass(frozen=True)
class TrainArguments(
    SamplingArguments,
    LoggedArguments,
    OptimiserArguments,
    KlArguments,
    ModelArguments,
    TaskArguments,
    LoraArguments,
    WarmStartArguments,
    EvaluationArguments,
    SavingArguments,
    LogArguments,
    TrackerArguments,
    SafetyArguments,
    ThreadArguments,
):
    """Train a language model by policy gradients."""

    estimator: Estimator = field(default_factory=Estimator)
    """A preset, also with changes (--estimator "grpo,scale=none"); each of its axes can also be changed by a
    flag of its own (--estimator.scale group_std)."""
    output_dir: str | None = None
    """Directory of the run, for its config, metrics, completions, checkpoints, model and report. Default: a
    new one, runs/train-1, runs/train-2 and so on; with resume the newest of these."""
    max_steps: Annotated[Count, MEASURED] = OPEN
    """Training steps; each samples one rollout. Default: 200. A toy task with another model than its own:
    60."""
    prompts_per_step: Count = OPEN
    """Prompts per step, over all processes. Default: 16. A toy task with another model than its own: 8."""
    num_generations: Count = OPEN
    """Completions per prompt (the group size G). Default: 8."""
    max_completion_length: Count = OPEN
    """Maximum number of tokens in a completion, EOS included. Default: the task's limit, which a toy task has
    for its own model; else a quarter more than the longest demonstration has; without demonstrations 256. The
    default is at most what the longest prompt leaves of the model's context."""
    learning_rate: Positive = OPEN
    """Peak learning rate. Default: by the model's size, such as 2e-4 for 1 M random parameters (at most 1e-4
    for weights that have learnt before), 1e-5 for 135 M, and 1e-6 from 1 B on; ten times that with LoRA, at
    most 1e-3. None with --optimizer sgd or muon."""
    seed: Seed = 0
    """Seed of the order of prompts, of sampling and of new adapters."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    stop_at_reward: Annotated[Number | None, MEASURED] = None
    """End the run, with the exit reason solved, after the step in which a new completion has at least this total
    reward. summary.json says how many completions were sampled until then. For a search, in which the best
    completion counts. Default: no reward ends a run."""
    control_arm: Literal["none", "random", "best_of_n"] = "none"
    """Make a run for comparison with others. random: in each step the rewards of its completions change places at
    random, so that spread and scale stay and say nothing; a completion keeps its own once in a step on average, and a
    missing reward stays missing. Evaluations and tables of completions have the true ones. best_of_n: nothing is
    learnt. Steps sample held-out prompts instead, and the held-out reward is the mean over prompts of the best that
    steps have found for each so far, which before its first sample is the mean of the policy. So after as many
    completions as another run has sampled it says what a search by the reward finds; it reads the reward of held-out
    prompts, without which a trained policy answers."""
    check: bool = False
    """Make the first step on a copy of the model, and stop: print a prompt as the model reads it, completions
    with rewards, the problems of settings, data and this step with their remedies, its memory, and the time
    of the run at its pace. Exit code 0: passed (there may be remarks); 2: there is a problem."""
    cpu: bool | None = None
    """Use the CPU even if there is a GPU. Default: the GPU if there is one; but on a Mac the CPU for models
    below 10 M parameters, which its GPU does not make faster (--no-cpu: its GPU for those too)."""
    quiet: bool = False
    """Print nothing but errors."""

    def __post_init__(self) -> None:
        """Check the values; weights of prompts are divided out again unless the estimator says otherwise."""
        super().__post_init__()
        if self.stop_at_reward is not None and self.estimator.zero_spread == "refill":
            raise Refused(
                f"stop_at_reward was given as {self.stop_at_reward}, and zero_spread 'refill' replaces groups of equal "
                "rewards, perhaps the first that reached it: take zero_spread 'keep' or 'drop'."
            )
        prompts = self.estimator.prompts
        if self.prompt_weights == "uniform":
            if prompts != "uniform":
                raise Refused(
                    f"prompts={prompts!r} is about unequal chances of prompts: set prompt_weights "
                    "(--prompt-weights), such as variance."
                )
            return
        if prompts == "uniform":
            object.__setattr__(self, "estimator", replace(self.estimator, prompts="inverse"))
        if self.estimator.prompts == "inverse" and not self.prompt_floor:
            raise Refused(
                "prompt_floor 0 leaves prompts out whose weight is 0, and the gradient of each prompt is divided by "
                "its chance: give a floor such as 0.5, or estimator.prompts weighted."
            )
        if self.estimator.zero_spread == "refill":
            raise Refused(
                "zero_spread 'refill' replaces groups of equal rewards, and with prompt_weights they would not be "
                "remembered: take zero_spread 'keep' or 'drop'."
            )

    @property
    def bias_status(self) -> str:
        """The declared bias of the gradient and, where the settings decide it, the reason."""
        return bias_of_run(self)

    @property
    def completions(self) -> int:
        """The completions of a step, greedy ones left out."""
        return self.prompts_per_step * self.num_generations

    @property
    def logged_prompts(self) -> int:
        """The prompts of a step whose completions are logged rows."""
        if self.rows is None:
            return 0
        return max(1, round(self.rows_share * self.prompts_per_step))


EARLY = {*field_types(TaskArguments), *field_types(TrackerArguments), "model", "chat", "cpu"}  # type: ignore[arg-type]
EARLY |= {"output_dir", "resume", "overwrite", "check", "quiet", "logging_steps"}
EARLY |= {"trust_run", "trust_remote_code"}
"""Settings that no task recommends: a run uses them before it has read the task, or they are for users alone."""


def with_advice(
    choices: TrainArguments, task: PromptTask, keywords: Collection[str] = ()
) -> tuple[TrainArguments, dict[str, str]]:
    """Lay what was given over what a task recommends; return the settings and the origins of those recommended.

    What a task recommends for a model that it makes itself holds for that one only, which is known once the model
    is loaded: then `settle` lays it below these settings.

    Args:
        choices: what was given, over the defaults.
        task: the task.
        keywords: the names of settings that were given, perhaps as their defaults; others that differ were, too.

    Raises:
        Refused: the task recommends something that is no setting, or that it cannot recommend, or such a value.
    """
    usual = vars(TrainArguments())
    allowed = [
        name for name, x in usual.items() if name not in EARLY and not (task.base and x is not None)
    ]
    if barred := sorted(task.train.keys() - allowed):
        near = nearest(barred[0], allowed)
        raise Refused(
            f"The task {task.name!r} recommends by `train` what it cannot: {', '.join(barred)}.{near}"
        )
    advice = {} if task.base else dict(task.train)
    if choices.optimizer != "adamw":
        advice.pop("learning_rate", None)  # it is one of AdamW
    given = {
        name: x
        for name, x in vars(choices).items()
        if name in advice and (name in keywords or x != usual[name])
    }
    values, origins = lay((RECOMMENDED, advice), ("given", given))
    return replace(choices, **values), origins
