"""Attention over a sequence whose shards lie on several devices."""
