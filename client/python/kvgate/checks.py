"""Checks of arguments: what ctypes would cut to size silently is refused by name here."""

import operator
from typing import SupportsIndex

U32_MAX = 0xFFFFFFFF
U64_MAX = 0xFFFFFFFFFFFFFFFF


def whole(name: str, value: SupportsIndex, least: int = 0, most: int = U32_MAX) -> int:
    """The value as an int of [least, most]; ValueError names it, TypeError when it is no whole number."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, which is no whole number") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}, outside {least} to {most}")
    return number


def choice(name: str, value: str, choices: dict[str, int]) -> int:
    """The number of a named choice; ValueError lists the names."""
    number = choices.get(value)
    if number is None:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(choices)}")
    return number
