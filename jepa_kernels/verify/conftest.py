"""Says why tests were skipped, whoever runs them."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """As `-rs` does; where these tests are named with `--pyargs`, this file comes too late to set the option."""
    if "s" not in terminalreporter.reportchars:
        terminalreporter.reportchars += "s"
