"""The chat as an application in a terminal."""
