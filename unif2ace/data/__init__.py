"""Labelled faces: drawing them, describing them, storing them, loading them."""
