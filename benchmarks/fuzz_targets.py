"""What decodes bytes that come over the wire or lie on a disk, each as a function of bytes alone.

Each raises what its caller is promised for bytes that are none of ours, and nothing else:
`fuzz.py` looks for anything else.
"""

from fuzz_files import FILE_TARGETS
from fuzz_wire import WIRE_TARGETS

TARGETS = {**WIRE_TARGETS, **FILE_TARGETS}
"""By name."""
