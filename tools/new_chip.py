"""Start a new chip: a spec to fill in, and a plug-in where its maker has none yet.

    python tools/new_chip.py example-910 --title "Example 910" --torch-device exa
    python tools/new_chip.py nvidia-b200 --title "B200"          # a maker that mxn knows

Prints what to do next. Refuses to overwrite anything.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

CHIPS = Path(__file__).parents[1] / "src" / "mxn" / "chips"

SPEC = """\
name = "{name}"
title = "{title}"
vendor = "{vendor}"
torch_device = "{torch_device}"
match = ['\\b{title}\\b']  # regular expressions for the driver's name of the device

# Delete what you do not know: unknown stays absent. Peaks are dense, GB are decimal.
# basis: datasheet, derived (note the formula), measured (note how), assumed (press, second-hand)
#
# [[peak]]
# dtype = "bf16"
# tflop_per_s = 0
# basis = "datasheet"
# source = ""
#
# [[memory]]
# bytes = 64_000_000_000
# basis = "datasheet"
#
# [[memory]]
# gb_per_s = 0
# basis = "datasheet"
"""

PLUGIN = '''\
"""{title_of_vendor} through torch_{torch_device}."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator


class {class_name}(Accelerator):
    vendor: ClassVar[str] = "{vendor}"
    title: ClassVar[str] = "{title_of_vendor}"
    torch_type: ClassVar[str] = "{torch_device}"
    collective: ClassVar[str] = "gloo"  # its torch.distributed backend
    package: ClassVar[str | None] = "torch_{torch_device}"  # its import registers the device type
    tool: ClassVar[str | None] = "{vendor}-smi"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/{vendor}[0-9]*",)
    visible_devices: ClassVar[str | None] = None

    def parse(self, text: str) -> list[smi.Row]:
        return smi.table(text, r"(?P<used>\\d+)MiB / (?P<total>\\d+)MiB", r"\\|\\s*(?P<busy>\\d+)%")
'''


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="maker and model, such as example-910")
    parser.add_argument("--title", help="what people call it; by default the name")
    parser.add_argument("--torch-device", help="device type, needed for a maker mxn does not know")
    parser.add_argument("--folder", type=Path, default=CHIPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", options.name):
        sys.exit(f"a chip's name is maker-model in lower case, got {options.name!r}")
    vendor = options.name.partition("-")[0]
    type_of_maker = known_makers().get(vendor)
    torch_device = options.torch_device or type_of_maker
    if torch_device is None:
        sys.exit(f"mxn does not know the maker {vendor!r}: give --torch-device")
    values = {
        "name": options.name,
        "title": options.title or options.name,
        "vendor": vendor,
        "torch_device": torch_device,
        "title_of_vendor": vendor.capitalize(),
        "class_name": f"{vendor.capitalize()}Chip",
    }
    write(options.folder / "specs" / f"{options.name}.toml", SPEC.format(**values))
    if type_of_maker is None:
        write(options.folder / "vendors" / f"{vendor}.py", PLUGIN.format(**values))
        print('add to [project.entry-points."mxn.chips"] in pyproject.toml, then pip install -e .:')
        print(f'  {vendor} = "mxn.chips.vendors.{vendor}:{values["class_name"]}"')
    print("next: fill both in, record the tool's output under tests/unit/chips/fixtures, and")
    print("      run pytest tests/unit/chips")


def known_makers() -> dict[str, str]:
    """Return torch device type by vendor, of the installed plug-ins."""
    from mxn.chips import registry

    return {p.chip.vendor: p.chip.torch_type for p in registry.plugins() if p.chip}


def write(path: Path, text: str) -> None:
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        sys.exit(f"{path} exists; nothing is overwritten")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
