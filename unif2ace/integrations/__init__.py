"""Bridges to other people's libraries, one module each; nothing else in the package imports them."""
