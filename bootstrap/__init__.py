"""Sets up an environment for fpn_d2 with the standard library alone: ``python3 -m bootstrap --help``."""
