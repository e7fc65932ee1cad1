"""The paged key/value cache: attention over it, appending to it, and the host's bookkeeping of its pages."""
