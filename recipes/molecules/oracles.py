"""Lets MolScore use its oracles DRD2, GSK3B and JNK3, and the pattern of Scaffold_hop, when it is imported.

The oracles are a support vector machine and two random forests, pickled by scikit-learn 0.21 and 0.23. MolScore
starts them in environments of conda. scikit-learn 1.3 gave each node of a tree a field for missing values, so that
older trees are refused; fingerprints have no missing values, so the field is 0 here. scikit-learn 1.2.2 reads
MolScore's later pickles (`_current`) as they are. It gives 2,000 molecules of MolScore's sample the probabilities of
this module, bit for bit, with the later pickles and with the earlier ones, which the benchmark uses.

The pattern has a character that is no bond of SMARTS. RDKit before 2024 reads it up to there, as ACEGEN's table did:
an ether of a chain of three carbons. RDKit 2026.9 refuses it, so that a third of the score could never be had.
"""

import pickle
import warnings
from typing import Any

import numpy as np
from molscore import scoring_functions
from molscore.scoring_functions.legacy_qsar import LegacyQSAR as WithConda
from molscore.scoring_functions.substructure_match import SubstructureMatch as WholePattern
from molscore.scoring_functions.utils import Fingerprints
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.tree._tree import NODE_DTYPE, Tree

MOVED = {
    "sklearn.ensemble.forest": "sklearn.ensemble._forest",
    "sklearn.svm.classes": "sklearn.svm._classes",
    "sklearn.tree.tree": "sklearn.tree._classes",
}
"""Modules of scikit-learn 0.21, and where their classes are now."""


class OldTree(Tree):
    """A decision tree whose nodes are without the fields of later releases."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        nodes = np.zeros(len(state["nodes"]), NODE_DTYPE)
        for name in state["nodes"].dtype.names:
            nodes[name] = state["nodes"][name]
        super().__setstate__(state | {"nodes": nodes})


class OldPickle(pickle.Unpickler):
    """A reader of pickles of scikit-learn 0.21 to 1.2."""

    def find_class(self, module: str, name: str) -> Any:
        return OldTree if name == "Tree" else super().find_class(MOVED.get(module, module), name)


class LegacyQSAR(WithConda):
    """MolScore's scoring function of this name, in the process that asks."""

    def __init__(self, prefix: str, model: str, **options: Any) -> None:
        _, folder, file, _, self.fingerprint, self.size = self.model_dictionary[model]
        self.prefix = prefix
        with folder.joinpath(file).open("rb") as pickled:
            self.model = OldPickle(pickled).load()

    def probabilities(self, molecules: np.ndarray) -> np.ndarray:
        """Return the probability that each molecule is active, from fingerprints [molecules, bits]."""
        if not hasattr(self.model, "estimators_"):
            return self.model.predict_proba(molecules)[:, 1]
        trees = [tree.tree_.predict(molecules) for tree in self.model.estimators_]
        counts = np.array(trees)  # of inactive and active molecules in a leaf [trees, molecules, 2]
        return (counts[..., 1] / counts.sum(-1)).mean(0)

    def __call__(self, smiles: list[str], **options: Any) -> list[dict[str, Any]]:
        rows = [Fingerprints.get(text, self.fingerprint, self.size, True) for text in smiles]
        # MolScore also asks for batches in which nothing is a molecule.
        valid = [row is not None for row in rows]
        molecules = [np.zeros(self.size) if row is None else row for row in rows]
        probabilities = valid * self.probabilities(np.array(molecules, np.float32))
        return [
            {"smiles": text, f"{self.prefix}_pred_proba": p}
            for text, p in zip(smiles, probabilities, strict=True)
        ]


class SubstructureMatch(WholePattern):
    """MolScore's scoring function of this name, with patterns as RDKit before 2024 reads them."""

    def __init__(self, smarts: list[str], **options: Any) -> None:
        super().__init__(smarts=[pattern.split("\u223c")[0] for pattern in smarts], **options)


warnings.simplefilter("ignore", InconsistentVersionWarning)
functions = scoring_functions.all_scoring_functions
functions[functions.index(WithConda)] = LegacyQSAR
functions[functions.index(WholePattern)] = SubstructureMatch
