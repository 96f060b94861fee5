"""The steps of the walkthrough, one file for each part of a forward pass."""
