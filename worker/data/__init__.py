"""Samples by (shard, index), their order by position, and batches of decoded images."""
