"""Training modes side by side: runs under equal conditions, and a report on them."""
