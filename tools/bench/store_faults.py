"""Random damage to a sealed cache: is all of it detected, never data, and mended to the same bytes?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.errors import UserError
from logitcache.store import open_cache, verify
from tools.bench.store_data import Made, make, write_cache

Damage = Callable[[list[Path], np.random.Generator], None]


def flip(files: list[Path], rng: np.random.Generator) -> None:
    """One bit."""
    file = files[rng.integers(len(files))]
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)


def truncate(files: list[Path], rng: np.random.Generator) -> None:
    """Anywhere."""
    file = files[rng.integers(len(files))]
    data = file.read_bytes()
    file.write_bytes(data[: rng.integers(len(data))])


def delete(files: list[Path], rng: np.random.Generator) -> None:
    """One file."""
    files[rng.integers(len(files))].unlink()


def swap(files: list[Path], rng: np.random.Generator) -> None:
    """Two files of different bytes: of one size where there are such, which only content can tell apart."""
    while True:
        one = files[rng.integers(len(files))]
        twins = [file for file in files if file.name == one.name and file.read_bytes() != one.read_bytes()]
        if twins:
            other = twins[rng.integers(len(twins))]
            mine, theirs = one.read_bytes(), other.read_bytes()
            one.write_bytes(theirs)
            other.write_bytes(mine)
            return


DAMAGES: dict[str, Damage] = {"flip": flip, "truncate": truncate, "delete": delete, "swap": swap}


def run(count: int, folder: Path) -> dict[str, Any]:
    """Damage a cache that many times; each time read all of it, verify, repair, build again and compare bytes.

    A cache that lost its manifest is not sealed, which is no damage to `verify`: reading it is what refuses.
    """
    made = make("topk", 6_000)
    write_cache(made, str(folder), per_part=2)
    before, values = _contents(folder), _values(folder)
    tally = {"damages": count, "detected": 0, "detected_by_read": 0, "false_data": 0, "mended": 0}
    for number in range(count):
        name = list(DAMAGES)[number % len(DAMAGES)]
        DAMAGES[name]([folder / path for path in before], np.random.default_rng(number))
        read = _read(folder, values)
        tally["detected_by_read"] += read == "refused"
        tally["false_data"] += read == "other"
        verified = verify(str(folder), deep=True, repair=True)
        tally["detected"] += read == "refused" or not verified.sound
        tally["mended"] += _mended(made, folder, before)
    sound = tally["detected"] == tally["mended"] == count and not tally["false_data"]
    return {**tally, "sound": sound, "kinds": list(DAMAGES)}


def _read(folder: Path, values: list[bytes]) -> str:
    try:
        return "same" if _values(folder) == values else "other"
    except UserError:
        return "refused"


def _mended(made: Made, folder: Path, before: dict[str, bytes]) -> bool:
    write_cache(made, str(folder), per_part=2)
    return _contents(folder) == before


def _values(folder: Path) -> list[bytes]:
    found = []
    reader = open_cache(str(folder), targets="topk")
    for item in reader.read(range(len(reader))):
        values = [*vars(item.sequence).values(), *vars(item.targets).values()]
        found += [value.tobytes() if isinstance(value, np.ndarray) else str(value).encode() for value in values]
    return found


def _contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
