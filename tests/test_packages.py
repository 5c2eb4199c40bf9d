"""What `python -m tests.packages` says and writes; it is itself what `make wheel` and `make torches` run."""

import pytest

from tests import packages


def rows(*torches: str, tensors: int = 1) -> list[dict[str, object]]:
    return [{"torch": torch, "tensors": tensors} for torch in torches]


def test_adopting_one_version_leaves_the_others_oldest_first():
    before, new = rows("2.9.0+cpu", "2.13.0+cpu", "2.15.0+cu132"), rows("2.13.0+cu130", "2.11.1", tensors=2)
    assert packages.adopted(before, new) == [before[0], new[1], new[0], before[2]]


@pytest.mark.parametrize(
    "words, why",
    [
        (["wheel", "--adopt"], "--adopt must come with `torches`, got `wheel`; leave it out"),
        (["wheel", "2.13.0"], "versions of torch come with `torches`, and with it alone"),
        (["torches"], "versions of torch come with `torches`, and with it alone"),
    ],
)
def test_words_that_would_be_ignored_are_refused(words, why, capsys):
    with pytest.raises(SystemExit, match="2"):
        packages.main(words)
    assert why in capsys.readouterr().err
