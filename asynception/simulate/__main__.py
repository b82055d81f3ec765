"""`python -m asynception.simulate`: see `asynception.simulate.command`."""

import sys

from asynception.simulate.command import main

if __name__ == "__main__":
    sys.exit(main())
