"""Adapters for any PyTorch model: Method (what is trained) × Host (what it sits on) × Store (the base)."""
