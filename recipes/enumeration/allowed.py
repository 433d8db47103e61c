"""What happens to the gradient if completions are sampled under a mask and scored without it? By enumeration.

    python recipes/enumeration/allowed.py

A mask leaves the tokens with which some text of a language goes on. Texts are drawn from the masked policy, and their
tokens are scored as they were sampled, or without the mask, perhaps with a weight. All texts are listed: half of those
of a random problem of the lab, or all that a JSON schema allows a tiny model, after some steps of ascent on their
likelihood. The baseline is 0 (`none`), or as in RLOO the mean reward. Look at `off`, the distance of the expected
gradient to that of the policy that sampled, relative to its length. `language` is the distance to the gradient of the
unmasked policy's mean reward where other texts count 0. Then the steps of ascent along each expected gradient:
`after` is the mean reward of the masked policy, and `inside` the unmasked policy's probability of the language.
`recipes/pages/explain/allowed.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import torch
import tyro
from figures import show
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from tokenrl.lab import all_completions, tabular_problem
from toy_tasks.models import EOS, character_tokenizer

SCORED = product(("unmasked", "token", "sequence"), ("none", "mean"))
RULES = ["as sampled", *map(", ".join, SCORED)]
"""How tokens are scored, and the baseline; the first has none."""
SCHEMA = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 2}
"""Lists of numbers, with or without a space before each of them and at the end."""
ITEMS = [space + number for space in ("", " ") for number in "123"]
TEXTS = [
    f"[{first}{second}{end}]"
    for first in ITEMS
    for second in ("", *("," + item for item in ITEMS))
    for end in ("", " ")
]
"""All texts that the schema allows."""
PROMPT, TARGET = "4=", 4
TOKENIZER = character_tokenizer("0123456789[], =+-")
LENGTH, STEPS = 0.1, 40


class Case(NamedTuple):
    """A policy, and the M texts of at most T of V tokens that its mask allows."""

    parameters: list[Tensor]
    logits: Callable[[], Tensor]
    """Returns the logits of each token of the texts [M, T, V]."""
    ids: Tensor  # [M, T]
    mask: Tensor  # [M, T]
    removed: Tensor  # [M, T, V]
    rewards: Tensor  # [M]

    def scores(self) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each token under the masked and the unmasked policy, both [M, T]."""
        logits = self.logits()
        kept = logits.masked_fill(self.removed, -torch.inf)
        chosen = (x.log_softmax(-1).gather(-1, self.ids[..., None]) for x in (kept, logits))
        masked, unmasked = (torch.where(self.mask, x[..., 0], 0.0) for x in chosen)
        return masked, unmasked

    def gradient(self, gain: Tensor) -> Tensor:
        """Return the gradient of a number in the parameters [D]."""
        return parameters_to_vector(torch.autograd.grad(gain, self.parameters, retain_graph=True))

    def ascend(self, gradient: Tensor) -> None:
        """Move the parameters by `LENGTH` along a gradient [D]."""
        step = gradient * LENGTH / gradient.norm()
        vector_to_parameters(parameters_to_vector(self.parameters) + step, self.parameters)


