"""Making, checking and describing sets of shards: `asynception data`."""
