"""The picture in the docs: small, and drawn by the script that is beside it."""

import io

from benchmarks import masks_picture


def test_the_picture_is_small_and_can_be_drawn_again():
    committed = masks_picture.PICTURE.read_bytes()
    assert committed.startswith(b"\x89PNG") and len(committed) < 300_000
    drawn = io.BytesIO()
    masks_picture.draw().savefig(drawn, format="png")
    assert 0.5 < len(drawn.getvalue()) / len(committed) < 2
