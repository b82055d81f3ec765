"""What holds for all tests."""

from hypothesis import settings

# No test may fail because the machine does other work.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")
