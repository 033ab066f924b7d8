"""Writes what a GGUF file says beside its weights as a Hugging Face directory would have it.

For whoever makes a directory of a GGUF model, such as an artifact of packed weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mxn.errors import UnsupportedError
from mxn.models.quantized.gguf_storage import GgufStorage
from mxn.models.quantized.gguf_tokenizer import read_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_files(path: Path, directory: Path) -> None:
    """Write config.json (of plain weights), tokenizer.json and tokenizer_config.json.

    Raises: UnsupportedError when the tokenizer is not known and none lies beside the file.
    """
    storage = GgufStorage(path)
    config = {k: v for k, v in storage.config_json.items() if k != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    try:
        raw, tokenizer_config = read_tokenizer(path, storage.metadata)
    except UnsupportedError:
        if not (path.parent / "tokenizer.json").is_file():
            raise
        for name in _TOKENIZER_FILES:
            if (path.parent / name).is_file():
                shutil.copyfile(path.parent / name, directory / name)
        return
    raw.save(str(directory / "tokenizer.json"))
    text = json.dumps(tokenizer_config, ensure_ascii=False, indent=1)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
