"""Libtpu, where it is installed, reads these while JAX is imported: else it looks for a TPU, complains that there is
none, and takes a lock that other compilers on this machine would wait for."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
