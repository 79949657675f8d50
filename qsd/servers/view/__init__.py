"""The daemon as a directory: a read-only tree of what there is, mounted with pyfuse3 (object ``qsd-view``)."""
