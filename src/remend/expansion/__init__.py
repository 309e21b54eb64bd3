"""From one request to the set of prompts that should move with it, and of those that should not.

- :mod:`~remend.expansion.whole_set`: the set of a request, whole;
- :mod:`~remend.expansion.phrasings`: other ways to ask the same;
- :mod:`~remend.expansion.writers`: those that another model writes;
- :mod:`~remend.expansion.implications`: what follows from the edit;
- :mod:`~remend.expansion.neighbours`: what is near and must stay;
- :mod:`~remend.expansion.mining`: what a trial edit disturbs;
- :mod:`~remend.expansion.probes`: the same rules, for what edits are scored by.
"""

from remend.expansion.probes import add_probes
from remend.expansion.whole_set import ExpandConfig, Expansion, expand

__all__ = ["ExpandConfig", "Expansion", "add_probes", "expand"]
