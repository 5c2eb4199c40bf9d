"""Says why tests were skipped, whoever runs them."""

from typing import Any


def pytest_configure(config: Any) -> None:
    """As `-rs` would."""
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"
