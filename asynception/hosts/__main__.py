"""`python -m asynception.hosts`: see `asynception.hosts.demo`."""

from asynception.hosts.demo import main

if __name__ == "__main__":
    main()
