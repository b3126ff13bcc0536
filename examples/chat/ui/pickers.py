"""Lists to choose from: branches, models and conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Input, Label, OptionList, Tree
from textual.widgets.option_list import Option
from textual.widgets.tree import TreeNode

from ..models import DEFAULT, SUGGESTIONS, memory
from ..tree import Conversation, Message, titled
from .dialogs import Dialog


class Branches(Dialog[str]):
    """A dialog with a conversation's messages as a tree. Returns the id of the chosen message."""

    def __init__(self, conversation: Conversation) -> None:
        super().__init__()
        self._conversation = conversation
        self._path = {message.id for message in conversation.path}

    def compose(self) -> ComposeResult:
        tree: Tree[str] = Tree("Branches", id="branches")
        tree.show_root = False
        with Vertical(classes="box wide"):
            yield Label("Branches: enter goes to one. What they share is in the cache once.")
            yield tree

    def on_mount(self) -> None:
        tree = self.query_one(Tree)
        tree.root.expand()
        self._add(tree.root, None)
        tree.focus()

    def _add(self, node: TreeNode[str], parent: str | None) -> None:
        # Loops instead of recursion, because a conversation may be longer than Python's stack.
        stack = [(node, parent)]
        while stack:
            node, parent = stack.pop()
            children = self._conversation.children(parent)
            while len(children) == 1:
                self._leaf(node, children[0])
                children = self._conversation.children(children[0].id)
            stack += [(self._leaf(node, child, is_fork=True), child.id) for child in children]

    def _leaf(self, node: TreeNode[str], message: Message, is_fork: bool = False) -> TreeNode[str]:
        sign = "●" if message.id in self._path else "○"
        who = "you" if message.role == "user" else "model"
        label = Text(
            f"{sign} {who}: {titled(message.text) or '…'}", "bold" if message.id in self._path else ""
        )
        added = node.add(label, data=message.id, expand=is_fork, allow_expand=is_fork)
        if message.id == self._conversation.leaf:
            self.call_after_refresh(self.query_one(Tree).move_cursor, added)
        return added

    def on_tree_node_selected(self, event: Tree.NodeSelected[str]) -> None:
        if event.node.data is not None:
            self.dismiss(event.node.data)


class Models(Dialog[str]):
    """A dialog for the model: the one from the wheel (""), a suggestion, or any path or name."""

    def compose(self) -> ComposeResult:
        room = memory()
        with Vertical(classes="box wide"):
            yield Label(f"A model. This machine has {room:.0f} GB of memory.")
            yield Input(placeholder="folder of an mlx-lm model, or its name on the hub; enter takes it")
            options = [Option(f"{DEFAULT}   comes as a wheel, no download", id="")]
            for name, needed, what in SUGGESTIONS:
                fits = "" if needed <= room + 1 else "   (too large here)"
                options.append(Option(f"{name}   from {needed} GB: {what}{fits}", id=name))
            yield OptionList(*options, markup=False)

    @on(Input.Submitted)
    def _typed(self, event: Input.Submitted) -> None:
        if event.value.strip():
            self.dismiss(event.value.strip())

    @on(OptionList.OptionSelected)
    def _picked(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)


class Conversations(Vertical):
    """The list of conversations, with a search field."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f2", "app.rename", "Rename"),
        Binding("f8", "app.delete", "Delete"),
        Binding("escape", "app.write", "Back"),
    ]

    def __init__(self, find: Callable[[str], Sequence[Conversation]]) -> None:
        super().__init__(id="conversations")
        self._find = find
        self._colors: Callable[[str], str] = lambda name: ""

    def compose(self) -> ComposeResult:
        yield Input(placeholder="search")
        yield OptionList(markup=False)

    @property
    def highlighted(self) -> str | None:
        """The id of the conversation under the cursor."""
        options = self.query_one(OptionList)
        return (
            options.get_option_at_index(options.highlighted).id if options.highlighted is not None else None
        )

    def show(self, current: Conversation, color: Callable[[str], str]) -> None:
        """List the conversations that match the search."""
        self._colors = color
        options = self.query_one(OptionList)
        found = self._find(self.query_one(Input).value)
        options.clear_options()
        options.add_options([self._option(each, each is current) for each in found])
        place = next((i for i, each in enumerate(found) if each is current), None)
        options.highlighted = place if place is not None else (0 if found else None)

    def _option(self, conversation: Conversation, is_current: bool) -> Option:
        label = Text("● " if is_current else "○ ", self._colors(conversation.id))
        label.append(conversation.title, "bold" if is_current else "")
        return Option(label, id=conversation.id)
