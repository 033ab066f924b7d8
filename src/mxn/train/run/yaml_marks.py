"""YAML whose values remember where they stand, and readers that say so when a value is wrong.

Knows nothing of jobs. A `Reader` turns an `Entry` into a value or raises ConfigError with
file:line, the value and what is allowed. Start at `load` and `read_section`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mxn.errors import ConfigError, NotFoundError
from mxn.train.run.login import HIDDEN, without_login
from mxn.units import parse_bytes

Reader = Callable[["Entry"], Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of the file: plain data, `key` as a dotted path, and the line it stands on."""

    file: Path
    key: str
    node: yaml.Node

    @property
    def line(self) -> int:
        return self.node.start_mark.line + 1

    @property
    def value(self) -> Any:
        """The value as YAML means it: text, number, bool, None, list or dict."""
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_document(self.node)
        except yaml.YAMLError as error:  # a tag that is none of YAML's own
            problem = getattr(error, "problem", None) or str(error)
            raise ConfigError(f"{self.file}:{self.line}: {self.key}: {problem}") from error
        finally:
            loader.dispose()

    def wrong(self, problem: str, hint: str | None = None, *, is_shown: bool = True) -> ConfigError:
        """Return (not raise) the error that this value is; `is_shown`: with the value."""
        told = self.value if is_shown else ()
        shown = f"{told!r} " if isinstance(told, str | int | float | bool | None) else ""
        return ConfigError(
            f"{self.file}:{self.line}: {self.key}: {without_login(shown)}{problem}", hint=hint
        )

    def items(self) -> list[tuple[Entry, Entry]]:
        """Return (key, value) pairs. Raises: ConfigError unless this is a mapping, keys once."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong("is no mapping of keys to values")
        pairs, seen = [], {}
        for key_node, value_node in self.node.value:
            name = str(getattr(key_node, "value", "?"))
            told = HIDDEN if "@" in name else name  # an address in the place of a key
            path = f"{self.key}.{told}" if self.key else told
            line = key_node.start_mark.line + 1
            if name in seen:
                raise ConfigError(
                    f"{self.file}:{line}: {path} is given twice, first in line {seen[name]}"
                )
            seen[name] = line
            pairs.append((Entry(self.file, path, key_node), Entry(self.file, path, value_node)))
        return pairs

    def elements(self) -> list[Entry]:
        """Return the values of a list. Raises: ConfigError unless this is one."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong("is no list")
        nodes = self.node.value
        return [Entry(self.file, f"{self.key}[{i}]", node) for i, node in enumerate(nodes)]

    @property
    def is_text(self) -> bool:
        return isinstance(self.value, str)

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)


def load(path: Path) -> Entry:
    """Return the root of a YAML file.

    Raises: NotFoundError when it cannot be read; ConfigError, with the line, when it is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"job file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text (byte {error.start})") from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: is no YAML: {problem}") from error
    if node is None:
        raise ConfigError(f"{path}: is empty")
    return Entry(path, "", node)


def read_section(
    entry: Entry, readers: Mapping[str, Reader], required: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the values of a mapping by key; keys that are not there are left out.

    Raises: ConfigError for a key without reader (with the nearest name), a missing or wrong value.
    """
    where = f" in {entry.key}" if entry.key else ""
    values = {}
    for key, value in entry.items():
        name = key.key.rsplit(".", 1)[-1]
        if name not in readers:
            near = difflib.get_close_matches(name, readers, n=1)
            raise ConfigError(
                f"{key.file}:{key.line}: unknown key {name!r}{where}"
                + (f"; did you mean {near[0]!r}?" if near else ""),
                hint=f"keys{where}: {', '.join(readers)}",
            )
        values[name] = readers[name](value)
    for name in required:
        if name not in values:
            raise ConfigError(f"{entry.file}:{entry.line}: key {name!r}{where} is missing")
    return values


# -- readers of single values ------------------------------------------------------------------


def text(entry: Entry) -> str:
    value = entry.value
    if not isinstance(value, str) or not value.strip():
        raise entry.wrong("is no text")
    return value


def switch(entry: Entry) -> bool:
    if not isinstance(entry.value, bool):
        raise entry.wrong("must be true or false")
    return entry.value


def one_of(*choices: str) -> Reader:
    """One of some words, with the nearest named where it is none."""

    def read(entry: Entry) -> str:
        value = entry.value
        if value in choices and isinstance(value, str):
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise entry.wrong(f"must be one of {', '.join(choices)}{meant}")

    return read


def whole(least: int, most: int | None = None) -> Reader:
    def read(entry: Entry) -> int:
        value = _number(entry)
        if value != int(value):
            raise entry.wrong("must be a whole number")
        _check_range(entry, value, least, most, is_open=False)
        return int(value)

    return read


def number(least: float, most: float | None = None, *, is_open: bool = False) -> Reader:
    """A number from `least` to `most`; `is_open`: greater than `least`."""

    def read(entry: Entry) -> float:
        value = _number(entry)
        _check_range(entry, value, least, most, is_open=is_open)
        return float(value)

    return read


def size(entry: Entry) -> int:
    """A positive number of bytes, such as 16GiB."""
    value = entry.value
    try:
        found = parse_bytes(value if isinstance(value, int) else str(value))
    except ValueError as error:
        raise entry.wrong("is no size; examples: 16GiB, 500MB, 4096") from error
    if found < 1:
        raise entry.wrong("must be at least one byte")
    return found


def rate(entry: Entry) -> float:
    """Bytes per second, such as 100MB/s."""
    value = entry.value
    if not isinstance(value, str):
        raise entry.wrong("is no rate; example: 100MB/s")
    try:
        found = parse_bytes(value.strip().removesuffix("/s"))
    except ValueError as error:
        raise entry.wrong("is no rate; example: 100MB/s") from error
    if found < 1:
        raise entry.wrong("must be at least one byte per second")
    return float(found)


def optional(reader: Reader) -> Reader:
    """`null` or what `reader` reads."""
    return lambda entry: None if entry.value is None else reader(entry)


def list_of(reader: Reader) -> Reader:
    """A list of at least one value, or one value alone."""

    def read(entry: Entry) -> tuple[Any, ...]:
        if not isinstance(entry.node, yaml.SequenceNode):
            return (reader(entry),)
        values = tuple(reader(element) for element in entry.elements())
        if not values:
            raise entry.wrong("must not be empty")
        return values

    return read


def _number(entry: Entry) -> float:
    value = entry.value
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a word
        try:
            value = float(value)
        except ValueError:
            raise entry.wrong("is no number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise entry.wrong("is no number")
    if value != value or value in (float("inf"), float("-inf")):
        raise entry.wrong("must be finite")
    return value


def _check_range(
    entry: Entry, value: float, least: float, most: float | None, *, is_open: bool
) -> None:
    if value < least or (is_open and value == least):
        raise entry.wrong(f"must be {'more than' if is_open else 'at least'} {least:g}")
    if most is not None and value > most:
        raise entry.wrong(f"must be at most {most:g}")
