"""What a user runs."""

import train  # noqa: F401  (so that megatron-core is quiet in every script, see train/__init__.py)
