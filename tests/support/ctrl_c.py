"""A process that hears Ctrl-C, whatever started the tests."""

import signal


def heard() -> None:
    """A `preexec_fn`: what a shell starts in the background ignores SIGINT, and so would what that
    starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
