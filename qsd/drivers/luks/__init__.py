"""LUKS1: the encrypted volume as a driver of its own, and what qcow2 needs to hold one."""
