"""`init`: a configuration of one's own, which fits the memory that there is."""
