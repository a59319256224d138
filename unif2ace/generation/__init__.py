"""Parallel masked-token generation of faces, and decoding of answers."""
