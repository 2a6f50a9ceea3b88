"""Numbers with units, as people type them."""

import re

from mpillama.errors import UserError

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(option: str, text: str) -> int:
    """Read 64GB, 60GiB, 1.5TB, 200GB/s or a plain number of bytes."""
    return parse_number(option, text, "B", "bytes: write it like 64GB or 60GiB")


def parse_number(option: str, text: str, unit: str, what: str) -> int:
    """Read a number with a factor and perhaps a unit; `what` names what is expected to a user who wrote another."""
    match = re.fullmatch(rf"\s*([0-9]*\.?[0-9]+)\s*([kMGT]?i?)({unit})?(/s)?\s*", text)
    if not match or match[2] not in UNITS:
        raise UserError(f"{option} {text!r} is no number of {what}.")
    return int(float(match[1]) * UNITS[match[2]])
