"""Train a prior over molecules: a small language model that writes SMILES like those of a file.

    python recipes/molecules/prior.py                                       MolScore's sample, 1.2 M parameters
    python recipes/molecules/prior.py --data mine.smi --output-dir runs/mine    molecules of your own
    python recipes/molecules/prior.py --layers 4 --hidden 256 --output-dir runs/large

The sample has 300,819 SMILES, without stereochemistry, phosphorus and iodine. An epoch is 4,276 updates and
takes half an hour on one core. A run that was killed goes on where it was saved when the command is repeated;
one that has ended is only measured again. `molopt.py` optimises molecules from the result.

A tokenizer cuts SMILES by the regular expression of Schwaller et al., "Molecular Transformer: A Model for
Uncertainty-Calibrated Chemical Reaction Prediction", ACS Central Science 5 (2019), 1572. Each token that occurs
in the molecules is one of the vocabulary; the model has no other.

Look for: the shares of valid completions, of distinct molecules among the valid ones, and of new molecules
among these. They should be above .93, .99 and .8.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[molecules]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import tokenrl
from tokenrl.language import Sampling, sample_pool
from toy_tasks.models import tiny_llama

START = "<bos>"
"""The prompt of every molecule."""
EOS, UNKNOWN = "<eos>", "<unk>"
TOKEN = (
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$"
    r"|%[0-9]{2}|[0-9]"
)
"""A token of SMILES: an atom, a bond, a branch or the digit of a ring (Schwaller et al. 2019)."""
LONGEST = 126
"""The most tokens of a molecule; with its start and its end it fills the context of 128."""


def tokens_of(smiles: str) -> list[str]:
    """Cut SMILES into tokens. What is no SMILES has less text in its tokens than it had."""
    return re.findall(TOKEN, smiles)


def smiles_tokenizer(vocabulary: Iterable[str]) -> Any:
    """Return a tokenizer for SMILES with the given tokens, a start, an end and an unknown token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {token: n for n, token in enumerate((EOS, UNKNOWN, START, *sorted(set(vocabulary))))}
    backend = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START, eos_token=EOS, pad_token=EOS,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def canonical(smiles: str) -> str | None:
    """Return RDKit's own SMILES of a molecule, or None where RDKit refuses it."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return Chem.MolToSmiles(molecule) if smiles and molecule else None


def molecules_of(path: Path, seed: int) -> list[str]:
    """Read SMILES, the first word of each line, and return distinct molecules in an order set by the seed."""
    lines = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    distinct = dict.fromkeys(filter(None, map(canonical, lines)))
    kept = [smiles for smiles in distinct if len(tokens_of(smiles)) <= LONGEST]
    print(f"{path.name}: {len(lines):,} SMILES, {len(distinct):,} molecules, {len(kept):,} are kept")
    random.Random(seed).shuffle(kept)
    return kept


def shares(
    completions: Sequence[str],
    learnt: Iterable[str],
    canonical: Callable[[str], str | None] = canonical,
) -> dict[str, float]:
    """Return GuacaMol's three shares of completions; a share of nothing is 0.

    Args:
        completions: Texts that a prior wrote.
        learnt: Canonical SMILES that it learnt from.
        canonical: Gives a molecule's canonical SMILES, or None for a text that is no molecule.
    """
    valid = list(filter(None, map(canonical, completions)))
    distinct = set(valid)
    return {
        "valid": len(valid) / max(1, len(completions)),
        "unique": len(distinct) / max(1, len(valid)),
        "new": len(distinct.difference(learnt)) / max(1, len(distinct)),
    }


@dataclass
class Args:
    """The molecules, the size of the model, and its training."""

    data: Path | None = None
    """File of SMILES, the first word of each line. Default: MolScore's sample."""
    layers: int = 3
    """Transformer layers."""
    hidden: int = 160
    """Width of the model, a multiple of 4."""
    max_steps: int = 4276
    """Updates."""
    batch_size: int = 64
    """Molecules of an update."""
    learning_rate: float = 3e-3
    """Peak learning rate; it rises for 100 updates and falls to 0 along a cosine."""
    seed: int = 0
    """Seed of the order of molecules and of the first weights."""
    threads: int = 2
    """Threads of training."""
    samples: int = 1000
    """Completions that are measured at the end."""
    output_dir: Path = Path("runs/prior")
    """Folder of the molecules, the new model, and the run that trains it."""


def prepare(args: Args) -> None:
    """Write demonstrations and a new model, unless an earlier call has."""
    start, data = args.output_dir / "start", args.output_dir / "molecules.jsonl"
    if (start / "tokenizer.json").exists():
        return
    sample = args.data
    if sample is None:
        (package,) = importlib.util.find_spec("molscore").submodule_search_locations  # type: ignore[union-attr]
        sample = Path(package) / "data" / "sample.smi"
    molecules = molecules_of(sample, args.seed)
    start.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": START, "completion": smiles} for smiles in molecules)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = smiles_tokenizer(token for smiles in molecules for token in tokens_of(smiles))
    shape = {"layers": args.layers, "hidden": args.hidden, "context": LONGEST + 2}
    tiny_llama(tokenizer, **shape, seed=args.seed).save_pretrained(start)
    tokenizer.save_pretrained(start)  # the last thing, as its presence says that all is there


def main(args: Args) -> None:
    prepare(args)
    run, data = args.output_dir / "sft", args.output_dir / "molecules.jsonl"
    if not (run / "summary.json").exists():
        result = tokenrl.sft(
            task=str(data), model=str(args.output_dir / "start"), output_dir=str(run),
            max_steps=args.max_steps, batch_size=args.batch_size, seed=args.seed,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=min(100, args.max_steps // 10), threads=args.threads,
            save_every=200, resume="auto",
        )  # fmt: skip
        if result.exit_code:
            raise SystemExit(f"{run} was stopped; the same command goes on.")
    policy = tokenrl.load_policy(str(run))
    sampling = Sampling(LONGEST, num_generations=args.samples, seed=args.seed)
    (completions,) = sample_pool(policy, [START], sampling)
    learnt = [json.loads(line)["completion"] for line in data.read_text().splitlines()]
    numbers = shares(completions, learnt)
    (args.output_dir / "shares.json").write_text(json.dumps(numbers))
    words = ", ".join(f"{name} {share:.3f}" for name, share in numbers.items())
    print(f"{policy.size:,} parameters; of {len(completions):,} completions: {words}")
    print(f"prior: {run / 'model'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
