"""Adapters to other libraries. Nothing below this package knows of them."""
