"""Figures, tables and pictures of a model's results."""
