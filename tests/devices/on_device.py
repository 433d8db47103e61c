"""Runs trainings and other commands on the CPU and then on a pretended device, and prints what they gave.

    python tests/devices/on_device.py FOLDER NAME [NAME ...]

Prints a line of JSON for each name: the rows of metrics of both
runs, the waits of one step by their lines, and the error of a run that failed, with its traceback.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pretended

import tokenrl
from tokenrl.language.policy import loading
from tokenrl.runs import markup

PADDED = [{"prompt": "1234567>"[-n:]} for n in (3, 8, 5, 6, 4, 7)]
STEPS = 3


def odd(completions: list[str], **_: Any) -> list[float]:
    """The number of odd digits up to 5, so that almost every group has a spread."""
    return [float(sum(letter in "135" for letter in text)) for text in completions]


def first_is_odd(completions: list[str], **_: Any) -> list[float]:
    return [float(text[:1] in ("1", "3", "5")) for text in completions]


def preset(name: str, **changes: Any) -> Any:
    return tokenrl.Estimator.preset(name, **changes)


RUNS: dict[str, dict[str, Any]] = {
    "padded": {
        "task": PADDED,
        "max_completion_length": 9,
        "prompts_per_step": 3,
        "eval_size": 2,
        "eval_generations": 0,
    },
    "ppo": {"estimator": "ppo", "num_minibatches": 2, "num_iterations": 2},
    "kl in the loss": {
        "estimator": preset("grpo", beta=0.1),
        "task": PADDED,
        "max_completion_length": 16,
    },
    "lora": {"estimator": preset("grpo", beta=0.1), "lora_r": 2},
    "remax": {"estimator": "remax"},
    "dapo": {"estimator": "dapo", "reward": first_is_odd, "max_refills": 2},
    "memory of prompts": {"estimator": "spo", "num_generations": 1, "reward": first_is_odd},
    "centred scores": {"estimator": preset("rloo", importance="token", importance_centre=True)},
    "optimal": {"estimator": preset("rloo", baseline="optimal")},
    "top_k and top_p": {"top_k": 5, "top_p": 0.9},
    "allowed": {"allowed": "[0-9]{2,7}", "estimator": preset("grpo", beta=0.1)},
    "bfloat16": {"mixed_precision": "bf16"},
    "passes": {"estimator": "grpo", "micro_batch_size": 4, "num_iterations": 2},
    "own teacher": {
        "estimator": "rloo_opd",
        "teacher": "self",
        "teacher_decay": 0.5,
        "teacher_template": "{prompt}7>",
    },
    "stop strings": {"stop": ("11", "3"), "max_completion_length": 24},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "guess_number": {"task": "guess_number", "reward": None},
    "calculator": {"task": "calculator", "reward": None},
    "check": {"check": True},
}
"""By name, what a training has besides `COMMON`."""
COMMON = {
    "task": "sort_digits",
    "model": "tiny",
    "reward": odd,
    "estimator": "rloo",
    "max_steps": STEPS,
    "prompts_per_step": 4,
    "num_generations": 4,
    "learning_rate": 1e-3,
    "eval_size": 4,
    "eval_every": 0,
    "seed": 1,
    "quiet": True,
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(folder: Path, cpu: bool, **options: Any) -> dict[str, Any]:
    """Train; return the rows of metrics and the waits of the last step but one."""
    marks: list[dict[str, int]] = []
    options = {name: value for name, value in (COMMON | options).items() if value is not None}
    callback = lambda step, metrics: marks.append(dict(pretended.waits))  # noqa: E731
    result = tokenrl.train(**options, output_dir=folder, cpu=cpu, callback=callback)
    assert (result.policy.device.type == pretended.NAME) != cpu
    rows = []
    waits: dict[str, int] = {}
    if not options.get("check"):
        rows = rows_of(folder)
    if len(marks) >= 3:
        waits = {line: n - marks[-3].get(line, 0) for line, n in marks[-2].items()}
    return {"rows": rows, "waits": {line: n for line, n in waits.items() if n}}


def continued(
    folder: Path, cpu: bool, *, begins_on_cpu: bool = False, ends_on_cpu: bool = False
) -> dict[str, Any]:
    """Train two steps and continue, each on the CPU or where `cpu` says."""
    trained(folder, cpu or begins_on_cpu, max_steps=2, save_every=1, estimator="ppo")
    return trained(folder, cpu or ends_on_cpu, max_steps=4, resume="auto", estimator="ppo")


def model_beside(folder: Path) -> str:
    """The model that `main` has trained before."""
    return str(folder.parent / "made on the CPU" / "model")


def taught(folder: Path, cpu: bool) -> dict[str, Any]:
    """Train from a teacher alone, with its KL in closed form."""
    teacher = model_beside(folder)
    return trained(folder, cpu, teacher=teacher, reward="none", estimator="opd_full_path")


def evaluated(folder: Path, cpu: bool, **options: Any) -> dict[str, Any]:
    model = model_beside(folder)
    shared = {"model": model, "task": "sort_digits", "reward": odd, "eval_size": 4, "seed": 0}
    evaluation = tokenrl.evaluate(**shared, max_completion_length=8, **options)
    return {"rows": [dict(evaluation.metrics)]}


def sampled(folder: Path, cpu: bool) -> dict[str, Any]:
    model = model_beside(folder)
    texts = tokenrl.sample(
        model=model, prompt="385927>", num_generations=3, seed=0, max_completion_length=24
    )
    return {"rows": [{"completions": texts}]}


def on_a_mac(folder: Path, cpu: bool) -> dict[str, Any]:
    """Train a small model where the device is no faster with it; the result is that of the CPU."""
    devices = loading.SLOW_WITH_SMALL
    loading.SLOW_WITH_SMALL = (pretended.NAME,)
    result = tokenrl.train(**COMMON, output_dir=folder, cpu=cpu or None)
    loading.SLOW_WITH_SMALL = devices
    assert result.policy.device.type == "cpu"
    return {"rows": rows_of(folder)}


def fine_tuned(folder: Path, cpu: bool) -> dict[str, Any]:
    tokenrl.sft(
        task="sort_digits", model="tiny", max_steps=3, output_dir=folder, quiet=True, eval_size=4
    )
    return {"rows": rows_of(folder)}


def preferred(folder: Path, cpu: bool) -> dict[str, Any]:
    sizes = {"max_steps": 3, "num_pairs": 32}
    tokenrl.train_reward_model(task="sort_digits", output_dir=folder, quiet=True, **sizes)
    training = trained(folder / "policy", cpu, reward=str(folder / "model"))
    return {"rows": rows_of(folder) + training["rows"]}


def agent(folder: Path, cpu: bool) -> dict[str, Any]:
    tokenrl.train_agent(
        env="CartPole-v1", estimator="ppo", output_dir=folder, max_steps=2, quiet=True
    )
    return {"rows": rows_of(folder)}


COMMANDS: Mapping[str, Callable[[Path, bool], dict[str, Any]]] = {
    "teacher": taught,
    "continue": continued,
    "continue from the CPU": partial(continued, begins_on_cpu=True),
    "continue on the CPU": partial(continued, ends_on_cpu=True),
    "evaluate": partial(evaluated, num_generations=2),
    "evaluate with a reference": partial(evaluated, num_generations=2, reference="REFERENCE"),
    "best of n": partial(evaluated, best_of=4),
    "sample": sampled,
    "a small model on a Mac": on_a_mac,
    "sft": fine_tuned,
    "reward model": preferred,
    "control": agent,
}
NAMES = [*RUNS, *COMMANDS]


def attempted(name: str, folder: Path, cpu: bool) -> dict[str, Any]:
    """Run it; an error is a result too."""
    pretended.waits.clear()
    command = COMMANDS.get(name) or partial(trained, **RUNS.get(name, {}))
    if name == "evaluate with a reference":
        command = partial(command, reference=model_beside(folder))
    try:
        return command(folder, cpu)
    except Exception:
        return {"error": traceback.format_exc()}


def main() -> None:
    root, *names = sys.argv[1:]
    markup.svg = lambda *_: "<svg></svg>"  # as `undrawn` has it for the tests
    if any(name in COMMANDS for name in names):
        trained(Path(root, "made on the CPU"), cpu=True, max_steps=1)
    results = {name: {"cpu": attempted(name, Path(root, f"{name} cpu"), True)} for name in names}
    pretended.begin()
    for name in names:
        results[name]["device"] = attempted(name, Path(root, f"{name} device"), False)
        print(json.dumps({"name": name, **results[name]}), flush=True)


if __name__ == "__main__":
    main()
