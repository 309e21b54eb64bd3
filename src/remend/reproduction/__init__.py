"""The paper's tables in miniature: what is measured, beside what was published."""

from remend.reproduction.cells import Cell, Scale
from remend.reproduction.tables import TABLES, Table
from remend.reproduction.workshop import Workshop

__all__ = ["TABLES", "Cell", "Scale", "Table", "Workshop"]
