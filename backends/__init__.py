"""The backends that come with bnb_core. Each registers itself through the entry-point group ``bnb_core.backends``."""
