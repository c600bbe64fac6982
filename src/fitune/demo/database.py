"""The demo database: a furniture shop with its customers, orders and reviews, grown from a seed.

Names, prices and dates are invented. Sizes are those of a small shop (about 2,300 rows in 7 tables), so that
any query over it takes milliseconds; names of tables and columns are short because the schema stands in
every prompt.
"""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import tempfile
from datetime import date, timedelta
from pathlib import Path

from fitune.errors import DiskFullError, FituneError

SCHEMA = """
CREATE TABLE customers (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    city TEXT NOT NULL,
    country TEXT NOT NULL,
    phone TEXT,
    signup_date TEXT NOT NULL
);
CREATE TABLE employees (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    job TEXT NOT NULL,
    salary INTEGER NOT NULL,
    hire_date TEXT NOT NULL
);
CREATE TABLE categories (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL
);
CREATE TABLE products (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    category_id INTEGER NOT NULL REFERENCES categories (id),
    color TEXT,
    price REAL NOT NULL,
    stock INTEGER NOT NULL
);
CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    employee_id INTEGER NOT NULL REFERENCES employees (id),
    order_date TEXT NOT NULL,
    status TEXT NOT NULL,
    payment TEXT
);
CREATE TABLE order_items (
    id INTEGER PRIMARY KEY,
    order_id INTEGER NOT NULL REFERENCES orders (id),
    product_id INTEGER NOT NULL REFERENCES products (id),
    quantity INTEGER NOT NULL,
    discount INTEGER NOT NULL
);
CREATE TABLE reviews (
    id INTEGER PRIMARY KEY,
    product_id INTEGER NOT NULL REFERENCES products (id),
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    rating INTEGER NOT NULL,
    comment TEXT,
    review_date TEXT NOT NULL
);
"""

CITIES = {
    "Germany": ["Berlin", "Hamburg", "Munich", "Cologne"],
    "France": ["Paris", "Lyon", "Nantes", "Lille"],
    "Spain": ["Madrid", "Valencia", "Seville"],
    "Italy": ["Rome", "Milan", "Turin", "Naples"],
    "Netherlands": ["Amsterdam", "Utrecht", "Rotterdam"],
    "Austria": ["Vienna", "Graz", "Salzburg"],
    "Poland": ["Warsaw", "Krakow", "Gdansk"],
    "Portugal": ["Lisbon", "Porto"],
    "Denmark": ["Copenhagen", "Aarhus"],
    "Ireland": ["Dublin", "Cork"],
}
FIRST_NAMES = """
    Anna Ben Clara David Elena Felix Greta Hugo Ines Jonas Karin Leo Maria Nils Olga Paul Rosa Simon
    Tara Victor Wanda Xavier Yara Zoe Adam Bianca Carlos Diana Erik Fiona Georg Hanna Ivan Julia Kamil
    Laura Marco Nora Oscar Petra Quentin Rita Stefan Teresa Ursula Vera Walter Alice Bruno Celine
    """.split()  # noqa: SIM905
LAST_NAMES = """
    Becker Costa Dubois Esposito Fischer Garcia Hansen Ivanov Jansen Keller Lopez Moreau Novak Olsen
    Pereira Quinn Rossi Schmidt Torres Urban Vogel Weber Young Zimmer Alvarez Bauer Conti Dekker Engel
    Ferrari Gruber Hofmann Jensen Kowalski Lang Murphy Neumann Ortega Petit Ricci Santos Thomsen Vidal
    Wolf
    """.split()  # noqa: SIM905
