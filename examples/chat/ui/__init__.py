"""The chat's screen: an application in a terminal."""
