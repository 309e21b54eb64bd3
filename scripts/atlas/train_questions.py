"""Train the model that answers questions, a T5, on the atlas's facts. Takes some minutes on one thread of a processor.

python scripts/atlas/train_questions.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from base_trainer import parser, train_on_facts
from question_trainer import QuestionTrainer

from remend.assets import QUESTIONS_FOLDER
from remend.data.atlas_questions import fact_set

if __name__ == "__main__":
    folder = QUESTIONS_FOLDER
    arguments = parser(__doc__, folder / "model", folder / "model_report.json", Path("build/questions"))
    arguments.set_defaults(vocabulary=3072, width=128, layers=3, heads=4, epochs=10)
    arguments.set_defaults(
        lr=0.03, muon_lr=0.004
    )  # a T5's embeddings begin with unit variance, so they have far to move
    train_on_facts(QuestionTrainer, fact_set(), arguments.parse_args())
