"""The parts of a Llama, one idea a file: norm, rope, attention, feed_forward, cache, watch."""
