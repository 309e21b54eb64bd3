"""The metrics: what is measured of a model before and after an edit, and how each value is computed."""
