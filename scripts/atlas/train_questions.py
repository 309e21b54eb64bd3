"""Train the question answerer, a T5, on the atlas's facts. Takes some minutes on one thread of a processor.

python scripts/atlas/train_questions.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from memorise import memorise, parser
from questions import QuestionMemoriser

from remend.assets import QUESTIONS_FOLDER
from remend.data.questions import fact_set

if __name__ == "__main__":
    folder = QUESTIONS_FOLDER
    made = parser(__doc__, folder / "model", folder / "model_report.json", Path("build/questions"))
    made.set_defaults(vocabulary=3072, width=128, layers=3, heads=4, epochs=10)
    made.set_defaults(lr=0.03, muon_lr=0.004)  # a T5 begins with embeddings of unit variance, which must move far
    memorise(QuestionMemoriser, fact_set(), made.parse_args())
