"""The predictor's sequences of context and mask tokens."""
