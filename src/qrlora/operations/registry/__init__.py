"""Store immutable artifacts by digest, the edges between them, names, aliases and the audit log.

references.py  registry:NAME@alias, and what may be a name
records.py     Artifact, Edge, Link; the kinds and relations there are
store.py       bytes: a folder, or any fsspec file system
schema.py      tables; migrations/ brings older databases up to them
database.py    SQLite and PostgreSQL; transactions
queries.py     questions to the tables
registry.py    Registry: add, get, search, alias, deprecate, audit
bases.py       base models, by the digests of their files and weights
intake.py      add_adapter, add_space, add_recipe, add_picture, add_composition, add_generated, add_report, add_file
folders.py     add_folder: adapters that are already in folders
lineage.py     what was made from what, as a tree and as a picture
bundle.py      a part of a registry as one file, to and from anybody
upkeep.py      verify, and what nothing refers to
effects.py     what adapters do to pictures: search by effect, hidden triggers
cards.py       model cards
"""

from qrlora.operations.registry.records import KINDS, RELATIONS, Addition, Artifact, Edge, Link, Move
from qrlora.operations.registry.references import PREFIX
from qrlora.operations.registry.registry import Registry, default_actor, default_place

__all__ = [
    "KINDS",
    "PREFIX",
    "RELATIONS",
    "Addition",
    "Artifact",
    "Edge",
    "Link",
    "Move",
    "Registry",
    "default_actor",
    "default_place",
]
