"""Learning: corpus → tokens → batches → training steps → a folder that `load` reads."""
