"""Names points of the space of estimators: for each preset the fields that it sets, and its paper.

What each preset computes, and how other toolkits differ from it, is in `recipes/pages/estimators.md`. Those
that are defaults of other toolkits are rows of toolkits.txt. This module imports no torch.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.errors import Refused

Fields = dict[str, str | float | int | bool | None]

WILLIAMS = "Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement learning"
GREENSMITH = "Greensmith et al. 2004, Variance reduction techniques for gradient estimates in reinforcement learning"
KOOL = "Kool et al. 2019, Buy 4 REINFORCE samples, get a baseline for free"
KOOL_SCALED = f"{KOOL}, for the baseline; the divisor has no paper"
GRPO_PAPER = "Shao et al. 2024, DeepSeekMath, arXiv 2402.03300"
OPO_PAPER = "Hao et al. 2025, On-policy RL with optimal reward baseline, arXiv 2505.23585"
OTB_PAPER = "Optimal token baseline, arXiv 2602.07078"
PKPO_PAPER = "Walder and Karkhanis 2025, Pass@k policy optimization, arXiv 2505.15201"
PP_PAPER = "Hu et al. 2025, REINFORCE++, arXiv 2501.03262"


class Preset(NamedTuple):
    """The fields that a preset sets, all others being those of RLOO, and what it follows.

    Attributes:
        fields: the fields with their values.
        paper: the paper; for the default of another toolkit its name, version and file.
        beyond: what that toolkit does and no axis expresses, with what it changes; empty for a paper.
    """

    fields: Fields
    paper: str
    beyond: str = ""


TO_GO: Fields = {"returns": "reward_to_go"}
OTB: Fields = {**TO_GO, "baseline": "optimal", "optimal_form": "cumulative"}
PKPO: Fields = {"objective": "max_at_k", "objective_order": 4}
CLIP: Fields = {"ratio": "token", "epsilon": 0.2}
"""PPO's clipped ratio."""
GROUP_STD: Fields = {
    "baseline": "group_mean",
    "scale": "group_std",
    "scale_ddof": 1,
    "scale_eps": 1e-4,
}
"""The advantage of GRPO: `(R - mean) / (std + eps)` over the group."""
OF_SEQUENCES: Fields = {**GROUP_STD, "aggregation": "sequence_mean"}
GRPO: Fields = {**OF_SEQUENCES, **CLIP, "kl_estimator": "k3", "kl_placement": "loss"}
WHITENED: Fields = {**CLIP, "scale": "token_whiten", "scale_eps": 1e-8, "aggregation": "token_mean"}
"""The fields that PPO, SPO and the two forms of REINFORCE++ share."""

