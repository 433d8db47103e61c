"""Every recipe runs, shortened, as a user would run it: as a program, in a folder of its own."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
from command_line import completes
from folders import RECIPES, read_json
from pages import blocks

# by programs of a folder
SHARED = {"own", "intervals", "printed", "survival", "curves", "grid_values"}
SHARED |= {"oracles", "tasks", "formulas", "reversal"}
PROGRAMS = {
    path.stem: path
    for path in sorted(RECIPES.glob("*/*.py"))
    if path.parent.name != "benchmarks" and path.stem not in SHARED
}
# tests/test_distillation_forms.py, tests/test_pretrained_recipe.py, tests/test_trl_estimator.py, tests/test_site.py,
# tests/test_study.py, tests/language/rollout/test_openenv_client.py,
# tests/language/rollout/test_vllm_server.py, tests/control/test_control_training.py,
# tests/test_toy_environments.py and tests/test_molecules.py
ELSEWHERE = {"distillation_forms", "trl_estimator", "build", "reference"}
ELSEWHERE |= {"verify", "openenv_client"}
ELSEWHERE |= {
    "film",
    "turns",
    "code_reward",
    "vllm_server",
    "prior",
    "molopt",
    "acegen_number",
    "figure",
}
ELSEWHERE |= {"nguyen", "search"}  # tests/test_formulas.py
EXACT = {  # a program with its flags, and lines that it prints, as regular expressions
    "1_bandit": (
        "-1.0000   0.2689       1       1   0.7311      0.7311         0.7311       -0.2689   0.4332",
        r"0.0   0.2500 +\S+   0.0625  0.250          0.0250",
        r"128 reward_to_go timestep_mean +\d+\.\d+ +\d+\.\d+ +\d+\.\d+ +0\.5\d\d",
        r"total +none +2.91",
        r"timestep_mean +2.01",
        r"reward_to_go +none +2.89",
        r"timestep_mean +1.99",
        "figure: variance_horizon.png",
    ),
    "prompt_weights": (
        r"variance, half uniform weighted +7\.370 +0\.992\n +inverse +12\.358 +1\.000",
        r"variance +weighted +15\.823 +0\.982",
    ),
    "replay": (r"sequence +0\.565 +0\.000 +0\.075 +0\.353 +0\.641",),
    "looks --comparisons 10": (
        r"normal +0.0 +looks +0\.\d+ \[.*\] +1[0-8]\.\d\n",
        r"ties +2.0 +at once +1.000 \[.*\] +0.000 \[.*\] +18.0\n",
        r"one seed, the higher score +\d\.\d+ +1.000\n",
    ),
    "own_baselines": ("declared exact, .*: exact, .*\ndeclared biased, .*: biased, ",),
    "figures grpo-difficulty": (
        r"limit of large G +31.639 +3.333 +2.000\n",
        r"G = 2 +0.707 +0.707 +0.707\n",
        r"G = 8 +2.471 +2.177 +1.735\n",
        r"G = 64 +7.731 +3.228 +1.968\n",
    ),
    "figures objectives": (
        r"mean reward \(rloo\)  ( +1.000){5}",
        r"pass@4 \(max_at_k\) +3.765 +2.916",
        r"log of success \(maxrl\) +6.594 +5.217",
    ),
    "kl_gradients --problems 2": (
        r"k1 in the reward +0.000 +0.000",
        r"k1 in the loss +1.000",
        r"k3 times the ratio +0\.[1-9]",
        r"the same, discount 1 .* 0.000\n",
        r"beta 0.05, rewards 1 and 2 +0.000",
    ),
    "groups --problems 2": (
        r"p 0.1, group of 4 +0.676 +0.900 +-0.277 +-0.100 +1.000",
        r"at most 4 tokens .* 1.000\n",
        r"are right, mean of each completion +0.949 +0.076 +0.743",
    ),
    "allowed --problems 3 --models 1 --warm 2": (
        r"as sampled +(0\.000 +){3}1\.000 +1\.000 ",
        r"(?s)sequence, none .* 1\.000 .*A schema, 2 steps before.*sequence, none .* 1\.000 ",
        r"the policy +0\.000 +0\.000 +\d\.\d+ +0\.[1-9]",
    ),
    "samplers --noises 0 --problems 5 --sampler.noise 0.5": (
        "none +0.459 ",
        r"none, centred +0.\d+ +0.\d+ +0.000 +0.000 ",
        "token +0.277 ",
        "sequence +0.000 +0.000 +0.[1-9]",
    ),
    "targets --problems 2": (
        r"\ntpo +1 +False +0\.008 +0\.004 ",
        r"\n +True +0\.008 ",
        r"\nrloo +2 +1.000 (?s:.*)\ntpo +2 +0.110 .*\n +4 +0.006 .*\n +8 +-0.048 ",
        r"probable\n.*\n.*\ntpo +4.819 +2.190 +0.996 +0.080 +0.770 +0.150\n",
        r"one wrong\n.*\n.*\ntpo +0.214 +2.103 +0.141 +0.005 +0.968 +0.028\n",
    ),
    "turn_credit --problems 2": (
        "the row's total, RLOO +0.000 +0.000 +1.000",
        "the same with LOO +0.[1-9]",
        "counted as 0 +0.000 +0.000",
        "of its own, own mean +0.[1-9]",
        "leave out the turn only +0.[1-9]",
        "leave out the whole row +0.000 +0.000",
        "number of turns +0.[1-9]",
        "environment's +0.[1-9]",
    ),
}
LADDER = {
    "vanilla": ("none", "exact"),
    "running_mean": ("running_mean", "exact"),
    "rloo": ("rloo", "exact"),
    "grpo": ("group_mean", "biased"),
}
TRAINED = {
    **{
        f"ladder {rung} --max-steps 2 --shift 1": (
            rf"bias of the gradient: {bias} \(",
            r"greedy: \d",
        )
        for rung, (_, bias) in LADDER.items()
    },
    "train_lm --max-steps 2 --prompts-per-step 2 --lora-r 2": (r"reward_greedy: -?\d",),
    "filter_by_difficulty --prompts 32 --samples 2 --low 0 --max-steps 2": (),
}
"""Programs that leave a run, in words that `runs` of it holds too."""
LEARNING = {
    "reinforce_one_page": (r"greedy reward 0\.[0-2](.*\n)+.*greedy reward (0\.[89]|1)",),
    "2_gridworld --seeds 1 --updates 3 --stages 0": ("vanilla", "after   0 updates"),
    "entropy --seeds 2 --updates 2 --betas 0 1": (
        r"(?s)sweet spot: .*sweet spot: ",
        r"\n +1 .*goal \d, decoy \d, neither \d\n",
    ),
    "3_numpy --seeds 0 1 --episodes 100 --vary window=5 gamma=1,standardise=False": (
        "REINFORCE, 2 seeds: a mean of 475 in 0 of 2 seeds, median never",
        "gamma=1,standardise=False, 2",
    ),
    "4_walk --seeds 1 --episodes 8": ("raw, V         last ",),
    "5_agents --env CartPole-v1 Pendulum-v1 --seeds 2 1 --max-steps 1": (
        r"\nCartPole-v1, classic: .*\n  mean .*, 0 of 2 seeds reach 475\n",
        r"\nPendulum-v1, tuned: -\S+\n  mean [^,]+, [^,]+\n",
    ),
    "5_agents --env Acrobot-v1 --agent tuned --seeds 1": ("1 of 1 seeds reach",),
    "5_agents --env LunarLander-v3 --agent tuned --seeds 1": ("1 of 1 seeds reach",),
    "contrast --seeds 1 --updates 10 --steps 10": (
        r"seed 0, CartPole-v1, without .*: reward \d",
        r"\|g\|² is \S+ times as large on CartPole-v1 and \S+ .* sort_digits",
    ),
    "pass_at_k --task hidden --seeds 3 --max-steps 1": ("±",),
    "pass_at_k --task difficulty --seeds 3 --max-steps 1": ("±",),
    "distillation --arms rloo opd_full_path --seeds 2 --max-steps 10 --teacher-steps 2": (
        r"rloo +area 0\.\d+\nopd_full_path +area 0\.\d+\n",
    ),
    "distillation --task reverse_text --own --arms rloo opd_full --seeds 2 --max-steps 10 "
    "--teacher-steps 2": (r"After equal seconds:\nrloo +area 0\.\d+\nopd_full +area 0\.\d+\n",),
    "sampler_mismatch --task vowels --mismatches old=2 bits=4 --corrections sequence --seeds 2 "
    "--max-steps 2": (
        r"same none .* \S+e-(0[6-9]|1\d) ",
        r"old=2 sequence .* \S+e-0[123] ",
        r"bits=4 sequence .* \S+e-0[12] ",
    ),
    "logged_rows --tasks vowels --seeds 2 --max-steps 2": (
        r"vowels +better +reinforce +(0\.\d+ *){4}\n",
    ),
    "rlhf_pipeline --pairs 24 --max-steps 2 --eval-prompts 3": (
        r"base, sampled .* ± .* ± ",
        r"best of 64 .* ± .* ± ",
        r"RL, greedy .* ± ",
    ),
    "overoptimisation --seeds 2 --max-steps 5 --pool 16": ("seed 1: accuracy", "best-of-n "),
}
NEEDED = {"LunarLander-v3": "Box2D"}
AGAIN = ("distillation", "sampler_mismatch")  # read the runs that they have made


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, handlers):
    """Runs a program with its flags, checks what it prints and draws, and returns the former."""

    def printed(command: str, *lines: str) -> str:
        name, *flags = command.split()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *flags])
        runpy.run_path(str(PROGRAMS[name]), run_name="__main__")
        out = capsys.readouterr().out
        for line in lines:
            assert re.search(line, out), f"{line}\n{out}"
        for figure in re.findall(r"figure: (\S+)", out):
            assert (tmp_path / figure).stat().st_size > 1000, figure
        return out

    return printed


@pytest.mark.parametrize("command", EXACT)
def test_what_is_computed_exactly(command, run):
    assert run(command, *EXACT[command])


@pytest.mark.slow
@pytest.mark.parametrize("command", LEARNING)
def test_what_trains(command, run, short_warm_start):
    for flag, package in NEEDED.items():
        if flag in command:
            pytest.importorskip(package)
    out = run(command, *LEARNING[command])
    if command.startswith(AGAIN):
        assert run(command) == out


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINED)
def test_a_recipe_leaves_a_complete_run(command, run, short_warm_start, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, rung, *_ = command.split()
    run(command, *TRAINED[command])
    (folder,) = (tmp_path / "runs").glob("*")
    summary = read_json(folder / "summary.json")
    assert (summary["exit_reason"], summary["steps"]) == ("finished", 2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(line["reward"]) for line in lines[1:])
    assert (folder / "report.html").stat().st_size > 1000
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(tokenizer)
    if name == "ladder":
        config = read_json(folder / "config.json")
        assert config["estimator"]["baseline"] == LADDER[rung][0]
        assert 1 <= summary["eval_after"]["reward_greedy"] <= 2  # shifted by 1
    if name == "train_lm":
        assert {"rewards/alternates/mean", "rewards/six_long/mean"} <= set(lines[-1])


def test_every_recipe_says_from_what_uv_makes_its_environment():
    tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")
    project = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text())["project"]
    for path in RECIPES.rglob("*.py"):
        if path.stem in SHARED:
            continue
        (block,) = re.findall(r"(?m)^# /// script\n((?:# .*\n)+)# ///$", path.read_text())
        header = tomllib.loads(re.sub("(?m)^# ", "", block))
        name, _, extra = header["dependencies"][0].rstrip("]").partition("[")
        assert name == project["name"]
        assert {*extra.split(",")} <= {"", *project["optional-dependencies"]}
        source = path.parent / header["tool"]["uv"]["sources"][name]["path"]
        assert source.resolve() == RECIPES.parent


def test_every_recipe_is_in_the_list_with_its_command_and_is_run():
    text = (RECIPES / "README.md").read_text()
    paths = {str(path.relative_to(RECIPES)) for path in PROGRAMS.values()}
    for pattern in (r"\]\((\w+/\w+\.py)\)", r"python recipes/(\w+/\w+\.py)"):
        assert {name for name in re.findall(pattern, text) if "benchmarks" not in name} == paths
    without = [path.name for path in PROGRAMS.values() if "tyro" not in path.read_text()]
    assert f"All have `--help` but {' and '.join(f'`{name}`' for name in without)}," in text
    notebooks = {path.name for path in RECIPES.glob("*.ipynb")}  # tests/test_pages.py
    assert set(re.findall(r"\]\((\w+\.ipynb)\)", text)) == notebooks
    here = {command.split()[0] for command in (*EXACT, *TRAINED, *LEARNING)}
    assert here | {"answers", "estimators_table"} | ELSEWHERE == set(PROGRAMS)


def test_one_page_is_one_page_of_torch_and_core():
    text = PROGRAMS["reinforce_one_page"].read_text()
    assert len(re.sub("# /// script.*# ///\n\n", "", text, flags=re.DOTALL).splitlines()) < 160
    modules = set(re.findall(r"^(?:from|import) ([\w.]+)", text, re.MULTILINE))
    allowed = {"dataclasses", "torch", "tyro", "transformers", "toy_tasks", "tokenrl"}
    assert modules <= {*allowed, "tokenrl.core"}
    named = re.findall(r"^from tokenrl import (.*)|^(import tokenrl)\b", text, re.MULTILINE)
    assert set(named) <= {("Estimator", "")}  # which is of core


def test_a_turn_is_found_where_gold_falls_and_the_proxy_rises_and_only_there():
    import numpy as np

    study = runpy.run_path(str(PROGRAMS["overoptimisation"]))
    draw = np.random.default_rng(0)
    d = np.linspace(0.2, 4, 20) + 0.01 * draw.normal(size=(5, 20))
    gold = d * (2 - d / 2) + 0.02 * draw.normal(size=(5, 20))
    turning = study["turn"](d, d, gold)
    means = [turning[key][0] for key in ("d", "gold", "proxy")]
    assert turning["fell"] == 5 and means == pytest.approx([2, -2, 2], abs=0.3)
    assert study["turn"](d, d, d)["fell"] == study["turn"](d, -d, gold)["fell"] == 0


def test_the_page_of_defaults_says_what_the_code_does(run, tmp_path, said):
    from tokenrl import Estimator
    from tokenrl.core import PRESETS

    page, path = RECIPES / "pages" / "explain" / "defaults.md", tmp_path / "defaults.md"
    words = f"--page {page} --output {path} --figure {tmp_path / 'd.png'}"
    run(f"estimators_table {words} --estimators nanochat trl_rloo")
    lines = page.read_text().splitlines()
    presets = [line.split("`")[1] for line in lines if re.match(r"\| `\w+` \| \w+ / \w+ \|", line)]
    toolkits = {name: preset for name, preset in PRESETS.items() if preset.beyond}
    assert presets == [*toolkits, "dr_grpo", "rloo"]
    for name in presets:
        e = Estimator.preset(name)
        kl = f"{e.kl_estimator} in the {e.kl_placement}, {e.beta:g}" if e.beta else "none"
        aggregation = e.aggregation + ", zero spread dropped" * (e.zero_spread == "drop")
        axes = f"| `{name}` | {e.baseline} / {e.scale} | {aggregation} | {e.ratio} | {kl} | "
        assert any(line.startswith(axes) for line in lines), axes
    written = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    assert len(written) == 2 and set(written) < set(lines)
    ((_, settings, _),) = [block for block in blocks(page) if block[0] == "yaml"]
    Path("grpo.yaml").write_text(settings)
    completes("lab exact --trl-config grpo.yaml")
    ((_, _, output),) = [block for block in blocks(page) if "--trl-config" in block[1]]
    assert " ".join(output.split()) in said()


def test_the_table_of_estimators_has_the_rows_of_the_page(run, tmp_path):
    path = tmp_path / "table.md"
    run(f"estimators_table --output {path} --figure {tmp_path / 'm.png'} --estimators rloo grpo")
    page = (RECIPES / "pages" / "explain" / "estimators.md").read_text().splitlines()
    rows = [line for line in page if line.startswith("| `")]
    others = [line for line in rows if not re.match(r"\| `(rloo|grpo)` ", line)]
    assert path.read_text().splitlines() == [line for line in page if line not in others]
