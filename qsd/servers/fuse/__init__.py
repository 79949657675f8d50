"""FUSE exports: a node as a regular file, the kernel's protocol spoken over /dev/fuse."""
