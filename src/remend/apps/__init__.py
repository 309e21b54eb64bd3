"""Applications on top of the library, each with its extra: acceptance tests, patch registry, hub and studio."""
