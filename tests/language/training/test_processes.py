"""Two processes do what one does: the same update, the same metrics, no rank left waiting.

Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny_environments import Faulty, Guess
from tiny_models import (
    PROMPTS,
    Engine,
    apart,
    flat_on,
    gradient,
    make_learner,
    make_policy,
    make_task,
    one_step,
    quickly,
    vowel_reward,
    weights,
)

from tokenrl.core.estimator import Estimator
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.stream import WeightedPrompts
from tokenrl.runs.metrics import read_metrics
from tokenrl.runs.reader import read_run

ENDS = tuple(range(1, 90, 3))  # short completions: the processes differ in their longest
LATER = PROMPTS[2:]  # the prompts of the second process
flat_later = flat_on(LATER)
"""No row of the second process has anything to learn from."""
flat_on_both = flat_on((PROMPTS[0], *LATER))
"""One group of the first process and both of the second have to be replaced."""
silent_later = flat_on(LATER, None)
"""Every row of the second process abstains."""


def logging(prompts, completion_ids, log_metric, **_):
    """Each process logs a mean over its rows, and one of a name that the other does not have."""
    rewards = vowel_reward(completion_ids=completion_ids, completions=None)
    late = [r for p, r in zip(prompts, rewards, strict=True) if p in LATER]
    early = [r for p, r in zip(prompts, rewards, strict=True) if p not in LATER]
    for name, values in {"all": rewards, "late": late, "early": early}.items():
        if values:
            log_metric(f"logged/{name}", sum(values) / len(values))
    return rewards


def flat(completions, **_):
    return [1.0] * len(completions)


SCENARIOS = {
    "batch": (
        Estimator(baseline="batch_mean", scale="batch_std", entropy_coef=0.1),
        {},
        logging,
    ),
    "kl in minibatches": (
        Estimator.preset("grpo", beta=0.3),
        {"num_minibatches": 2, "num_iterations": 2, "micro_batch_size": 1},
        vowel_reward,
    ),
    "target in passes": (
        Estimator.preset("tpo", eta=0.1),
        {"num_iterations": 2, "micro_batch_size": 1},
        vowel_reward,
    ),
    "idle rank": ("rloo", {"micro_batch_size": 2}, flat_later),
    "silent rank": ("rloo", {"micro_batch_size": 2}, silent_later),
    "nothing to learn": ("rloo", {}, flat),
    "bfloat16": ("rloo", {"mixed_precision": "bf16", "micro_batch_size": 2}, vowel_reward),
    "teacher and lora": (
        Estimator.preset("grpo", beta=0.3),
        {"lora_r": 2, "teacher": True, "micro_batch_size": 2},
        vowel_reward,
    ),
    "greedy": ("remax", {}, vowel_reward),
    "memory": ("reinforce_running_mean", {}, vowel_reward),
    "critic of two lambdas and lora": ("sao", {"lora_r": 2, "micro_batch_size": 2}, vowel_reward),
    "score norms": ("optimal", {}, vowel_reward),
    "refilled": ("dapo", {}, flat_on_both),
    "episodes": (Estimator(returns="reward_to_go"), {"micro_batch_size": 4}, vowel_reward),
    "failing episodes": ("grpo", {"num_generations": 4}, vowel_reward),
    "own teacher": (
        Estimator.preset("rloo_opd"),
        {"teacher": "self", "teacher_decay": 0.5, "teacher_template": "{prompt} on", "lora_r": 2},
        vowel_reward,
    ),
    "weighted prompts": (
        Estimator(prompts="inverse"),
        {"prompt_weights": "variance"},
        vowel_reward,
    ),
    "replay": (Estimator(importance="token"), {"replay": 2, "micro_batch_size": 4}, vowel_reward),
    "refilled by an engine": (
        "dapo",
        {"generator": lambda policy, _: Engine(policy)},
        flat_on_both,
    ),
}

SLOW = {"nothing to learn", "bfloat16", "score norms", "episodes"}
"""Those whose processes exchange nothing that no other scenario sees."""


def outcome(name: str) -> dict:
    """One step of a scenario: gradient, weights and metrics."""
    from tokenrl.language.policy.model import add_lora

    estimator, options, reward = SCENARIOS[name]
    architecture, dtype = ("llama", "float32") if name == "bfloat16" else ("gpt2", "float64")
    policy = make_policy(architecture, dtype=dtype, initializer_range=0.1, vocabulary=90)
    policy.eos_ids = ENDS
    if "kl" in name:
        policy.reference = make_policy(architecture, dtype=dtype, seed=1).model.requires_grad_(
            False
        )
    if options.get("teacher") is True:
        options = options | {"teacher": make_policy(architecture, dtype=dtype, n_layer=1, seed=1)}
    if options.get("lora_r"):
        add_lora(policy, r=2)
    learner = make_learner(policy, estimator, learning_rate=1e-3, **options)
    if "episodes" in name:
        environment = Faulty if "failing" in name else Guess
        environments = Environments(environment, timeout=0.5)
        reward = Rewards([reward], [0.5, 1.0], environments=environments)
    # the longest completion is the first's, or the second's
    step = 8 + list(SCENARIOS).index(name) % 2
    if learner.replay is not None:
        one_step(learner, step=1, reward=reward)
    stream = None
    if "weighted" in name:
        rows = Rows.of({"prompt": prompt} for prompt in PROMPTS)
        stream = WeightedPrompts(rows, 2, lambda _, means, variances: 1 + means + variances, 0.1)
        one_step(learner, step=1, reward=reward, stream=stream)
    metrics = one_step(learner, step=step, reward=reward, stream=stream).metrics
    return {
        "gradient": gradient(policy.model),
        "weights": weights(policy.model),
        "metrics": metrics,
    }


def failing_in_the_second(completion_ids, trainer_state, **_):
    if trainer_state.global_step == 1 and os.environ["RANK"] == "1":
        raise ValueError("on purpose")
    return vowel_reward(None, completion_ids)


def whole_run(directory: Path, reward=vowel_reward, **options) -> None:
    """A short run through `tokenrl.train`."""
    import tokenrl

    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1)
    policy.eos_ids = ENDS
    task = make_task([f"{p} {n}" for p in PROMPTS for n in ("one", "two", "ten")], reward)
    settings = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 2, "save_every": 2}
    settings |= {"keep": "best", "estimator": "reinforce_running_mean", "cpu": True, "quiet": True}
    tokenrl.train(model=policy, task=task, output_dir=directory, **settings, **options)


def assert_close(mine: dict, alone: dict) -> None:
    """Metrics of two runs are equal to rounding, but for padding: each process divides its own rows."""
    both = [{key: x for key, x in run.items() if key != "padding"} for run in (mine, alone)]
    assert both[0] == pytest.approx(both[1], rel=1e-5, abs=1e-6)


def assert_same_metrics(run: Path, other: Path) -> None:
    """The lines of metrics.jsonl of two runs are equal to rounding."""
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (run, other)]
    assert len(lines[0]) >= 4
    for mine, alone in zip(*lines, strict=True):
        assert_close(mine, alone)


def main(directory: Path, program: str) -> None:
    """What one of the processes does."""
    torch.set_num_threads(1)
    outcomes = {name: outcome(name) for name in program.split(",")}
    whole_run(directory / "run")
    torch.save(outcomes, directory / f"rank{os.environ['RANK']}.pt")


def import_all() -> None:
    """What the processes will need, so that none of them imports it for itself.

    No gradient may be computed here: torch refuses to compute one in a process forked after that.
    """
    from tokenrl.language.policy.model import add_lora

    import_module("tokenrl.language.training.loop")
    for architecture in ("gpt2", "llama"):
        add_lora(make_policy(architecture), r=2)


def fork_ranks(directory: Path, program: str, world: int) -> None:
    """Be a launcher: one process that imports, and forks the ranks."""
    from tokenrl.runs import markup

    import_all()
    markup.svg = lambda *_: "<svg></svg>"  # as `undrawn` has it for the tests
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }

    def rank(number: int) -> None:
        of_rank = shared | {"RANK": number, "LOCAL_RANK": number}
        os.environ.update({name: str(value) for name, value in of_rank.items()})
        main(directory, program)

    torch.multiprocessing.start_processes(rank, nprocs=world, start_method="fork")


THIS = str(Path(__file__).resolve())
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def environment(**variables: str) -> dict[str, str]:
    """The variables with which a program finds this checkout's packages."""
    paths = [os.getcwd(), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return os.environ | variables


def launch(*program: str, **variables: str) -> subprocess.CompletedProcess:
    """Run Python on a program with this checkout's packages, and wait for it."""
    settings = {"capture_output": True, "text": True, "timeout": 240}
    return subprocess.run([sys.executable, *program], env=environment(**variables), **settings)


def ranks_of(directory: Path, names: Iterable[str], world: int) -> list[dict]:
    """What each process saved of its scenarios and of a whole run."""
    done = launch(THIS, str(directory), ",".join(names), str(world), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def two(request, tmp_path_factory):
    """What two processes saved: directory and outcomes by rank."""
    directory = tmp_path_factory.mktemp("two")
    is_quick = request.config.getoption("markexpr").startswith("not slow")
    return directory, ranks_of(directory, SCENARIOS.keys() - (SLOW if is_quick else ()), 2)


def assert_the_update_of_one(ranks: list[dict], name: str) -> None:
    """Each process made the step that one process makes alone."""
    first, *others = (outcomes[name] for outcomes in ranks)
    alone = outcome(name)
    tolerance = {"bfloat16": 0.05}.get(name, 1e-12)
    assert bool(alone["gradient"].any()) == (name != "nothing to learn")
    assert all(torch.equal(first["weights"], other["weights"]) for other in others)
    for key in ("gradient", "weights"):
        if alone[key].any():
            assert apart(first[key], alone[key]) < tolerance, key
        else:
            assert not first[key].any()
    if name != "bfloat16":  # whose rounding depends on how many rows are computed at once
        assert_close(first["metrics"], alone["metrics"])


@pytest.mark.parametrize("name", quickly(SCENARIOS, SLOW))
def test_two_processes_make_the_update_of_one(two, name):
    assert_the_update_of_one(two[1], name)


@pytest.mark.slow
def test_four_processes_make_the_update_of_one(tmp_path):
    ranks = ranks_of(tmp_path, SCENARIOS, 4)
    for name in SCENARIOS:
        assert_the_update_of_one(ranks, name)


def test_a_run_of_two_processes_writes_the_metrics_of_one(two, tmp_path):
    whole_run(tmp_path / "run")
    assert_same_metrics(two[0] / "run", tmp_path / "run")
    best, same = (read_run(d / "run").summary["best_completions"] for d in (tmp_path, two[0]))
    assert best == [row | {"reward": pytest.approx(row["reward"])} for row in same] != []
    from safetensors.torch import load_file

    both, item = (load_file(d / "run" / "model" / "model.safetensors") for d in (two[0], tmp_path))
    for name, tensor in item.items():
        torch.testing.assert_close(both[name], tensor, atol=1e-9, rtol=0)


@pytest.mark.slow
def test_torchrun_joins_its_processes_where_there_is_no_gpu_and_nothing_says_so(tmp_path):
    program = "-m tokenrl train --max-steps 1 --eval-size 2 --eval-generations 1 --output-dir"
    run = tmp_path / "run"
    done = launch(*TORCHRUN, *program.split(), str(run), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished (") == 1 and (run / "model").is_dir()


@pytest.mark.slow
def test_one_process_that_fails_ends_the_run(tmp_path):
    # a timeout here is a rank that waits for ever
    done = launch(*TORCHRUN, THIS, str(tmp_path), "fail")
    assert done.returncode != 0 and "raised ValueError: on purpose" in done.stdout + done.stderr
    assert not (tmp_path / "run" / "model").exists()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        fork_ranks(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        whole_run(Path(sys.argv[1]) / "run", reward=failing_in_the_second)
