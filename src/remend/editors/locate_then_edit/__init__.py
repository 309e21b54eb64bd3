"""ROME and MEMIT: editors that find where a model recalls a fact and rewrite that place."""
