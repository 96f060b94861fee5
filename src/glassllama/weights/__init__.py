"""From files to a model: names, configurations, tokenizers; the only room that knows both."""
