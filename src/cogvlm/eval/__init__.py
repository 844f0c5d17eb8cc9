"""Measuring answers against the truth."""
