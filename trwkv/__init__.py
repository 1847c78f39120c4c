"""trwkv: multiple temporal perspectives for RWKV, fast."""

__version__ = "0.1.0"
