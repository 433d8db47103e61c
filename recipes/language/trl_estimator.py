"""Train in TRL's GRPOTrainer with any estimator of tokenrl, also with a baseline of your own.

    python recipes/language/trl_estimator.py                                 RLOO, on the toy task vowels
    python recipes/language/trl_estimator.py --estimator reinforce           without a baseline
    python recipes/language/trl_estimator.py --estimator mine.py:baseline    your own function

It needs TRL: `pip install -c constraints.txt -e '.[benchmarks]'`. The class can be copied alone. TRL samples,
calls the rewards, keeps the reference model and updates; the advantages and the loss are those of the
estimator. Of GRPOConfig the fields of the loss (loss_type, scale_rewards, epsilon, beta,
mask_truncated_completions ...) are not used. Tokens that a tool or an environment wrote (TRL's tool_mask) are
not learnt from. With the estimator `trl_grpo` the gradient is that of GRPOTrainer itself.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from typing import Any

import torch
import tyro
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tokenrl import Estimator, Refused
from tokenrl.language import load_task


class EstimatorTrainer(GRPOTrainer):
    """GRPOTrainer with the advantages and the loss of an estimator, on one process and without vLLM."""

    def __init__(
        self, estimator: Estimator, *args: Any, config: GRPOConfig, **options: Any
    ) -> None:
        """Take an estimator, and what GRPOTrainer takes; its `args` is called config."""
        e = estimator
        if e.needs_memory or e.needs & {"values", "greedy_rewards", "score_norms"}:
            raise Refused(
                f"TRL has no input for the baseline {e.baseline!r}. Choose rloo or group_mean."
            )
        if e.zero_spread != "keep" or e.truncations != "keep" or "sampling_logprobs" in e.needs:
            raise Refused(
                "Give the estimator zero_spread=keep and truncations=keep, and no importance weights."
            )
        if config.use_vllm or config.world_size > 1:
            raise Refused("This trainer is for one process and without vLLM; set use_vllm=False.")
        config.beta = e.beta  # with beta 0 TRL has no reference
        config.mask_truncated_completions = False
        self.estimator, self.rewards = estimator, torch.zeros(0, 0)
        super().__init__(*args, args=config, **options)

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self.rewards = super()._calculate_rewards(*args)  # [N, rewards]
        return self.rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Sample, and put the advantages and the weights of tokens of the whole rollout beside the rows."""
        rollout = super()._generate_and_score_completions(inputs)
        # 0 for what a tool has written
        mask = rollout["completion_mask"] * rollout.get("tool_mask", 1)
        # rows without any reward abstain
        step = {
            "mask": mask,
            "valid": ~self.rewards.isnan().all(1),
        }
        if "old_per_token_logps" not in rollout and self.estimator.beta:
            with torch.no_grad():
                rollout["old_per_token_logps"] = self._logprobs(self.model, rollout)[0]
        rollout["advantages"] = self.estimator.advantages(
            (self.rewards * self.reward_weights.to(mask.device)).nansum(1),
            components=self.rewards,
            component_weights=self.reward_weights,
            group_size=self.num_generations if self.model.training else self.num_generations_eval,
            logprobs=rollout.get("old_per_token_logps"),
            ref_logprobs=rollout.get("ref_per_token_logps"),
            max_length=self.max_completion_length,
            **step,
        ).policy
        weights = self.estimator.token_weights(max_length=self.max_completion_length, **step)
        return rollout | {"weights": weights, "actions": mask}

    def _logprobs(self, model: Any, rows: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the log-probability [N, T] and the entropy [N, T] of each token of the completions."""
        ids, mask = (
            torch.cat([rows[f"prompt_{name}"], rows[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        width = rows["completion_ids"].shape[1]
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, mask, width, compute_entropy=True
        )
        return logprobs, entropy

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        logprobs, entropy = self._logprobs(model, inputs)
        # The weights divide by the whole rollout. An update adds up some of its slices, or all of them.
        slices = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        return self.estimator.loss(
            logprobs,
            inputs["advantages"],
            inputs["weights"] * (slices if self.model.training else 1.0),
            inputs["actions"],
            old_logprobs=inputs.get("old_per_token_logps", logprobs.detach()),
            ref_logprobs=inputs.get("ref_per_token_logps"),
            entropy=entropy,
        )


def main(estimator: str = "rloo", max_steps: int = 40) -> None:
    """Train a tiny model, made here, on the toy task vowels."""
    from datasets import Dataset

    task = load_task("vowels")
    model, tokenizer = task.build(0)
    model.save_pretrained("runs/trl_estimator/base")  # a KL makes TRL load the reference from there
    config = GRPOConfig(
        output_dir="runs/trl_estimator/run",
        max_steps=max_steps,
        learning_rate=1e-3,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=task.max_completion_length,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    trainer = EstimatorTrainer(
        Estimator.preset(estimator),
        model="runs/trl_estimator/base",
        processing_class=tokenizer,
        reward_funcs=task.reward,
        train_dataset=Dataset.from_list(list(task.train_prompts)),
        config=config,
    )
    trainer.train()


if __name__ == "__main__":
    tyro.cli(main)
