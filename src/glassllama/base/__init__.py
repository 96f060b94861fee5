"""Configuration, errors and interfaces that all packages share. Standard library and NumPy only."""
