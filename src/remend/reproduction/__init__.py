"""The paper's tables in miniature: what is measured, beside what was published."""

from remend.reproduction.cells import Cell, Scale
from remend.reproduction.tables import TABLES, Table
from remend.reproduction.workshop import Workshop
from remend.reproduction.worlds import Given

__all__ = ["TABLES", "Cell", "Given", "Scale", "Table", "Workshop"]
