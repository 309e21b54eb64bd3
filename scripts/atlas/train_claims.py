"""Train the fact checker, a BERT, on the atlas's facts. Takes about seven minutes on one thread of a processor.

python scripts/atlas/train_claims.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from memorise import memorise, parser
from claims import ClaimMemoriser

from remend.assets import CLAIMS_FOLDER
from remend.data.claims import claim_set

if __name__ == "__main__":
    folder = CLAIMS_FOLDER
    made = parser(__doc__, folder / "model", folder / "model_report.json", Path("build/claims"))
    made.set_defaults(vocabulary=3072, width=128, layers=4, heads=4, epochs=20, phrasings=2)
    made.set_defaults(lr=1e-3, muon_lr=3e-3)
    memorise(ClaimMemoriser, claim_set(), made.parse_args())
