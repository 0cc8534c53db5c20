"""Candidates: which layers of a model may be factored, and why others may not."""
