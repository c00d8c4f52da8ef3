"""The layer as a module, and what it is made of."""
