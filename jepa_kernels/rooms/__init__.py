"""Rooms of minigrid with a few objects: questions about them, VL-JEPA on these, and streams to decode selectively."""