PRESETS: dict[str, Preset] = {
    # Without an importance ratio: REINFORCE with its baselines and scales.
    "reinforce": Preset({"baseline": "none"}, WILLIAMS),
    "reinforce_running_mean": Preset(
        {"baseline": "running_mean", "running_mean_decay": 0.9}, WILLIAMS
    ),
    "reinforce_baseline": Preset({"baseline": "batch_mean"}, WILLIAMS),
    "reinforce_timestep_mean": Preset(
        {**TO_GO, "baseline": "timestep_mean"},
        f"{GREENSMITH}, for baselines that depend on the step",
    ),
    "rloo": Preset({}, f"{KOOL}; Ahmadian et al. 2024, arXiv 2402.14740"),
    "rloo_token_mean": Preset(
        {"aggregation": "token_mean"}, "Ahmadian et al. 2024, arXiv 2402.14740"
    ),
    "loo_std": Preset({"scale": "loo_std", "scale_eps": 0.1}, KOOL_SCALED),
    "other_groups_std": Preset({"scale": "other_groups_std", "scale_eps": 0.1}, KOOL_SCALED),
    "remax": Preset({"baseline": "remax"}, "Li et al. 2024, ReMax, arXiv 2310.10505"),
    "opo": Preset({"baseline": "opo", "leave_one_out": False}, OPO_PAPER),
    "opo_loo": Preset({"baseline": "opo"}, f"{OPO_PAPER}, without the row itself"),
    "optimal": Preset({"baseline": "optimal"}, f"{GREENSMITH}; Weaver & Tao 2001"),
    "optimal_per_timestep": Preset(
        {**TO_GO, "baseline": "optimal", "optimal_form": "per_timestep"}, GREENSMITH
    ),
    "otb": Preset({**OTB, "leave_one_out": False}, OTB_PAPER),
    "otb_loo": Preset(OTB, f"{OTB_PAPER}, without the row itself"),
    "shrinkage": Preset(
        {"baseline": "shrinkage"},
        "arXiv 2511.03710, James-Stein shrinkage of prompt means, with two leave-one-out levels",
    ),
    "a2c": Preset(
        {**TO_GO, "baseline": "value"},
        "Mnih et al. 2016, Asynchronous methods for deep reinforcement learning, arXiv 1602.01783",
    ),
    # With another objective than the mean reward.
    "max_at_k": Preset(PKPO, f"{PKPO_PAPER}, minus the mean of the best of k others"),
    "pkpo": Preset({**PKPO, "objective_form": "sloo_minus_one"}, PKPO_PAPER),
    "maxrl": Preset(
        {"objective": "log_success"}, "Maximum likelihood reinforcement learning, arXiv 2602.02710"
    ),
    # With an importance ratio: PPO, and the forms that trainers of language models use.
    "grpo": Preset(GRPO, GRPO_PAPER),
    "dr_grpo": Preset(
        {**CLIP, "baseline": "group_mean", "aggregation": "fixed_length"},
        "Liu et al. 2025, Understanding R1-Zero-like training: a critical perspective, arXiv 2503.20783",
    ),
    "ppo_clip": Preset(
        {**CLIP, "baseline": "batch_mean"},
        "Schulman et al. 2017, Proximal policy optimization algorithms, arXiv 1707.06347",
    ),
    "ppo": Preset(
        {**WHITENED, "baseline": "value", "returns": "gae", "lam": 0.95, "value_clip": 0.2},
        "Schulman et al. 2017, arXiv 1707.06347, with GAE, Schulman et al. 2016, arXiv 1506.02438",
    ),
    "grpo_no_std": Preset(
        {**GRPO, "scale": "none"},
        f"{GRPO_PAPER}, without its std, as Liu et al. 2025, arXiv 2503.20783 advise",
    ),
    "gdpo": Preset(
        {**GRPO, "components": "separate"},
        "Liu et al. 2026, GDPO, arXiv 2601.05242, without the whitening over the step",
    ),
    "grpo_batch_std": Preset(
        {**GRPO, "scale": "batch_std"}, f"{GRPO_PAPER}, with the std of the step"
    ),
    "dapo": Preset(
        {
            **GROUP_STD,
            **CLIP,
            "aggregation": "token_mean",
            "epsilon_high": 0.28,
            "zero_spread": "refill",
        },
        "Yu et al. 2025, DAPO, arXiv 2503.14476",
    ),
    "gspo": Preset(
        {**OF_SEQUENCES, "ratio": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4},
        "Zheng et al. 2025, Group sequence policy optimization, arXiv 2507.18071",
    ),
    "gmpo": Preset(
        # The log ratios are clipped to [-0.4, 0.4], the ratios to [exp(-0.4), exp(0.4)].
        {**OF_SEQUENCES, "ratio": "geometric_clip", "epsilon": 0.3297, "epsilon_high": 0.4918},
        "Zhao et al. 2025, Geometric-mean policy optimization, arXiv 2507.20673",
    ),
    "dppo": Preset(
        {
            "baseline": "group_mean",
            "aggregation": "fixed_length",
            "ratio": "trust",
            "trust_bound": 0.15,
        },
        "Qi et al. 2026, Rethinking the trust region in LLM reinforcement learning, arXiv 2602.04879",
    ),
    "cispo": Preset(
        # The ratio is clipped to [0, 5], bounds that are relative to 1.
        {
            **GROUP_STD,
            "aggregation": "token_mean",
            "ratio": "cispo",
            "epsilon": 1.0,
            "epsilon_high": 4.0,
        },
        "MiniMax 2025, MiniMax-M1, arXiv 2506.13585",
    ),
    "spo": Preset(
        {**WHITENED, "baseline": "tracker", "epsilon_high": 0.28},
        "Xu & Ding 2025, Single-stream policy optimization, arXiv 2509.13232",
    ),
    "reinforce_pp": Preset({**WHITENED, **TO_GO, "baseline": "none"}, PP_PAPER),
    "reinforce_pp_baseline": Preset(
        {**WHITENED, "baseline": "group_mean", "kl_estimator": "k2", "kl_placement": "loss"},
        f"{PP_PAPER}, the variant with a group baseline",
    ),
}


def read_changes(text: str) -> tuple[str, dict[str, Any]]:
    """Split a text such as `grpo,scale=none` into a name and the changes to what it names.

    Args:
        text: a name and changes, each NAME=VALUE, or one of the two. Changes are separated by commas; a comma
            in brackets or quotes belongs to a value.

    Returns:
        The name, empty if there is none, and the values of the changes by their names. Numbers, tuples, True,
        False and None are read as Python writes them; anything else is text.

    Raises:
        Refused: the text has another form, or changes something twice.
    """
    part = r"(?:[^,(\[{\"']|\([^)]*\)|\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*')+"  # no commas but in brackets
    if not text:
        raise Refused("it is empty; name a preset, such as rloo.")
    if not re.fullmatch(rf"{part}(,{part})*", text):
        raise Refused("a bracket or a quote is not closed, or nothing stands beside a comma.")
    pieces = [piece.strip() for piece in re.findall(part, text)]
    head = "" if "=" in pieces[0] else pieces.pop(0)
    changes = dict[str, Any]()
    for piece in pieces:
        name, equals, value = map(str.strip, piece.partition("="))
        name = name.removeprefix("--").removeprefix("estimator.").replace("-", "_")
        if not name or not equals:
            raise Refused(
                f'write {piece!r} as NAME=VALUE, as in "grpo,scale=none"; spaces separate names.'
            )
        if name in changes:
            raise Refused(f"{name} is given twice; give it once.")
        changes[name] = _parse_value(value)
    return head, changes


def _parse_value(text: str) -> Any:
    """Read a number, a tuple, True, False or None as Python writes it; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text, text)


def _toolkits() -> dict[str, Preset]:
    """Read the presets that are defaults of other toolkits."""
    text = Path(__file__).with_name("toolkits.txt").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if re.match("[a-z_]+ [|] ", line)]
    return {
        name: Preset(read_changes(changes)[1], paper, beyond)
        for name, changes, paper, beyond in rows
    }


PRESETS |= _toolkits()
