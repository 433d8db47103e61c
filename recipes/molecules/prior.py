"""Train a prior over molecules: a small language model that writes SMILES like those of a file.

    python recipes/molecules/prior.py                                       MolScore's sample, 1.2 M parameters
    python recipes/molecules/prior.py --data mine.smi --output-dir runs/mine    molecules of your own
    python recipes/molecules/prior.py --layers 4 --hidden 256 --output-dir runs/large

The sample has 300,819 SMILES, without stereochemistry, phosphorus and iodine; training reads them about twice.
A run that was stopped or killed goes on where it was saved when the command is repeated; one that has ended is
only measured again. A folder is of one set of molecules, one shape and one seed. `molopt.py` optimises molecules
from the result.

A tokenizer cuts SMILES by the regular expression of Schwaller et al., "Molecular Transformer: A Model for
Uncertainty-Calibrated Chemical Reaction Prediction", ACS Central Science 5 (2019), 1572. Each token that occurs
in the molecules is one of the vocabulary; the model has no other.

Look for: the shares of valid completions, of distinct molecules among the valid ones, and of new molecules
among these. The defaults gave .875, 1.000 and .982.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[molecules]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro

import tokenrl
from tokenrl.language import Sampling, sample_pool
from toy_tasks.models import tiny_llama

BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"
"""The first token of every molecule, whose prompt is empty; its last token; and one for other text."""
TOKEN = (
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$"
    r"|%[0-9]{2}|[0-9]"
)
"""A token of SMILES: an atom, a bond, a branch or the digit of a ring (Schwaller et al. 2019)."""
LONGEST = 126
"""The most tokens of a molecule. Its start and its end make them 128, the model's context."""


def smiles_tokenizer(molecules: Iterable[str]) -> Any:
    """Return a tokenizer with a start, an end, and the tokens that occur in SMILES of molecules."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = sorted({token for smiles in molecules for token in re.findall(TOKEN, smiles)})
    numbers = {token: number for number, token in enumerate([EOS, UNKNOWN, BOS, *tokens])}
    backend = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    backend.decoder = decoders.Fuse()
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


def canonical(smiles: str) -> str | None:
    """Return RDKit's own SMILES of a molecule, or None where RDKit refuses it."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return Chem.MolToSmiles(molecule) if smiles and molecule else None


def in_molscore(path: str) -> Path:
    """Return the path of a file or folder of MolScore, which takes seconds to import."""
    return Path(importlib.util.find_spec("molscore").origin).parent / path  # type: ignore[union-attr, arg-type]


def digest(paths: Iterable[Path]) -> str:
    """Return 12 digits of a hash of what files hold."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def claim(folder: Path, words: str) -> None:
    """Write into a folder what decides all that is in it.

    Raises:
        SystemExit: The folder is of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = folder / "origin.txt"
    if not origin.exists():
        origin.write_text(words)
    if (other := origin.read_text()) != words:
        raise SystemExit(
            f"{folder} is of {other}; {words} needs another folder: --output-dir, or --name of molopt.py."
        )


def read_molecules(path: Path) -> list[str]:
    """Return the canonical SMILES of distinct molecules of a file, the first word of each line."""
    lines = path.read_text().split("\n")
    molecules = {canonical(words[0]) for line in lines if (words := line.split())}
    return sorted(smiles for smiles in molecules if smiles and len(smiles) < LONGEST)


def shares(completions: Sequence[str], learnt: Iterable[str]) -> dict[str, float]:
    """Return the shares of valid completions, of distinct molecules among these, and of new ones among these."""
    valid = list(filter(None, map(canonical, completions)))
    distinct = set(valid)
    return {
        "valid": len(valid) / len(completions),
        "unique": len(distinct) / max(1, len(valid)),
        "new": len(distinct.difference(learnt)) / max(1, len(distinct)),
    }


def prepare(start: Path, data: Path, smiles: Path, seed: int, **shape: int) -> None:
    """Write the molecules as demonstrations, and a new model."""
    molecules = read_molecules(smiles)
    start.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"prompt": "", "completion": molecule}) for molecule in molecules)
    data.write_text("\n".join(rows))
    tokenizer = smiles_tokenizer(molecules)
    tiny_llama(tokenizer, seed=seed, context=LONGEST + 2, **shape).save_pretrained(start)
    tokenizer.save_pretrained(start)  # at last, as its presence says that all is there


def main(
    data: Path | None = None,
    layers: int = 3,
    hidden: int = 160,
    max_steps: int = 9000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    threads: int = 2,
    samples: int = 1000,
    output_dir: Path = Path("runs/prior"),
) -> None:
    """Train the model on the molecules, and measure what it writes.

    Args:
        data: File of SMILES, the first word of each line. Default: MolScore's sample.
        layers: Transformer layers.
        hidden: Width of the model, a multiple of 4.
        max_steps: Updates.
        batch_size: Molecules of an update.
        learning_rate: Peak learning rate; it rises for 100 updates and falls to 0 along a cosine.
        seed: Seed of the order of molecules and of the first weights.
        threads: Threads of training.
        samples: Completions that are measured at the end.
        output_dir: Folder of the molecules, the new model, and the run that trains it.
    """
    start, rows, run = (output_dir / name for name in ("start", "molecules.jsonl", "sft"))
    smiles = data or in_molscore("data/sample.smi")
    claim(output_dir, f"layers={layers} hidden={hidden} seed={seed} molecules={digest([smiles])}")
    if not (start / "tokenizer.json").exists():
        prepare(start, rows, smiles, seed, layers=layers, hidden=hidden)
    result = tokenrl.sft(
        task=str(rows), model=str(start), output_dir=str(run), resume="auto", save_every=200,
        max_steps=max_steps, batch_size=batch_size, learning_rate=learning_rate,
        lr_scheduler_type="cosine", warmup_steps=100, seed=seed, threads=threads,
    )  # fmt: skip
    if result.exit_code:
        raise SystemExit(f"{run} was stopped; the same command goes on.")
    policy = tokenrl.load_policy(str(run))
    sampling = Sampling(LONGEST, num_generations=samples, seed=seed)
    (completions,) = sample_pool(policy, [""], sampling)
    learnt = (json.loads(line)["completion"] for line in rows.open())
    numbers = {name: round(share, 3) for name, share in shares(completions, learnt).items()}
    print(f"{policy.size:,} parameters, {samples:,} completions: {numbers}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
