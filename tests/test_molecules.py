"""The recipes on molecules: what needs neither MolScore nor RDKit, and a little that is skipped without them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import molopt
import pandas as pd
import prior
import pytest

from toy_tasks.models import tiny_llama

TEXTS = ["CC(=O)Nc1ccc(Br)cc1", "C[C@@H](N)C(=O)[O-]", "ClC1CC%12CC1/C=C\\%12", "[nH]1cnnc1"]


class Oracle:
    """MolScore in small: a molecule is a text of C alone, and its score a tenth of its length."""

    def __init__(self) -> None:
        self.main_df = pd.DataFrame()
        self.written = False

    def score(self, smiles, flt):
        assert flt
        seen = [*self.main_df.get("smiles", []), *smiles]
        valid = [str(bool(text) and not text.strip("C")).lower() for text in smiles]
        unique = [
            str(text not in seen[: -len(smiles) + n]).lower() for n, text in enumerate(smiles)
        ]
        rows = pd.DataFrame({"smiles": smiles, "valid": valid, "unique": unique})
        self.main_df = pd.concat([self.main_df, rows], ignore_index=True)
        return [0.1 * len(text) for text in smiles]

    def write_scores(self):
        self.written = True

    def compute_metrics(self, budget, benchmark, chemistry_filter_basic):
        return {molopt.SCORE: float(budget), "Valid": 1.0, "Unique": 1.0}


def test_smiles_are_cut_into_atoms_bonds_and_rings_and_read_back():
    tokenizer = prior.smiles_tokenizer(TEXTS)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    cut = tokenizer.convert_ids_to_tokens(tokenizer(TEXTS[2])["input_ids"])
    assert cut == ["Cl", *"C1CC", "%12", *"CC1/C=C\\", "%12"]
    assert tokenizer("C[C@@H]Br", add_special_tokens=False)["input_ids"] == [
        tokenizer.convert_tokens_to_ids(token) for token in ("C", "[C@@H]", "Br")
    ]
    assert tokenizer(prior.START)["input_ids"] == [tokenizer.bos_token_id] == [2]
    assert tokenizer.convert_ids_to_tokens(tokenizer("I")["input_ids"]) == [prior.UNKNOWN]


def test_shares_count_molecules_and_not_texts(monkeypatch):
    monkeypatch.setattr(prior, "canonical", {"CO": "CO", "OC": "CO", "CN": "CN", "C": "C"}.get)
    numbers = prior.shares(["CO", "OC", "CN", "C", "C(", ""], ["CN", "N"])
    assert numbers == {"valid": 4 / 6, "unique": 3 / 4, "new": 2 / 3}
    assert prior.shares(["C("], []) == {"valid": 0.0, "unique": 0.0, "new": 0.0}


def test_a_prior_is_trained_once_and_measured_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prior, "canonical", lambda text: text or None)
    data = tmp_path / "a.smi"
    data.write_text("\n".join(f"{text} name" for text in TEXTS * 8) + f"\n\n{'C' * 200}")
    sizes = {"layers": 1, "hidden": 16, "max_steps": 2, "batch_size": 2, "samples": 7, "threads": 1}
    args = prior.Args(data, **sizes, output_dir=tmp_path / "prior")
    prior.main(args)
    rows = (args.output_dir / "molecules.jsonl").read_text().splitlines()
    assert sorted(json.loads(row)["completion"] for row in rows) == sorted(TEXTS)
    first = capsys.readouterr().out
    prior.main(args)
    again = capsys.readouterr().out
    assert "loss" in first and "loss" not in again
    assert first.splitlines()[-1] == again.splitlines()[-1] != "" and "7 completions" in again


def test_text_that_is_no_molecule_is_rewarded_with_zero_and_counted():
    scorer, logged = molopt.Scorer(Oracle()), {}
    columns = {"log_metric": logged.__setitem__, "prompts": [prior.START] * 4}
    assert scorer(["CC", "C(", "CC", "N"], [True] * 4, **columns) == [0.2, 0, 0.2, 0]
    assert scorer.refused == 2 and logged == {"valid": 0.5, "unique": 0.75}
    assert scorer(["C", "C"], [False] * 2, **columns) == [None, None]
    assert len(scorer.molscore.main_df) == 4  # an evaluation takes nothing from the budget


def test_a_task_spends_its_budget_and_says_where_the_seconds_went(tmp_path):
    tokenizer = prior.smiles_tokenizer(TEXTS)
    for part in (tiny_llama(tokenizer, layers=1, hidden=16, context=128), tokenizer):
        part.save_pretrained(tmp_path / "prior")
    settings = ("estimator=rloo,beta=0.5", "learning_rate=1e-4")
    args = molopt.Args(settings, budget=10, batch=4, prior=tmp_path / "prior")
    oracle = Oracle()
    row = molopt.optimise(args, oracle, 3, tmp_path / "run")
    assert row[molopt.SCORE] == args.budget and oracle.written
    assert row["molecules"] == len(oracle.main_df) == 12  # whole steps
    assert row["refused"] == (oracle.main_df["valid"] == "false").sum()
    assert all(row[name] > 0 for name in ("sampling", "scoring", "updating"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["seed"], config["learning_rate"], config["num_generations"]) == (3, 1e-4, 4)
    assert (config["estimator"]["baseline"], config["estimator"]["beta"]) == ("rloo", 0.5)


def test_results_are_kept_a_gap_stays_empty_and_machines_join(tmp_path, capsys):
    counts = {"molecules": 10, "sampling": 1, "scoring": 2, "updating": 2}
    made = []

    def open_task(args, task, folder):
        folder.mkdir(parents=True)
        if task == "DRD2":
            raise ValueError("its pickle is of another release")
        return task

    def optimise(args, molscore, seed, folder):
        made.append((molscore, seed))
        return {molopt.SCORE: 0.1 * seed + (0.5 if args.name == "rloo" else 0), **counts}

    here, there = tmp_path / "here", tmp_path / "there"
    tasks = ["DRD2", "QED"]
    for folder, name, seeds in (
        (here, "none", (1, 2)),
        (here, "none", (1, 2, 3)),
        (there, "rloo", (1,)),
    ):
        args = molopt.Args(name=name, seeds=seeds, output_dir=folder)
        molopt.run(args, tasks, open_task, optimise)
    assert made == [("QED", 1), ("QED", 2), ("QED", 3), ("QED", 1)]
    printed = capsys.readouterr().out
    assert "DRD2 is a gap" in printed and "another release" in printed
    assert "2 molecules per second" in printed
    table = molopt.summary([here, there, here], tasks)
    assert table.loc["QED", ("none", "mean")] == pytest.approx(0.2)
    assert table.loc["QED", ("none", "half")] == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert table.loc["QED", "rloo"][["mean", "seeds"]].tolist() == [0.6, 1]
    assert table.loc["DRD2"].isna().all()


def test_acegens_rows_are_all_there_and_its_totals_hold_a_task_more():
    table = pd.read_csv(molopt.ACEGEN, index_col="task")
    published = [13.67, 13.60, 15.65, 13.91, 14.27, 14.65, 15.80]
    assert len(table) == 22 and table.notna().all(axis=None)
    assert (published - table.sum()).round(2).tolist() == [0.69, 0.72, 0.8, 0.71, 0.75, 0.72, 0.74]


def test_molscore_scores_a_task_and_names_an_oracle_that_it_cannot_load(tmp_path):
    pytest.importorskip("molscore")
    args = SimpleNamespace(benchmark="MolOpt", budget=4)
    scorer = molopt.Scorer(molopt.open_task(args, "QED", tmp_path / "QED"))
    smiles = ["CC(=O)Nc1ccc(O)cc1", "c1cc", "C"]
    values = scorer(smiles, [True] * 3, lambda name, value: None)
    assert values == pytest.approx([0.595, 0, 0.36], abs=0.001) and scorer.refused == 1
    with pytest.raises(ValueError, match="conda"):
        molopt.open_task(args, "DRD2", tmp_path / "DRD2")
