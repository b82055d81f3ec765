"""Several hosts on one machine: network namespaces joined by a bridge, a Ray node in each."""
