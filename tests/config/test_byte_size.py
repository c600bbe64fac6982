"""Amounts of memory: what is understood, and what is said of the rest."""

import pytest

from fitune.config.byte_size import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16_000_000_000), ("16 gb", 16_000_000_000), (" 7.5GiB ", 8_053_063_680), ("800MB", 800_000_000),
        (".5TB", 500_000_000_000), ("64kib", 65_536),
    ],
)  # fmt: skip
def test_what_people_write(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("16", "no unit; write 16GB"), ("lots", "is not an amount"), ("16 apples", "'apples'; the units are KB"),
        ("-3GB", "is not an amount"), ("0GB", "is nothing"), ("", "is not an amount"), ("1e9GB", "is not an amount"),
        ("nanGB", "is not an amount"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="GB") as caught:
        parse_bytes(text)
    assert said in str(caught.value)
