"""Finds the files of a saved model and refuses damaged ones by name, before a library reads them.

Libraries quote the error of a damaged file without its name, and go on in silence without a
generation_config.json that cannot be read, although the tokens that end a completion stand there.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenrl.errors import Refused
from tokenrl.runs.outcome import model_directory


def intact_model(name_or_path: str | Path) -> str:
    """Return where a model lies, as `model_directory` does, once its files were found to be readable.

    Raises:
        Refused: the directory is a damaged checkpoint, or one of its files is cut short or no JSON; the
            message names the file.
    """
    from safetensors import SafetensorError, safe_open

    place = model_directory(name_or_path)
    if not Path(place).is_dir():
        return str(place)  # a hub name
    for file in sorted(Path(place).iterdir()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # its header must cover the whole file
                    pass
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise Refused(
                f"The file {file.name} of the model in {place} is damaged ({error}). Copy or save the model "
                "there once more."
            ) from error
    return str(place)
