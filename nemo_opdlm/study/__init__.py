"""A study: the method beside its alternatives on real small models, cell by cell (examples/study)."""
