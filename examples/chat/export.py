"""Exports a conversation as a Markdown file."""

from __future__ import annotations

from .tree import Conversation

NAMES = {"user": "You", "assistant": "Model"}


def as_markdown(conversation: Conversation) -> str:
    """Format the current branch as Markdown. A rule marks the end of the forgotten messages."""
    path = conversation.path
    start = path[-1].start if path else 0
    parts = [f"# {conversation.title or 'Conversation'}"]
    if conversation.system:
        parts.append("\n".join(f"> {line}" for line in conversation.system.splitlines()))
    for index, message in enumerate(path):
        if start and index == start:
            parts.append("---\n\n*The model had forgotten what is above.*\n\n---")
        parts.append(f"**{NAMES[message.role]}**\n\n{message.text.strip()}")
    return "\n\n".join(parts) + "\n"


def file_name(conversation: Conversation) -> str:
    """Make a file name from the conversation's title and id that is valid on every file system."""
    kept = "".join(c if c.isalnum() else "-" for c in conversation.title.lower())
    return (
        "-".join(filter(None, kept.split("-")))[:60]
        + f"{'-' if kept.strip('-') else ''}{conversation.id[:6]}.md"
    )
