"""Scores texts with a reward model, which has the signature of a reward function.

The reward of a text is the single logit of a sequence classifier. The classification head of a decoder reads
the last token that is not padding, and finds it by comparing ids with the pad id. If there is no pad token,
only rows of equal length share a batch, so that no padding has to be recognised.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrl.errors import Refused
from tokenrl.language.policy.arguments import PromptArguments, saved_form, trained_prompts
from tokenrl.language.policy.copies import uncompiled
from tokenrl.language.policy.loading import context_of, find_model, gains_from, loading
from tokenrl.language.policy.prompts import checked_form, formed, render, text_ids

if TYPE_CHECKING:
    from torch import Tensor

NO_PAD = -1  # no token has this id, so the head takes every token as text


class RewardModel:
    """A sequence classifier with one label, and its own tokenizer.

    Attributes:
        model: an `AutoModelForSequenceClassification` in eval mode; frozen if loaded from a folder.
        tokenizer: its tokenizer, which truncates on the left.
        pad_token_id: the id that the head skips as padding; `NO_PAD` if there is none.
        max_length: the most tokens of a text; None if there is no limit.
        trained_prompts: hashes of the prompts of the pairs that it was trained on, and of its backbone.
        form: how prompts are put before a completion: of a reward model's run, as in that run.
        batch_size: texts per forward pass when scoring, which changes memory and speed only.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | tuple[Any, Any],
        *,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        """Load model and tokenizer, or take them from memory.

        Args:
            source: a folder that `save_pretrained` wrote, with the tokenizer, or the run directory of a
                reward model; its name names the metric. Or a pair of model and tokenizer.
            batch_size: texts per forward pass when scoring.
            device: where the model runs. None: the accelerator if there is one from which it gains, else the
                CPU.

        Raises:
            Refused: the folder holds no model or no tokenizer, the model has more than one label, or weights
                are missing, so that its head would be random.
        """
        import torch

        if isinstance(source, tuple):
            model, tokenizer = uncompiled(source[0]), source[1]
            self.__name__ = type(model).__name__
        else:
            self.__name__ = Path(source).resolve().name
            model, tokenizer, missing = load_classifier(str(source))
            if missing:
                raise Refused(
                    f"reward model '{source}' lacks {', '.join(missing)[:200]}: give a trained one."
                )
            model.requires_grad_(False)
        if model.config.num_labels != 1:
            problem = f"The classifier {source!s:.100} has {model.config.num_labels} labels"
            raise Refused(
                f"{problem}; a reward model has one: give one that was saved with num_labels=1."
            )
        self.form = PromptArguments(**saved_form(source))
        self.trained_prompts = trained_prompts(model.name_or_path)
        self.tokenizer: Any = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "left"
        self.batch_size = batch_size
        # Built for CUDA, torch names cuda as the current accelerator on a machine without a GPU too.
        if device is None and torch.accelerator.is_available():
            accelerator = torch.accelerator.current_accelerator()
            if gains_from(accelerator, sum(p.numel() for p in model.parameters())):
                device = str(accelerator)
        self.model: Any = model.to(device or "cpu").eval()
        text_config = model.config.get_text_config()
        model.config.return_dict = text_config.return_dict = True
        pads = (text_config.pad_token_id, self.tokenizer.pad_token_id)
        self.pad_token_id: int = next((pad for pad in pads if pad is not None and pad >= 0), NO_PAD)
        model.config.pad_token_id = text_config.pad_token_id = self.pad_token_id
        limits = [self.tokenizer.model_max_length, context_of(text_config)]
        self.max_length = min((limit for limit in limits if limit and limit < 10**9), default=None)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        tools: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float]:
        """Score prompt + completion; a text that is too long loses its beginning.

        Args:
            prompts: N texts or lists of chat messages.
            completions: N texts or lists of chat messages.
            tools: the column `tools` of the data, N values that the chat template gets; None without it.

        Returns:
            N rewards, the logits of the texts.

        Raises:
            Refused: the prompts are chat messages and the tokenizer has no chat template.
        """
        columns = prompts, completions, tools or [None] * len(prompts)
        return self.score([*map(self.encode, *columns)])

    def ask(self, form: PromptArguments) -> None:
        """Put prompts in this form from now on.

        Raises:
            Refused: the chat template cannot.
        """
        self.form = checked_form(self.tokenizer, form, self.__name__)

    def score(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """Rewards of N encoded texts, without gradient, in batches of similar length."""
        import torch

        rewards = [0.0] * len(ids)
        for rows in self._batches([len(row) for row in ids]):
            with torch.no_grad():
                logits = self.logits([ids[i] for i in rows])
            for i, reward in zip(rows, logits.float().tolist(), strict=True):
                rewards[i] = reward
        return rewards

    def logits(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Rewards [N] of encoded texts, with gradient, by one forward pass.

        Without a pad id the texts must have the same length.
        """
        import torch

        rows = [torch.tensor(row) for row in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(rows, batch_first=True, padding_value=max(self.pad_token_id, 0))
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        device = self.model.device
        out = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        logits: Tensor = out.logits
        return logits[:, 0]

    def encode(
        self, prompt: Any, completion: Any, tools: Any = None, *, truncate: bool = True
    ) -> list[int]:
        """Ids of prompt + completion, at least one; `truncate` cuts them on the left to `max_length`.

        Raises:
            Refused: the prompt is chat messages and the tokenizer has no chat template.
        """
        prompt = formed(prompt, self.form)
        # A chat template writes the special tokens itself; a second BOS is an input that the model never saw.
        options = {"add_special_tokens": isinstance(prompt, str)}
        if isinstance(prompt, str):
            text = prompt + completion
        else:
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            text = render(self.tokenizer, [*prompt, *completion], self.form, self.__name__, tools)
        if self.max_length and truncate:
            options |= {"truncation": True, "max_length": self.max_length}
        ids = text_ids(self.tokenizer, text, **options)
        start = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        return ids or [next(token for token in start if token is not None)]

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Batches of row numbers, sorted by length to save padding; of equal length if there is no pad id."""
        batches: list[list[int]] = []
        for row in sorted(range(len(lengths)), key=lengths.__getitem__):
            is_full = not batches or len(batches[-1]) == self.batch_size
            if is_full or (self.pad_token_id == NO_PAD and lengths[row] != lengths[batches[-1][0]]):
                batches.append([])
            batches[-1].append(row)
        return batches


def load_classifier(name_or_path: str, **options: Any) -> tuple[Any, Any, list[str]]:
    """Load a sequence classifier and its tokenizer; a causal language model gets a new head with one label.

    Args:
        name_or_path: a directory, that of a run for the model that it saved, or a hub name.
        **options: further arguments of `from_pretrained`, such as `dtype`.

    Returns:
        The model, its tokenizer, and the names of the weights that were not saved and are random.

    Raises:
        Refused: nothing can be loaded.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    path = find_model(name_or_path)
    with loading("reward model", path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not any(
            kind.endswith("ForSequenceClassification") for kind in config.architectures or ()
        ):
            config.num_labels = 1
        options |= {"config": config, "trust_remote_code": False, "output_loading_info": True}
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return loaded[0], tokenizer, sorted(loaded[1]["missing_keys"])
