"""The Bradley-Terry loss of a reward model.

The model is that of Bradley & Terry 1952, the loss that of Stiennon et al. 2020 and Ouyang et al. 2022,
equation 1.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | float = 0.0,
    center_rewards_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean negative log-likelihood of the choices, P(chosen) = sigmoid(d) with d = r_c - r_r - margin.

        mean[-(1 - e) log sigmoid(d) - e log sigmoid(-d)] + coefficient mean[(r_c + r_r)^2]

    The first term depends only on differences of rewards; the second (Eisenstein et al. 2023) keeps their
    mean near 0. The margin is that of Llama 2 (Touvron et al. 2023, equation 2).

    Args:
        chosen_rewards: rewards r_c of the chosen completions [B].
        rejected_rewards: rewards r_r of the rejected completions [B].
        margin: by how much r_c should exceed r_r: a number, or one per pair [B].
        center_rewards_coefficient: weight of the second term.
        label_smoothing: e, the assumed share of flipped labels.

    Returns:
        A scalar.
    """
    difference = chosen_rewards - rejected_rewards - margin  # [B]
    likelihood = (1 - label_smoothing) * logsigmoid(difference) + label_smoothing * logsigmoid(-difference)
    return (
        -likelihood.mean() + center_rewards_coefficient * (chosen_rewards + rejected_rewards).square().mean()
    )
