"""What holds for all tests."""

import signal

from documented import summary
from hypothesis import settings

# No test may fail because the machine does other work.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")

# A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return summary()
