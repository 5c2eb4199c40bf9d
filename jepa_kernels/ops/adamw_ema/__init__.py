"""AdamW, the exponential moving average of the weights it moves, and low-precision copies of both, in one pass."""