def removed_by(ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """Return which tokens none of some texts goes on with, at each token of theirs [M, T, V]; none off the mask."""
    equal = (ids[:, None] == ids).long().cumprod(-1)  # [M, M, T]
    before = torch.cat([torch.ones_like(equal[..., :1]), equal[..., :-1]], -1)
    tokens = one_hot(ids, vocabulary) * mask[..., None]
    allowed = torch.einsum("mnt,ntv->mtv", before.double(), tokens.double()) > 0
    return ~allowed & mask[..., None]


@cache
def problem_case(seed: int, table: str = "logprobs") -> Case:
    """Return the policy of a random problem of the lab, or its reference, and half of the texts that end."""
    problem = tabular_problem(seed, vocabulary=4, length=3)
    rows = all_completions(4, 3)
    mask = rows.mask.bool()
    logits = torch.zeros(len(rows.prefixes), 4, dtype=torch.double)
    logits[rows.prefix[mask], rows.ids[mask]] = getattr(problem, table)[0][mask]
    logits.requires_grad_()
    ends = (~problem.truncated).nonzero()[:, 0]
    order = torch.randperm(len(ends), generator=torch.Generator().manual_seed(seed))
    kept = ends[order[: len(ends) // 2]]
    ids, mask = rows.ids[kept], mask[kept]
    return Case(
        [logits],
        lambda: logits[rows.prefix[kept]],
        ids,
        mask,
        removed_by(ids, mask, 4),
        problem.totals[0, kept],
    )


def tiny_model(seed: int) -> GPT2LMHeadModel:
    """Return a new model, which computes in float64 throughout; Llama's norms would not."""
    torch.manual_seed(seed)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    shape |= {"vocab_size": len(TOKENIZER), "eos_token_id": TOKENIZER.eos_token_id}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=None, **shape)).double().eval()


@cache
def schema_case(seed: int, warm: int) -> Case:
    """Return a tiny model after some steps of ascent on the likelihood of all texts of the schema."""
    model = tiny_model(seed)
    rows = [torch.tensor(TOKENIZER(text + EOS).input_ids) for text in TEXTS]
    ids = pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    prompt = torch.tensor(TOKENIZER(PROMPT).input_ids).expand(len(ids), -1)
    whole = torch.cat([prompt, ids], 1)
    rewards = torch.tensor([float(sum(json.loads(text)) == TARGET) for text in TEXTS]).double()

    def logits() -> Tensor:
        return model(whole).logits[:, prompt.shape[1] - 1 : -1]

    removed = removed_by(ids, mask, len(TOKENIZER))
    case = Case([*model.parameters()], logits, ids, mask, removed, rewards)
    for _ in range(warm):
        case.ascend(case.gradient(case.scores()[1].sum()))
    return case


def gain_of(name: str, case: Case) -> Tensor:
    """Return a number whose gradient is the expected gradient of a rule."""
    rule, _, baseline = name.partition(", ")
    masked, unmasked = case.scores()
    chances, weights = masked.detach().sum(-1).exp(), torch.ones(1)
    rewards = case.rewards - (chances @ case.rewards if baseline == "mean" else 0)
    log_ratio = (unmasked - masked).detach()
    if rule == "token":
        weights = log_ratio.exp()
    if rule == "sequence":
        weights = log_ratio.sum(-1, keepdim=True).exp()
    scored = masked if rule == "as sampled" else unmasked
    return chances * rewards @ (weights * scored).sum(-1)


def measured(case_of: Callable[[int], Case], rule: str, seed: int) -> dict[str, float]:
    """Return the numbers of a rule, by the names of columns."""
    case = case_of(seed)
    masked, unmasked = (x.sum(-1).exp() for x in case.scores())
    true, of_language = (case.gradient(chances @ case.rewards) for chances in (masked, unmasked))
    gradient = case.gradient(gain_of(rule, case))
    off = (gradient - true).norm() / true.norm()
    cosine, of_language = (torch.cosine_similarity(gradient, x, 0) for x in (true, of_language))
    start = parameters_to_vector(case.parameters)
    for _ in range(STEPS):
        case.ascend(case.gradient(gain_of(rule, case)))
    after, inside = (x.detach().sum(-1).exp() for x in case.scores())
    vector_to_parameters(start, case.parameters)
    numbers = {
        "off": off, "least off": off, "worst off": off,
        "cosine": cosine, "least cosine": cosine, "language": of_language,
        "after": after @ case.rewards, "inside": inside.sum(),
    }  # fmt: skip
    return {name: float(number) for name, number in numbers.items()}


def start(case_of: Callable[[int], Case], seed: int) -> dict[str, float]:
    """Return the share of the tokens' probability that the mask takes, and what the ascent starts from."""
    case = case_of(seed)
    masked, unmasked = (x.detach() for x in case.scores())
    chances = masked.sum(-1).exp()
    taken = (1 - (unmasked - masked).exp()).sum(-1)
    numbers = {
        "taken": chances @ taken / (chances @ case.mask.double().sum(-1)),
        "before": chances @ case.rewards, "inside": unmasked.sum(-1).exp().sum(),
    }  # fmt: skip
    return {name: float(number) for name, number in numbers.items()}


def divergences(table: str, seed: int) -> dict[str, float]:
    """Return the KL of the masked policy of a problem to a reference with and without the mask, and their gradients."""
    case, numbers = problem_case(seed), {}
    log_pi = case.scores()[0].sum(-1)
    for name, scores in zip(("alike", "as it is"), problem_case(seed, table).scores(), strict=True):
        kl = log_pi.exp() @ (log_pi - scores.detach().sum(-1))
        numbers[name] = float(kl.detach())
        numbers[f"gradient {name}"] = float(case.gradient(kl).norm())
    return numbers


def main(problems: int = 100, models: int = 3, warm: tuple[int, ...] = (0, 50, 200)) -> None:
    """Print the tables, which have medians.

    Args:
        problems: number of random problems.
        models: number of seeds of the tiny model.
        warm: steps of ascent on the likelihood of the schema's texts before; a table for each.
    """
    cases = [("Random problems", problem_case, problems)]
    cases += [(f"A schema, {n} steps before", partial(schema_case, warm=n), models) for n in warm]
    for name, case_of, count in cases:
        show(name, {"start": partial(start, case_of)}, count)
        show("By rule and baseline", {r: partial(measured, case_of, r) for r in RULES}, count)
    references = {"another policy": "ref_logprobs", "the policy": "logprobs"}
    show("KL to", {name: partial(divergences, x) for name, x in references.items()}, problems)


if __name__ == "__main__":
    tyro.cli(main)
