"""The recipes on molecules, without MolScore and RDKit but for one test."""

from __future__ import annotations

import json

import molopt
import pandas as pd
import prior
import pytest

from toy_tasks.models import tiny_llama

TEXTS = ["CC(=O)Nc1ccc(Br)cc1", "C[C@@H](N)C(=O)[O-]", "ClC1CC%12CC1/C=C\\%12", "[nH]1cnnc1"]


class Oracle:
    """MolScore in small: a molecule is a text without brackets."""

    main_df = pd.DataFrame()

    def score(self, smiles, flt):
        valid = ["false" if set(text) & set("()[]") else "true" for text in smiles]
        self.main_df = pd.concat([self.main_df, pd.DataFrame({"valid": valid})], ignore_index=True)
        return [0.1 * len(text) for text in smiles]

    def write_scores(self):
        pass

    def compute_metrics(self, budget, **options):
        return {molopt.SCORE: budget}


def test_smiles_are_cut_into_atoms_bonds_and_rings_and_read_back():
    tokenizer = prior.smiles_tokenizer(TEXTS)
    for text in [*TEXTS, prior.START]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    ids = tokenizer(prior.START + TEXTS[2])["input_ids"]
    pieces = [prior.START, "Cl", *"C1CC", "%12", *"CC1/C=C\\", "%12"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces and ids[0] == tokenizer.bos_token_id


def test_a_prior_is_trained_once_and_its_shares_count_molecules(tmp_path, monkeypatch, capsys):
    written = iter([["CO", "OC", "CN", "C(", "N"]] * 2)
    monkeypatch.setattr(prior, "sample_pool", lambda *args: [next(written)])
    monkeypatch.setattr(
        prior, "canonical", lambda text: None if text == "C(" else min(text, text[::-1])
    )
    (data := tmp_path / "a.smi").write_text("CO methanol\nOC\n\nN\nC(\n")
    sizes = {"layers": 1, "hidden": 16, "max_steps": 2, "batch_size": 2}
    for trains in (True, False):
        prior.main(prior.Args(data, **sizes, output_dir=tmp_path / "prior"))
        printed = capsys.readouterr().out
        assert ("2 updates x 2" in printed) == trains
        assert "{'valid': 0.8, 'unique': 0.75, 'new': 0.333}" in printed
    rows = (tmp_path / "prior" / "molecules.jsonl").read_text().splitlines()
    assert [json.loads(row)["completion"] for row in rows] == ["CO", "N"]


def test_a_task_spends_its_budget_and_no_more_on_evaluations(tmp_path):
    tokenizer = prior.smiles_tokenizer(TEXTS)
    for part in (tiny_llama(tokenizer, layers=1, hidden=16, context=128), tokenizer):
        part.save_pretrained(tmp_path / "prior")
    args = molopt.Args(("estimator=rloo,beta=0.5",), budget=10, batch=4, prior=tmp_path / "prior")
    row = molopt.optimise(args, oracle := Oracle(), 3, tmp_path / "run")
    assert row[molopt.SCORE] == 10 and len(oracle.main_df) == 12  # whole steps
    assert row["refused by RDKit"] == (oracle.main_df["valid"] == "false").sum() > 0
    assert min(row[f"seconds of {name}"] for name in ("sampling", "scoring", "updating")) > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["seed"], config["estimator"]["beta"]) == (3, 0.5)
    metrics = []
    values = molopt.Scorer(oracle)(["CC", "C("], [True] * 2, lambda *metric: metrics.append(metric))
    assert values == [0.2, 0] and metrics == [("valid", 0.5)]


def test_results_are_kept_a_gap_stays_empty_and_machines_join(tmp_path, capsys):
    made = []

    def open_task(args, task, folder):
        folder.mkdir(parents=True)
        if task == "DRD2":
            raise ValueError("its pickle is of another release")

    def optimise(args, molscore, seed, folder):
        made.append((args.name, seed))
        return {molopt.SCORE: 0.1 * seed}

    folders = tmp_path / "here", tmp_path / "there"
    for folder, name, seeds in (
        (0, "a", (1, 2)),
        (0, "a", (1, 2, 3)),
        (1, "a", (3, 4)),
        (1, "b", (5,)),
    ):
        args = molopt.Args(name=name, seeds=seeds, output_dir=folders[folder])
        args.output_dir.mkdir(exist_ok=True)
        molopt.run(args, ["DRD2", "QED"][1 - (seeds == (5,)) :], open_task, optimise)
    assert made == [*(("a", seed) for seed in (1, 2, 3, 3, 4)), ("b", 5)]
    for folder in folders:
        args = molopt.Args(name="a", seeds=(3,), budget=500, output_dir=folder)
        with pytest.raises(SystemExit, match="made with budget=10000"):
            molopt.run(args, ["QED"], open_task, optimise)
    assert "DRD2, seed 5: a gap" in (printed := capsys.readouterr().out) and "release" in printed
    table = molopt.summary(folders, ["DRD2", "QED"])
    values = [table.loc["QED", (name, "a")] for name in ("mean", "sem", "count")]
    assert values == pytest.approx([0.25, (5 / 300) ** 0.5 / 2, 4])
    assert table.loc["DRD2"].isna().all() and table.loc["QED", ("mean", "b")] == 0.5


def test_molscore_scores_a_task_and_an_oracle_that_it_cannot_load_is_an_error(tmp_path):
    pytest.importorskip("molscore")
    scorer = molopt.Scorer(molopt.open_task(molopt.Args(), "QED", tmp_path / "QED"))
    values = scorer(["CC(=O)Nc1ccc(O)cc1", "c1cc", "C"], [True] * 3, lambda *metric: None)
    assert values == pytest.approx([0.595, 0, 0.36], abs=0.001)
    with pytest.raises(ValueError, match="conda"):
        molopt.open_task(molopt.Args(), "DRD2", tmp_path / "DRD2")
