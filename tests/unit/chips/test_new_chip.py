"""What the generator writes is valid at once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mxn.chips import specs
from mxn.chips.testing import RecordedProbe


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def new_chip(tmp_path):
    (tmp_path / "specs").mkdir()
    (tmp_path / "vendors").mkdir()
    tool = load(Path(__file__).parents[3] / "tools" / "new_chip.py")
    return lambda *words: tool.main([*words, "--folder", str(tmp_path)])


def test_a_chip_of_a_new_maker_gets_a_spec_and_a_plug_in(new_chip, tmp_path, capsys):
    new_chip("example-910", "--title", "Example 910", "--torch-device", "exa")
    spec = specs.parse((tmp_path / "specs" / "example-910.toml").read_text(), "example-910")
    assert (spec.vendor, spec.torch_device, spec.figures) == ("example", "exa", ())
    assert spec.match == (r"\bExample 910\b",)
    chip = load(tmp_path / "vendors" / "example.py").ExampleChip()
    assert chip.detect(RecordedProbe()) == []
    assert 'example = "mxn.chips.vendors.example:ExampleChip"' in capsys.readouterr().out


def test_a_chip_of_a_known_maker_gets_only_a_spec(new_chip, tmp_path):
    new_chip("nvidia-b200")
    spec = specs.parse((tmp_path / "specs" / "nvidia-b200.toml").read_text(), "nvidia-b200")
    assert spec.torch_device == "cuda"
    assert not list((tmp_path / "vendors").iterdir())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("Example 910",), "maker-model in lower case"),
        (("example-910",), "give --torch-device"),
    ],
)
def test_bad_arguments_are_refused(words, error, new_chip):
    with pytest.raises(SystemExit, match=error):
        new_chip(*words)


def test_nothing_is_overwritten(new_chip):
    new_chip("nvidia-b200")
    with pytest.raises(SystemExit, match="exists"):
        new_chip("nvidia-b200")
