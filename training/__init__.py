"""Trains the small checkpoint that comes with the package. Not part of the wheel."""
