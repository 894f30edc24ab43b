"""Immutable artifacts by digest, the edges between them, names, aliases and the audit log.

references.py  registry:NAME@alias, and what may be a name
records.py     Artifact, Edge, Link; the kinds and relations there are
store.py       bytes: a folder, or any fsspec file system
schema.py      tables; migrations/ brings older databases up to them
database.py    SQLite and PostgreSQL; transactions
registry.py    Registry: add, get, search, alias, deprecate, audit
"""

from qrlora.operations.registry.records import KINDS, RELATIONS, Artifact, Edge, Link, Move
from qrlora.operations.registry.references import PREFIX
from qrlora.operations.registry.registry import Registry, default_actor, default_place

__all__ = [
    "KINDS",
    "PREFIX",
    "RELATIONS",
    "Artifact",
    "Edge",
    "Link",
    "Move",
    "Registry",
    "default_actor",
    "default_place",
]
