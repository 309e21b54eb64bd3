"""Applications on top of the library, each with an extra of its own: acceptance, patch registry, hub and studio."""
