"""The recipes on molecules, without MolScore and RDKit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import acegen_number
import figure
import molopt
import numpy as np
import pandas as pd
import prior
import pytest

import tokenrl
from toy_tasks.models import tiny_llama

TEXTS = ["CC(=O)Nc1ccc(Br)cc1", "C[C@@H](N)C(=O)[O-]", "ClC1CC%12CC1/C=C\\%12", "[nH]1cnnc1"]


class Oracle:
    """MolScore in small: a molecule is a text without brackets."""

    main_df, step, calls_left = None, 0, 99

    def score(self, smiles, flt):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyboardInterrupt
        self.step += 1
        valid = ["false" if set(text) & set("()[]") else "true" for text in smiles]
        earlier = [] if self.main_df is None else list(self.main_df["smiles"])
        earlier += smiles
        copies = [text in earlier[: i - len(smiles)] for i, text in enumerate(smiles)]
        unique = ["false" if is_copy else "true" for is_copy in copies]
        columns = {"smiles": smiles, "valid": valid, "unique": unique, "step": self.step}
        rows = pd.DataFrame(columns)
        self.main_df = pd.concat([self.main_df, rows], ignore_index=True)
        return [0.1 * len(text) for text in smiles]

    def update_maxmin(self, rows):
        self.most = rows["step"].max()

    def write_scores(self):
        pass

    def compute_metrics(self, budget, **options):
        return {acegen_number.OWN: budget}


def test_smiles_are_cut_into_atoms_bonds_and_rings_and_read_back():
    tokenizer = prior.smiles_tokenizer(TEXTS)
    for text in [*TEXTS, prior.BOS]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    ids = tokenizer(prior.BOS + TEXTS[2])["input_ids"]
    pieces = [prior.BOS, "Cl", *"C1CC", "%12", *"CC1/C=C\\", "%12"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces and ids[0] == tokenizer.bos_token_id


def test_the_shares_of_a_prior_count_molecules(monkeypatch):
    own = {"CO": "CO", "OC": "CO", "CN": "CN", "N": "N"}
    monkeypatch.setattr(prior, "canonical", own.get)
    expected = {"valid": 0.8, "unique": 0.75, "new": pytest.approx(1 / 3)}
    assert prior.shares(["CO", "OC", "CN", "C(", "N"], ["CO", "N"]) == expected


def test_a_prior_that_was_stopped_goes_on_and_one_of_another_shape_is_refused(
    tmp_path, monkeypatch, capsys
):
    """A run that was stopped has a summary too."""
    codes = [130, 0]

    def sft(output_dir, **_):
        Path(output_dir).mkdir(exist_ok=True)
        Path(output_dir, "summary.json").touch()
        return SimpleNamespace(exit_code=codes.pop(0))

    monkeypatch.setattr(prior, "canonical", str)
    monkeypatch.setattr(prior.tokenrl, "sft", sft)
    monkeypatch.setattr(prior.tokenrl, "load_policy", lambda _: SimpleNamespace(size=9))
    monkeypatch.setattr(prior, "sample_pool", lambda *_: [TEXTS])
    molecules = tmp_path / "mine.smi"
    molecules.write_text("\n".join(TEXTS))
    shape = {"data": molecules, "layers": 1, "hidden": 8, "output_dir": tmp_path / "prior"}
    with pytest.raises(SystemExit, match="was stopped; the same command goes on"):
        prior.main(**shape)
    prior.main(**shape)
    assert "9 parameters" in capsys.readouterr().out and not codes
    with pytest.raises(SystemExit, match=r"is of layers=1 .* layers=2"):
        prior.main(**shape | {"layers": 2})
    molecules.write_text(TEXTS[0])
    with pytest.raises(SystemExit, match="needs another folder"):
        prior.main(**shape)


@pytest.mark.slow
def test_a_task_spends_its_budget_and_a_run_that_broke_off_goes_on(tmp_path):
    tokenizer = prior.smiles_tokenizer(TEXTS)
    for part in (tiny_llama(tokenizer, layers=1, hidden=16, context=128), tokenizer):
        part.save_pretrained(tmp_path / "prior")
    settings = ("estimator=rloo,beta=0.5", "save_every=1")
    args = molopt.Args(settings, budget=10, batch=4, unit="samples", prior=tmp_path / "prior")
    row = molopt.optimise(args, oracle := Oracle(), 3, tmp_path / "run")
    assert row[acegen_number.OWN] == 10 and len(oracle.main_df) == 12  # whole steps
    assert row["refused by RDKit"] == (oracle.main_df["valid"] == "false").sum() > 0
    assert min(row[f"seconds of {name}"] for name in ("sampling", "scoring", "updating")) > 0
    broken, again = Oracle(), Oracle()
    broken.calls_left = 2
    with pytest.raises(KeyboardInterrupt):
        molopt.optimise(args, broken, 3, tmp_path / "broken")
    molopt.optimise(args, again, 3, tmp_path / "broken")
    assert again.main_df.equals(oracle.main_df) and again.most == 2
    texts = molopt.optimise(
        replace(args, unit="texts", budget=9), other := Oracle(), 3, tmp_path / "texts"
    )
    assert texts["counted"] == len(other.main_df) >= 9 > other.main_df["step"].ne(other.step).sum()


UNITS = {  # the rewards of two batches, and what they count
    "texts": ([0.04, None, 0, 0.04, 0.02, None, 0.09], 5),
    "samples": ([0.04, 0.02, 0, 0.04, 0.02, 0.02, 0.09], 7),
    "molecules": ([0.04, 0.02, 0, 0.04, 0.02, 0.02, 0.09], 3),
}


@pytest.mark.parametrize("unit", UNITS)
def test_a_budget_counts_texts_of_a_batch_samples_or_molecules(unit):
    rewards, count = UNITS[unit]
    args = molopt.Args(unit=unit, budget=count, power=2, repeats=0.5)
    scorer = molopt.Scorer(Oracle(), args)
    batches = (["CC", "CC", "C(", "CO"], ["CC", "CC", "CCC"])
    earned = [reward for batch in batches for reward in scorer(batch, lambda *metric: None)]
    assert earned == pytest.approx(rewards) and len(scorer.counted()) == count
    with pytest.raises(tokenrl.Finished, match=f"{count} {unit} counted"):
        scorer(["N"], lambda *metric: None)


def test_results_are_kept_a_gap_is_left_out_and_machines_join(tmp_path, capsys, monkeypatch):
    def open_task(args, task, folder):
        folder.mkdir(parents=True)
        (folder / "scores.csv").write_text("smiles,valid,unique,single\nCC,true,true,0.75")
        if task == "DRD2":
            raise ValueError("its pickle is of another release")

    releases = {"molscore": "1.9.5", "rdkit": "2026.9.1", "tokenrl-lm": "1"}
    monkeypatch.setattr(molopt, "version", releases.get)
    weights = tmp_path / "prior" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    weights.with_name("tokenizer.json").write_text("{}")
    made, folders = [], (tmp_path / "here", tmp_path / "there")
    for folder, seeds in ((0, (1, 2)), (0, (1, 2, 3)), (1, (4,))):
        args = molopt.Args(
            name="a", seeds=seeds, output_dir=folders[folder], prior=tmp_path / "prior"
        )
        args.output_dir.mkdir(exist_ok=True)
        optimise = lambda *of: made.append(of[2]) or {acegen_number.OWN: 0.1 * of[2]}  # noqa: E731
        molopt.run(args, ["DRD2", "QED"], open_task, optimise)
    assert made == [1, 2, 3, 4] and "DRD2, seed 4: a gap" in capsys.readouterr().out
    again = partial(molopt.run, tasks=["Ranolazine_MPO"], open_task=open_task, optimise=optimise)
    for other in (replace(args, budget=500), replace(args, benchmark="GuacaMol")):
        with pytest.raises(SystemExit, match=r"is of batch=128 .* or --name"):
            again(other)
    for change in (lambda: weights.write_bytes(b"others"), lambda: releases.update(rdkit="2023")):
        change()
        with pytest.raises(SystemExit, match="or --name"):
            again(args)
        weights.write_bytes(b"weights")
    table = acegen_number.main(folders).loc[("a", "QED")]
    columns = ["1.9.5", "1.5.5", "sem", "seeds", "PPO"]
    assert table[columns].tolist() == pytest.approx([0.25, 0.75, 0, 4, 0.94])
    assert "a     0.750  0.250      4" in capsys.readouterr().out  # the sum
    drawn = []
    monkeypatch.setattr(figure, "draw_molecule", lambda axes, row: drawn.append(row.to_dict()))
    figure.main(folders, output=tmp_path / "best.png")
    assert (tmp_path / "best.png").exists()
    assert drawn == [{"smiles": "CC", "valid": True, "unique": True, "score": 0.75}]


def test_the_number_of_acegen_counts_copies_and_text_that_is_no_molecule():
    """A curve that rises from 0 to its mean within the first 100 rows has 50 of these."""
    best = np.r_[np.ones(200), np.zeros(900)]
    assert acegen_number.area(best, 1000) == pytest.approx(0.95)
    assert acegen_number.area(best[:500], 1000) == pytest.approx(0.95)
    assert acegen_number.area(1 - best, 1000) == pytest.approx(0.751)  # 1 of 100 at row 200
