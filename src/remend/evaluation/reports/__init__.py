"""Evaluation reports: the JSON schema, reading, comparing, HTML and plots."""
