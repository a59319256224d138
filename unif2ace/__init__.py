"""UniF2ace: one transformer that understands and generates faces, on a custom-kernel engine.

Importing the package touches no GPU, loads no weights and needs neither Triton nor the compiled extension.
"""

__version__ = "0.1.0"
