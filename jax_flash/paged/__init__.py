"""The paged key/value cache: attention over it, appending to it, and the allocation of its pages on the host."""
