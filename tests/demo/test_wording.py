from __future__ import annotations

import pytest

from fitune.demo.wording import distinct_words, plural, singular, with_article, words_of


@pytest.mark.parametrize(
    ("identifier", "words", "many", "one"),
    [
        ("order_items", "order items", "order items", "order item"),
        ("unit_price", "unit price", "unit prices", "unit price"),
        ("OrderItem", "order item", "order items", "order item"),
        ("customerID", "customer id", "customer ids", "customer id"),
        ("HTTPStatus", "http status", "http status", "http status"),
        ("cities", "cities", "cities", "city"),
        ("country", "country", "countries", "country"),
        ("address", "address", "addresses", "address"),
        ("boxes", "boxes", "boxes", "box"),
        ("courses", "courses", "courses", "course"),
        ("people", "people", "people", "person"),
        ("staff", "staff", "staff", "staff"),
        ("bus", "bus", "buses", "bus"),
        ("addresses", "addresses", "addresses", "address"),
        ("day", "day", "days", "day"),
        ("größe", "größe", "größes", "größe"),
        ("unit price (€)", "unit price (€)", "unit price (€)", "unit price (€)"),
        ("_", "_", "_", "_"),
    ],
)
def test_words(identifier: str, words: str, many: str, one: str) -> None:
    assert words_of(identifier) == words
    assert plural(words) == many
    assert singular(words) == one
    assert singular(plural(one)) == one


def test_names_that_read_alike_stay_apart() -> None:
    assert distinct_words(["unit_price", "UnitPrice", "name"]) == {
        "unit_price": "unit_price",
        "UnitPrice": "UnitPrice",
        "name": "name",
    }


def test_articles() -> None:
    assert with_article("order") == "an order"
    assert with_article("customer") == "a customer"
    assert with_article("unit price") == "a unit price"