JOBS = {
    "sales clerk": (2600, 3400),
    "sales manager": (4300, 5600),
    "accountant": (3400, 4500),
    "driver": (2300, 2900),
    "designer": (3300, 4400),
    "support agent": (2400, 3100),
    "buyer": (3500, 4700),
}
PRODUCTS = {  # category: (nouns with their usual price)
    "Chairs": {"chair": 89, "armchair": 249, "stool": 49, "rocking chair": 319},
    "Tables": {"dining table": 449, "coffee table": 159, "side table": 79},
    "Beds": {"bed": 529, "bunk bed": 689, "sofa bed": 749},
    "Storage": {"bookcase": 139, "wardrobe": 479, "cabinet": 229, "shelf": 39},
    "Lighting": {"floor lamp": 99, "desk lamp": 45, "ceiling lamp": 119},
    "Office": {"desk": 279, "office chair": 199, "filing cabinet": 169},
    "Garden": {"bench": 189, "deck chair": 69, "parasol": 59},
    "Textiles": {"rug": 129, "curtain": 35, "cushion": 19},
}
SERIES = """
    Alba Birka Corso Delta Fjord Gala Hygge Indigo Jura Kivik Luna Mira Nord Oslo Palma Riva Siena
    Tundra Vega Zara
    """.split()  # noqa: SIM905
# Many different values: a model that sees a few of them over and over learns these by heart, and not to copy.
COLORS = """
    white black oak grey walnut green blue red beige brown yellow orange pink birch pine cream silver turquoise
    """.split()  # noqa: SIM905
STATUSES = ["delivered", "delivered", "delivered", "shipped", "pending", "cancelled", "returned"]
PAYMENTS = ["card", "card", "card", "invoice", "paypal", "cash", "bank transfer", "gift card", "cheque"]
COMMENTS = [
    "great quality",
    "arrived late",
    "easy to assemble",
    "colour differs from the photo",
    "very comfortable",
    "a screw was missing",
    "good value for money",
    "too small",
    "sturdy and simple",
    "scratched on arrival",
    "would buy again",
    "hard to assemble",
    "smells of paint",
    "looks better than in the photo",
    "one leg is shorter",
    "my cat loves it",
    "fast delivery",
    "wrong part in the box",
    "not worth the price",
    "fits perfectly",
    "heavier than expected",
    "the fabric is soft",
    "broke after a week",
    "friendly driver",
]

Row = tuple[object, ...]


