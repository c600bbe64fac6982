from __future__ import annotations

import pytest

from fitune.data.text_checks import text_problems


@pytest.mark.parametrize(
    "text", ["Grüße aus Köln", "naïve café – “quoted” … €", "漢字と日本語", "Привет, мир", "α is 3 µm", "ÄÖÜ ß"]
)
def test_good_text_is_left_alone(text: str) -> None:
    assert list(text_problems(text)) == []


@pytest.mark.parametrize("text", ["Grüße aus Köln", "naïve – “quoted” …", "漢字", "Привет"])
def test_utf8_read_as_windows_1252_is_found(text: str) -> None:
    raw = text.encode()
    misread = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in raw)
    assert [kind for kind, _ in text_problems(misread)][:1] in (["mojibake"], ["control_characters"])
    assert "mojibake" in [kind for kind, _ in text_problems(misread)]


def test_each_kind_is_named_once_with_its_place() -> None:
    found = dict(text_problems("a\x07b\x00 lost \ufffd and раypal, раypal"))
    assert found["control_characters"].startswith("the control character U+0007 at 'a\\x07b")
    assert "lost \ufffd and" in found["mojibake"]
    assert found["mixed_scripts"] == "a word of two alphabets: 'раypal'"
    assert list(text_problems("tab\tand\r\nlines")) == []
    assert dict(text_problems("right\u202eleft"))["control_characters"].startswith("the control character U+202E")
