"""Operators: a contract (schema and fake), a reference in plain torch, a native twin in C++."""
