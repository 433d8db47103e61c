"""Says what memory and time a measurement will take, so that it is refused and does not die half-way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from tokenrl.errors import Refused
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.lab.measure.projections import AT_ONCE
from tokenrl.language.policy.model import Policy
from tokenrl.runs.console import Console
from tokenrl.runs.space import in_words
from tokenrl.runs.timings import free_memory

MOST_ROWS = 1024
"""Completions per forward pass if memory allows more."""
FREE = 0.7
"""The share of the free memory that is planned with; the rest is for what the plan does not see."""
SLOW = 10.0
"""Seconds from which on a stage is long enough to show its progress in a log."""
CHEAPER = (
    "Fewer --num-prompts, --probes or --max-completion-length make it cheaper in proportion; so may --layers "
    "last and, for large models, --lora-r 8, which measure the gradient in fewer parameters."
)


def rows_at_once(
    policy: Policy,
    parameters: Mapping[str, Tensor],
    prompts: Sequence[int],
    length: int,
    args: MeasureArguments,
    *,
    entropy: bool,
) -> int:
    """Return how many completions to differentiate at once: as asked, or as many as fit into memory.

    Args:
        policy: the policy that is differentiated.
        parameters: the parameters in which it is.
        prompts: the number of tokens of each prompt.
        length: the most tokens of a completion, T.
        args: the settings.
        entropy: whether the entropies are differentiated too.

    Raises:
        Refused: not even the completions of one prompt fit; the message says what they need.
    """
    g, free = args.num_generations, FREE * free_memory(policy.device)
    probes = AT_ONCE * sum(p.numel() * p.element_size() for p in parameters.values())
    kept = 24 * len(prompts) * g * length * args.probes  # projections in float32, and copies in float64
    group = bytes_of_group(policy, parameters, max(prompts), length, g, entropy=entropy)
    fit = int((free - probes - kept) // group)
    wanted = min(max(1, (args.rows_at_once or MOST_ROWS) // g), len(prompts))
    if fit < 1 or (args.rows_at_once is not None and fit < wanted):
        count = max(1, wanted if args.rows_at_once is not None else 1)
        raise Refused(
            f"The measurement would need about {in_words(probes + kept + count * group)} of memory, and "
            f"{in_words(free)} can be used: {in_words(probes)} for {AT_ONCE} random directions at once, "
            f"{in_words(kept)} for all projections, {in_words(count * group)} for {count * g} completions "
            "at once. " + (f"Give rows_at_once={fit * g}, or leave it out." if fit >= 1 else CHEAPER)
        )
    return args.rows_at_once or min(fit * g, MOST_ROWS)


def bytes_of_group(
    policy: Policy, parameters: Mapping[str, Tensor], prompt: int, length: int, g: int, *, entropy: bool
) -> int:
    """Return how many bytes the g completions of a prompt take, differentiated along `AT_ONCE` directions.

    Counted are logits (of which, by trying, about three arrays are alive at once, with entropies seven), the
    key/value cache, one layer's attention and its hidden states, each with its derivatives; and, where it is
    differentiated, the head, whose directions PyTorch copies for each row of the pass over the prompts.
    """
    config = policy.model.config.get_text_config()  # type: ignore[union-attr, operator]
    hidden, tokens = config.hidden_size, prompt + length
    heads = getattr(config, "num_attention_heads", None) or 1
    keys = hidden * (getattr(config, "num_key_value_heads", None) or heads) // heads
    numbers = (7 if entropy else 3) * length * config.vocab_size
    numbers += tokens * (2 * keys * config.num_hidden_layers + 12 * hidden + 3 * heads * tokens)
    size = max(4, next(policy.model.parameters()).element_size())
    head = policy.model.get_output_embeddings().weight  # type: ignore[operator]
    copied = any(p.data_ptr() == head.data_ptr() for p in parameters.values())
    copies = AT_ONCE * head.numel() * size * (1 if policy.share_prompt else g) if copied else 0
    return int(g * numbers * size * (1 + AT_ONCE) + copies)


class Budget:
    """Shows how far each stage of a measurement is, and ends one that would take too long.

    A stage consists of equal parts, so the first one says how long all of them take.

    Attributes:
        console: prints for people.
    """

    def __init__(self, console: Console, max_minutes: float | None) -> None:
        """Start the clock; `max_minutes` is the most that the whole measurement may take, None any time."""
        self.console, self._limit, self._began = console, max_minutes, time.monotonic()

    @contextmanager
    def stage(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Yield a function to call after each of the `total` parts of a stage.

        Raises:
            Refused: from that function, after the first part: the measurement would exceed its time.
        """
        began, done, slow = time.monotonic(), 0, False

        def part() -> None:
            nonlocal done, slow
            done += 1
            if done == 1:
                each = time.monotonic() - began
                slow = each * (total - 1) > SLOW
                self._check(what, each, total)
            if slow or self.console.rich.is_terminal:
                progress.update(done, {})

        with self.console.progress(total) as progress:
            yield part

    def _check(self, what: str, each: float, total: int) -> None:
        minutes = (time.monotonic() - self._began + each * (total - 1)) / 60
        if self._limit is not None and minutes > self._limit:
            raise Refused(
                f"The measurement would take at least {minutes:,.{0 if minutes > 10 else 1}f} minutes, and "
                f"max_minutes is {self._limit:g}: {what} took {each:.3g} seconds for the first of {total} "
                f"parts. {CHEAPER}"
            )
