"""The QMP contract as Python types, the visitors over it, and its introspection."""
