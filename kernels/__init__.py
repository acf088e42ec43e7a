"""The operations that models are made of, one table of them per kind of device.

The Hugging Face distribution of the same name is probed for by transformers, which asks for its version: `__version__ = "0"`
tells it that no kernels come from here.
"""

__version__ = "0"
