"""One folder with a reward, environments, data and a model, for all the tests here."""

import json
import shutil
from pathlib import Path

import pytest
from killing import REWARD, Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nursery")
    (folder / "rewards.py").write_text(REWARD)
    shutil.copy(
        Path(__file__).parents[1] / "language" / "tiny_environments.py", folder / "episodes.py"
    )
    rows = [json.dumps({"prompt": f"{n * 98765 % 999999:06d}>"}) for n in range(1, 11)]
    (folder / "digits.jsonl").write_text("\n".join(rows))
    nursery = Nursery(folder)
    warm = "sft --task sort_digits --max-steps 1 --output-dir warm --quiet"
    assert nursery.run(warm.split()) == 0, nursery.said  # the task's model is made once
    return nursery
