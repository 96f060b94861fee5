"""From files to a model: the only package that imports both formats and models."""
