"""Train the classifier of claims, a BERT, on the atlas's facts. Takes about seven minutes on one thread of a processor.

python scripts/atlas/train_claims.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from base_trainer import parser, train_on_facts
from claim_trainer import ClaimTrainer

from remend.assets import CLAIMS_FOLDER
from remend.data.atlas_claims import claim_set

if __name__ == "__main__":
    folder = CLAIMS_FOLDER
    arguments = parser(__doc__, folder / "model", folder / "model_report.json", Path("build/claims"))
    arguments.set_defaults(vocabulary=3072, width=128, layers=4, heads=4, epochs=20, phrasings=2)
    arguments.set_defaults(lr=1e-3, muon_lr=3e-3)
    train_on_facts(ClaimTrainer, claim_set(), arguments.parse_args())
