"""Names in a cache: which object lies where (docs/format.md, section 2), and the errors that speak of them.

zarr.json  identity.json  manifest.json
appended/<number>.json
sequences/<unit>/record.json samples.parquet token_ids/ offsets/
targets/<tier>/tier.json shared/<array>/
targets/<tier>/<unit>/record.json row_offsets/ [entry_offsets/] <array>/...
"""

from __future__ import annotations

import re

from logitcache.errors import DamagedError, UserError

FORMAT_VERSION = 1
ROOT = "zarr.json"
IDENTITY = "identity.json"
MANIFEST = "manifest.json"
PARTIAL = ".partial"
APPENDED = "appended"
SEQUENCES = "sequences"
TARGETS = "targets"
SHARED = "shared"
RESERVED_ARRAYS = ("row_offsets", "entry_offsets")
"""Arrays that the store adds to a targets part; a codec may not use their names."""

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,63}")


def check_name(what: str, name: str) -> str:
    """A unit, tier or array name that is safe in every store: letters, digits, `_.-`, at most 64."""
    if not _NAME.fullmatch(name) or name == SHARED or ".." in name:
        raise UserError(f"a name for {what}", f"got {name!r}", "use 1 to 64 letters, digits, '_', '.' or '-'")
    return name


def appended_set(number: int) -> str:
    """The object of an appended problem set; the first has number 1."""
    return f"{APPENDED}/{number:08d}.json"


def sequences_part(unit: str) -> str:
    """The group of a unit's sequences."""
    return f"{SEQUENCES}/{unit}"


def tier_group(tier: str) -> str:
    """The group of a tier."""
    return f"{TARGETS}/{tier}"


def shared_group(tier: str) -> str:
    """The group of the arrays that a tier keeps once."""
    return f"{tier_group(tier)}/{SHARED}"


def targets_part(tier: str, unit: str) -> str:
    """The group of a unit's targets in a tier."""
    return f"{TARGETS}/{tier}/{unit}"


def record_of(part: str) -> str:
    """A part's record: the object whose presence commits it."""
    return f"{part}/record.json"


def tier_record(tier: str) -> str:
    """The object whose presence commits a tier's configuration."""
    return f"{tier_group(tier)}/tier.json"


def damaged(shown: str, name: str, found: str) -> DamagedError:
    """The error for an object whose bytes are not what was committed."""
    mend = f"run `logitcache verify {shown} --repair`, then the command that built it: it redoes only that part"
    return DamagedError(f"read {name} in {shown}", found, mend)
