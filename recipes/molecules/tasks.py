"""The tasks of MolScore's benchmark MolOpt, by name, as tasks of tokenrl without a budget.

    tokenrl compare --task recipes/molecules/tasks.py:QED --model runs/prior/sft --arms rloo reinforce

The prompt is empty. An evaluation samples four molecules for each of 32 rows, 128 in all.
"""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from molopt import Args, open_task
from prior import LONGEST

from tokenrl.language import PromptTask


def __getattr__(name: str) -> PromptTask:
    """Return a task, as Python asks here for a name that the module does not have (PEP 562)."""
    if name.startswith("__"):
        raise AttributeError(name)
    molscore = open_task(Args(), name, Path(mkdtemp()))

    def score(completions: list[str], **columns: Any) -> list[float]:
        """MolScore's score, from 0 to 1; 0 for text that is no molecule."""
        return list(molscore.score(completions, flt=True))

    score.range = (0, 1)  # type: ignore[attr-defined]
    prompts = 32 * [{"prompt": ""}]
    return PromptTask(name, prompts, prompts, score, max_completion_length=LONGEST + 1)
