"""Takes one of the measurements of `on_your_gpu.py`, and prints the result as a line of JSON.

That program starts this one for each of its parts but speed, which `one_trainer.py` measures, so that a part
that fails ends no other. Those that train with tokenrl import it before torch, as the command does. To repeat
one by hand:

    python recipes/benchmarks/gpu_parts.py '{"part": "describe_device"}'
    python recipes/benchmarks/gpu_parts.py '{"part": "train_estimators", "steps": 6, "cpu": true}'
    python recipes/benchmarks/gpu_parts.py '{"part": "measure_gaps", "work": "gpu-135m"}'

Look for: on one device equal seeds give equal numbers, whatever else runs on it.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from one_trainer import device, make_model, shape_of

ESTIMATORS: dict[str, dict[str, Any]] = {
    "rloo": {"estimator": "rloo"},
    "grpo, KL in the loss": {"estimator": "grpo,beta=0.1", "num_iterations": 2},
    "ppo, with a critic": {"estimator": "ppo"},
}


def device_of(job: dict[str, Any]) -> str:
    return "cpu" if job.get("cpu") else device()


def train_estimators(job: dict[str, Any]) -> dict[str, Any]:
    """Train with each estimator; returns by name the rows of its metrics, or the error that ended it."""
    import tokenrl  # before torch, as the command does
    from tokenrl.runs import read_metrics

    full_precision()
    settings = {
        "max_steps": job["steps"],
        "seed": job.get("seed", 0),
        "cpu": device_of(job) == "cpu",
    }
    settings |= {"mixed_precision": "no", "training_attention": "as_loaded", "quiet": True}
    # with the task's own, ratios at the clip's edge amplify rounding
    settings |= {"learning_rate": 2e-4}
    settings |= {"eval_size": 8, "eval_every": 0, "eval_generations": 0, "log_completions": 0}
    settings |= {"prompts_per_step": 2, "num_generations": 4} if job.get("tiny") else {}
    outcome: dict[str, Any] = {}
    for name, options in ESTIMATORS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                tokenrl.train(task="vowels", output_dir=f"{folder}/run", **settings, **options)
                outcome[name] = read_metrics(Path(folder, "run", "metrics.jsonl"))[1:]
            except Exception as error:
                outcome[name] = {"error": f"{type(error).__name__}: {error}"}
    return outcome


def full_precision(tf32: bool = False) -> None:
    """Compute products of float32 matrices on a GPU as such, or in TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def measure_gaps(job: dict[str, Any]) -> dict[str, Any]:
    """Mean and largest difference from float32 of log-probabilities of the same tokens, by precision."""
    import torch

    shape, kind = shape_of(job), device_of(job)
    full_precision()
    model = make_model(shape, kind=kind)[0].eval()
    random = torch.Generator().manual_seed(job.get("seed", 0))
    size = (shape.group, shape.prompt + shape.length)
    ids = torch.randint(2, shape.vocabulary, size, generator=random).to(kind)

    @torch.inference_mode()
    def distribution() -> torch.Tensor:
        return model(ids).logits.float().log_softmax(-1).cpu().flatten(0, 1)

    with torch.inference_mode():
        scale = 3 / model(ids).logits.std()
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    exact = distribution()
    tokens = torch.multinomial(exact.exp(), 1, generator=random)
    exact = exact.gather(1, tokens)

    def gap() -> list[float]:
        differences = (distribution().gather(1, tokens) - exact).abs()
        return [float(differences.mean()), float(differences.max())]

    gaps: dict[str, Any] = {"float32 again": gap(), "TF32": None}
    if kind == "cuda":
        full_precision(tf32=True)
        gaps["TF32"] = gap()
        full_precision()
    for weight in model.parameters():  # buffers stay as they are, as in a run
        weight.data = weight.data.bfloat16()
    return gaps | {"bfloat16": gap()}


def describe_device(job: dict[str, Any]) -> dict[str, Any]:
    """The device that is measured: its kind, name and memory, and whether it computes in bfloat16."""
    import torch

    kind = device_of(job)
    if kind == "cuda":
        about = torch.cuda.get_device_properties(0)
        name = f"{about.name}, the first of {torch.cuda.device_count()}"
        memory, bf16 = about.total_memory, torch.cuda.is_bf16_supported()
        software = (
            f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        )
        return {"kind": kind, "name": f"{name}, {software}", "memory": memory, "bf16": bf16}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = (
        f"Apple GPU of {platform.machine()}, MPS" if kind == "mps" else f"CPU, {platform.machine()}"
    )
    return {"kind": kind, "name": name, "memory": memory, "bf16": False}


PARTS = {part.__name__: part for part in (train_estimators, measure_gaps, describe_device)}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=json.loads, help="what to measure, as an object in JSON")
    job = parser.parse_args().job
    print(json.dumps(PARTS[job["part"]](job)))
