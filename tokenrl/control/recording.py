"""What a control run keeps and shows: records, checkpoints, its end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Spec
from tokenrl.control.policies import Policy
from tokenrl.control.saving import save_policy
from tokenrl.core import rules
from tokenrl.core.presets import preset_name
from tokenrl.errors import Stopped
from tokenrl.runs.checkpoint import latest_checkpoint, replace_directory, save_checkpoint
from tokenrl.runs.console import Progress
from tokenrl.runs.directory import RunDirectory, write_json
from tokenrl.runs.report import report_from_directory

if TYPE_CHECKING:
    from tokenrl.control.setup import Run
    from tokenrl.control.training import ControlResult


def facts(args: ControlArguments, spec: Spec, policy: Policy) -> dict[str, Any]:
    """What the header says of a run."""
    own = sum(p.numel() for p in policy.policy_parameters())
    critic = sum(p.numel() for p in policy.value_parameters())
    layers = " x ".join(map(str, args.hidden)) or "linear"
    actions = f"{spec.actions} actions" if spec.discrete else f"{spec.action_size} continuous actions"
    goal = "" if spec.solved is None else f", solved at {spec.solved:g}"
    estimator = args.estimator
    data = (
        f"one episode of up to {spec.horizon} steps" if args.num_steps is None else f"{args.num_steps} steps"
    )
    return {
        "environment": f"{spec.observation_size} observations, {actions}{goal}",
        "policy": f"{args.head}, {layers} {args.activation if args.hidden else ''}, {own:,} parameters"
        + (f", critic {critic:,}" if critic else ""),
        "estimator": f"{preset_name(estimator)}: baseline {estimator.baseline}, returns {estimator.returns}, "
        f"gamma {estimator.gamma:g}, scale {estimator.scale}, ratio {estimator.ratio}; "
        f"bias: {estimator.bias_status}",
        "step": f"{args.num_envs} environments, {data} each, learning rate {args.learning_rate:g}, "
        f"seed {args.seed}",
        "run": args.output_dir,
    }


def config(args: ControlArguments, spec: Spec) -> dict[str, Any]:
    """config.json: the settings, and what the report and the plot need."""
    values = {name: getattr(args, name) for name in args.__dataclass_fields__}
    typed = Path(sys.argv[0]).name == "tokenrl"
    again = ["control", "--config", f"{args.output_dir}/config.json", "--overwrite"]
    command = shlex.join(["tokenrl", *(sys.argv[1:] if typed else again)])
    title = f"{spec.env}, {preset_name(args.estimator)}, seed {args.seed}"
    return {**values, "title": title, "solved": spec.solved, "command": command}


def record(run: Run, progress: Progress, metrics: dict[str, float]) -> None:
    """Write one update to the log and show it."""
    rate = run.env_steps / max(run.train_seconds, 1e-9)
    if run.log is not None:
        run.log.write(run.step, metrics, {"env_steps_per_second": rate, "cpu_seconds": run.cpu_seconds})
    progress.update(run.step, metrics | {"env_steps_per_second": rate})


def save(run: Run) -> None:
    """Save a checkpoint: the policy, and how far the run has come."""
    state = {
        "step": run.step,
        "env_steps": run.env_steps,
        "running_mean": run.agent.running_mean.state_dict(),
    }

    def write(path: Path) -> None:
        save_policy(run.agent.policy, path, env=run.spec.env)
        write_json(path / "trainer_state.json", state)

    save_checkpoint(run.directory.checkpoints, run.step, write, keep=run.args.keep_checkpoints)


def failed(directory: RunDirectory, error: Stopped) -> Stopped:
    """Name the last good checkpoint in the message of a run that could not go on."""
    last = latest_checkpoint(directory.checkpoints).path
    return Stopped(f"{error} " + (f"The last checkpoint is {last}." if last else "There is no checkpoint."))


def summary(ended: ControlResult) -> dict[str, Any]:
    """summary.json of a run."""
    names = (
        "exit_reason",
        "steps",
        "env_steps",
        "wall_seconds",
        "train_cpu_seconds",
        "eval_before",
        "eval_after",
    )
    rate = {"env_steps_per_second": ended.env_steps_per_cpu_second} if ended.env_steps else {}
    return {name: getattr(ended, name) for name in (*names, "solved", "flags")} | rate


def finish(run: Run, ended: dict[str, Any]) -> None:
    """Save the policy, write summary, plot and report, and show the end."""
    if run.log is not None:
        run.log.close()
    directory, console = run.directory, run.console
    if ended["exit_reason"] != "failed":
        replace_directory(directory.model, lambda path: save_policy(run.agent.policy, path, env=run.spec.env))
    directory.write_summary(ended)
    report_from_directory(directory.path)
    console.finish(ended)
    if "entropy-collapsed" in ended["flags"]:
        console.warn(rules.entropy_collapse_message(run.last_entropy))
    console.note(f"policy  {directory.model}\ncurve   {directory.plot}\nreport  {directory.report}")
