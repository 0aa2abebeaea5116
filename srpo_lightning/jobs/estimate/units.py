"""Bytes as people write and read them."""

import re

GIB = 1 << 30


def in_gib(size: int) -> str:
    """Two decimals, of models below a GiB three more."""
    return f"{size / GIB:.2f}" if size >= GIB or not size else f"{size / GIB:.4f}"


def parse_bytes(text: str) -> int:
    """80GiB, 24GB or 512MiB in bytes.

    Raises:
        ValueError: if it is none of these.
    """
    units = {"GIB": GIB, "GB": 10**9, "MIB": 1 << 20, "MB": 10**6}
    match = re.fullmatch(r"([0-9.]+)\s*([GM]I?B)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size of memory: write it as 80GiB, 24GB or 512MiB")
    return int(float(match[1]) * units[match[2].upper()])


def verdict(size: int, room: int) -> str:
    """Whether so many bytes fit."""
    return "fits" if size <= room else "does not fit"
