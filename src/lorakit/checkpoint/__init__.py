"""Adapters on disk. The PEFT folder is the file format."""
