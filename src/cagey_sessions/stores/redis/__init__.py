"""Users in Redis."""
