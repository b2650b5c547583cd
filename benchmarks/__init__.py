"""Measurements. Run them on a quiet machine; what was seen, where and when is in NOTES.md."""
