"""The paper's tables in miniature: compare editors on small models, beside the published figures.

Run ``python -m benchmarks.paper`` or ``make bench-paper`` from the root of the repository.
"""
