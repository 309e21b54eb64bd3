"""The paper's tables in miniature: what is measured, beside what was published."""

from .cells import Cell, Scale
from .tables import TABLES, Table
from .workshop import Workshop
from .worlds import Given

__all__ = ["TABLES", "Cell", "Given", "Scale", "Table", "Workshop"]
