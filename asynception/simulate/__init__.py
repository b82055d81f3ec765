"""Whole runs in one process, on virtual time, with a network and parties that fail by a seed."""
