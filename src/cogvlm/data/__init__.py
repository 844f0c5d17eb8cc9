"""Training data: fonts, text, rendered lines; no torch at import."""
