"""Bounded reader of YAML from unknown origin as plain data: mappings, lists, text and numbers, never code."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES, MOST_DEPTH, MOST_NODES = 1_000_000, 40, 100_000
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBERS = {  # decimal only: YAML 1.1 would read 010 as 8 and 1:30 as 90
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))$"
        r"|\.(?:nan|NaN|NAN)$"
    ),
}
_DROPPED = {f"tag:yaml.org,2002:{name}" for name in ("merge", "timestamp", "value")}


class PlainYamlError(ValueError):
    """Text that is not plain YAML; the message is one line with the position and the reason."""


class _Loader(yaml.SafeLoader):
    """Safe loader without tags, dates and merge keys; it refuses a key given twice, of which PyYAML would drop one."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own table of the class)
        first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in rows if tag not in _DROPPED]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # id of a node -> number of nodes in it, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            _refuse(f"tag {event.tag} is not allowed: plain values only", event.start_mark)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            _refuse(f"more than {MOST_DEPTH} levels deep", event.start_mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                _refuse(f"alias *{event.anchor} is inside the value that it names", event.start_mark)
            return node
        inside = [] if isinstance(node, yaml.ScalarNode) else node.value
        children = [child for pair in inside for child in (pair if isinstance(pair, tuple) else (pair,))]
        self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in children)
        if self._sizes[id(node)] > MOST_NODES:
            _refuse(f"more than {MOST_NODES} values, with aliases written out", event.start_mark)
        if isinstance(node, yaml.ScalarNode) and (bad := _UNPRINTABLE.search(node.value)):
            _refuse(f"character {bad[0]!a} is not allowed", event.start_mark)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > 20:
            _refuse(f"the number {node.value[:20]}... has {len(node.value)} digits; allowed: 20", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                _refuse("a key must be text, not a list or mapping", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                _refuse(f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refuse(problem: str, mark: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


def parse(text: str) -> Any:
    """Return the value of a YAML text. Raises PlainYamlError if it is not plain YAML."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} " if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise PlainYamlError(f"{where}is not YAML: {' '.join(reason.split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read(path: Path) -> Any:
    """Return the value in a YAML file of at most 1 MB. Raises PlainYamlError if it is not plain YAML, or OSError."""
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise PlainYamlError(f"has more than {MOST_BYTES:,} bytes")
    try:
        return parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise PlainYamlError("is not UTF-8 text") from None