def build_demo_database(path: Path, seed: int = 0) -> None:
    """Write the demo database to `path`, replacing a file that is there; the same seed, the same rows.

    Atomic: built beside, synced, renamed. Raises DiskFullError or FituneError; then `path` is as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise FituneError(f"{path}: the demo database cannot be written: {error.strerror}") from error
    try:
        _write(Path(beside), seed)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise DiskFullError(f"{path}: the disk is full; the demo database was not written") from error
        raise FituneError(f"{path}: the demo database cannot be written: {error}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(f"{path}: the disk is full; the demo database was not written") from error
        raise FituneError(f"{path}: the demo database cannot be written: {error.strerror}") from error
    finally:
        Path(beside).unlink(missing_ok=True)


def _write(path: Path, seed: int) -> None:
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.executescript(SCHEMA)
        for table, rows in demo_rows(seed).items():
            places = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({places})", rows)
        connection.commit()
    finally:
        connection.close()


def demo_rows(seed: int) -> dict[str, list[Row]]:
    """Seed -> the rows of each table, in the order in which foreign keys allow them to be inserted."""
    rng = random.Random(f"fitune demo database {seed}")
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(names)
    products = _products(rng)
    customers = [_customer(rng, number, names.pop()) for number in range(1, 161)]
    employees = [_employee(rng, number, names.pop()) for number in range(1, 41)]
    orders, items = _orders(rng, customers, employees, products)
    return {
        "customers": customers,
        "employees": employees,
        "categories": [(number, name) for number, name in enumerate(PRODUCTS, start=1)],
        "products": products,
        "orders": orders,
        "order_items": items,
        "reviews": _reviews(rng, customers, products),
    }


def _day(rng: random.Random, first: date, last: date) -> date:
    return first + timedelta(days=rng.randrange((last - first).days + 1))


def _customer(rng: random.Random, number: int, name: str) -> Row:
    country = rng.choices(list(CITIES), weights=range(len(CITIES) + 3, 3, -1))[0]
    phone = (
        None if rng.random() < 0.25 else f"+{rng.randint(31, 49)} {rng.randint(200, 999)} {rng.randint(10000, 99999)}"
    )
    signup = _day(rng, date(2018, 1, 8), date(2024, 11, 30))
    return number, name, rng.choice(CITIES[country]), country, phone, signup.isoformat()


def _employee(rng: random.Random, number: int, name: str) -> Row:
    job = rng.choices(list(JOBS), weights=[9, 3, 3, 6, 4, 6, 3])[0]
    low, high = JOBS[job]
    return (
        number,
        name,
        job,
        rng.randrange(low, high, 20),
        _day(rng, date(2012, 2, 1), date(2024, 6, 30)).isoformat(),
    )


def _products(rng: random.Random) -> list[Row]:
    kinds = [(c, noun, price) for c, nouns in enumerate(PRODUCTS.values(), 1) for noun, price in nouns.items()]
    series = {noun: rng.sample(SERIES, 4) for _, noun, _ in kinds}
    rows: list[Row] = []
    for round_number in range(4):
        for category, noun, usual in kinds:
            price = round(usual * rng.uniform(0.6, 1.7)) + rng.choice([0.0, 0.5, 0.9, 0.99])
            color = None if rng.random() < 0.12 else rng.choice(COLORS)
            name = f"{series[noun][round_number]} {noun}"
            rows.append((len(rows) + 1, name, category, color, round(price, 2), rng.randint(0, 180)))
    return rows


def _orders(
    rng: random.Random, customers: list[Row], employees: list[Row], products: list[Row]
) -> tuple[list[Row], list[Row]]:
    buyers = rng.sample(customers, len(customers) - 22)  # the others never ordered
    popularity = [rng.random() ** 2 + 0.02 for _ in buyers]
    sellers = [employee for employee in employees if employee[2] in ("sales clerk", "sales manager", "support agent")]
    sold = rng.sample(products, len(products) - 9)  # the others were never sold
    orders: list[Row] = []
    items: list[Row] = []
    for number in range(1, 481):
        buyer = rng.choices(buyers, weights=popularity)[0]
        ordered = _day(rng, max(date(2019, 1, 2), date.fromisoformat(str(buyer[5]))), date(2024, 12, 30))
        status = rng.choice(STATUSES)
        payment = None if status in ("pending", "cancelled") and rng.random() < 0.7 else rng.choice(PAYMENTS)
        seller = rng.choice(sellers)
        orders.append((number, buyer[0], seller[0], ordered.isoformat(), status, payment))
        for product in rng.sample(sold, rng.choices([1, 2, 3, 4, 5], weights=[30, 32, 20, 12, 6])[0]):
            quantity = rng.choices([1, 2, 3, 4, 6, 8, 12], weights=[46, 26, 9, 8, 6, 3, 2])[0]
            discount = rng.choices([0, 5, 10, 15, 20, 30], weights=[60, 12, 12, 7, 6, 3])[0]
            items.append((len(items) + 1, number, product[0], quantity, discount))
    return orders, items


def _reviews(rng: random.Random, customers: list[Row], products: list[Row]) -> list[Row]:
    authors = rng.sample(customers, 110)
    reviewed = rng.sample(products, 82)
    rows: list[Row] = []
    for number in range(1, 421):
        rating = rng.choices([1, 2, 3, 4, 5], weights=[7, 10, 18, 34, 31])[0]
        comment = None if rng.random() < 0.3 else rng.choice(COMMENTS)
        written = _day(rng, date(2019, 3, 1), date(2024, 12, 31))
        rows.append((number, rng.choice(reviewed)[0], rng.choice(authors)[0], rating, comment, written.isoformat()))
    return rows
