"""Train the language model of the atlas from scratch. Takes under an hour on one thread of a processor.

python scripts/atlas/train_model.py --checkpoint build/atlas
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from base_trainer import train_on_facts
from statement_trainer import StatementTrainer, parser

from remend.assets import ATLAS_FOLDER
from remend.data import atlas

if __name__ == "__main__":
    arguments = parser(__doc__, ATLAS_FOLDER / "model", ATLAS_FOLDER / "model_report.json", Path("build/atlas"))
    train_on_facts(StatementTrainer, atlas.fact_set(), arguments.parse_args())
