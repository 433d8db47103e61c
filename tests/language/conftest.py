"""Fixtures: tiny local models, saved once a session; nothing is downloaded."""

import sys

import pytest
import torch
from tiny_models import make_model, make_tokenizer

from tokenrl.names import OWN_MODULES


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # at this size a second thread only costs


@pytest.fixture(autouse=True)
def _no_files():
    """Files that earlier tests have imported are forgotten: processes of rewards would import them too."""
    for name in OWN_MODULES:
        sys.modules.pop(name, None)
    OWN_MODULES.clear()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved(architecture, kind)`: the directory of a model and tokenizer, written once."""
    known = {}

    def save(architecture="llama", kind="pad", **config):
        key = (architecture, kind, *sorted(config.items()))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("model")
            make_model(architecture, **config).save_pretrained(known[key])
            make_tokenizer(kind).save_pretrained(known[key])
        return known[key]

    return save


@pytest.fixture
def alone(workplace, monkeypatch):
    """The current directory and the cache of datasets are temporary."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(workplace / "cache"))
    datasets.disable_progress_bars()
