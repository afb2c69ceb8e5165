"""Variants of the pyramid, trained on the same scenes."""
