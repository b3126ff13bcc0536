"""Lists to choose from: branches, models and conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Input, Label, OptionList, Tree
from textual.widgets.option_list import Option
from textual.widgets.tree import TreeNode

from ..models import DEFAULT, SUGGESTIONS, cached_models, memory, models_in
from ..thinking import MARKS, Marks, parted
from ..tree import Conversation, Message, titled
from .dialogs import Dialog


class Branches(Dialog[str]):
    """A dialog with a conversation's messages as a tree. Returns the id of the chosen message."""

    def __init__(self, conversation: Conversation, marks: tuple[Marks, ...] = MARKS) -> None:
        super().__init__()
        self._marks = marks
        self._conversation = conversation
        self._path = {message.id for message in conversation.path}
        self._newest: TreeNode[str] | None = None

    def compose(self) -> ComposeResult:
        tree: Tree[str] = Tree("Versions", id="branches")
        tree.guide_depth = 3
        tree.show_root = False
        with Vertical(classes="box wide"):
            yield Label(
                "Versions: enter goes to one, ● is on the screen. What they share is read and kept once."
            )
            yield tree

    def on_mount(self) -> None:
        tree = self.query_one(Tree)
        tree.root.expand()
        self._add(tree.root, None)
        # Asking for the last line gives all nodes theirs. The next key finds the cursor in its place.
        if tree.last_line >= 0:
            tree.move_cursor(self._newest)
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
            stack += [
                (self._leaf(node, child, f"{place} of {len(children)}"), child.id)
                for place, child in enumerate(children, 1)
            ]

    def _leaf(self, node: TreeNode[str], message: Message, place: str = "") -> TreeNode[str]:
        """Add a message. An alternative, with its place, is a node in which what follows it is listed."""
        is_shown, is_fork = message.id in self._path, bool(place)
        label = Text("● " if is_shown else "○ ", "bold" if is_shown else "dim")
        if place:
            label.append(f" {place} ", "reverse")
            label.append(" ")
        said = titled(parted(message.text, self._marks)[1] or message.text) or "…"
        label.append(f"{'You' if message.role == 'user' else 'Model'}: {said}", "bold" if is_shown else "")
        added = node.add(label, data=message.id, expand=is_fork, allow_expand=is_fork)
        if message.id == self._conversation.leaf:
            self._newest = added
        return added

    def on_tree_node_selected(self, event: Tree.NodeSelected[str]) -> None:
        if event.node.data is not None:
            self.dismiss(event.node.data)


class Models(Dialog[str]):
    """A dialog for the model: that of the wheel (""), one on this machine, a suggestion, or any other."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="box wide"):
            yield Label(f"A model. This machine has {memory():.0f} GB of memory.")
            yield Input(placeholder="a name on the hub, or a folder; enter takes it")
            yield OptionList(markup=False)

    def on_mount(self) -> None:
        self._list("")

    def _list(self, typed: str) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(self._options(typed))
        options.highlighted = 0 if options.option_count else None

    def _options(self, typed: str) -> list[Option]:
        """The models whose names contain what is typed, or those in the folder of this name."""
        if typed and (path := Path(typed).expanduser()).is_dir():
            return [Option(f"{found.name}   in this folder", id=str(found)) for found in models_in(path)]
        room, here = memory(), cached_models()
        options = [Option(f"{DEFAULT}   comes as a wheel, no download", id="")]
        options += [Option(f"{name}   on this machine", id=name) for name in here]
        for name, needed, what in SUGGESTIONS:
            fits = "" if needed <= room + 1 else "   (too large here)"
            if name not in here:
                options.append(Option(f"{name}   from {needed} GB: {what}{fits}", id=name))
        return [option for option in options if typed.lower() in str(option.prompt).lower()]

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        self._list(event.value.strip())

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
        Binding("down", "enter_list", show=False),
        Binding("escape", "app.write", "Back"),
    ]

    def __init__(self, find: Callable[[str], Sequence[Conversation]]) -> None:
        super().__init__(id="conversations")
        self._find = find
        self._colors: Callable[[str], str] = lambda name: ""

    def compose(self) -> ComposeResult:
        yield Input(placeholder="search")
        yield OptionList(markup=False)

    def action_enter_list(self) -> None:
        self.query_one(OptionList).focus()

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
