"""A chat in the terminal that prefills no token twice."""
