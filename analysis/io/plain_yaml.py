"""Bounded reader of YAML from unknown origin as plain data: mappings, lists, text and numbers, never code."""

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES, MOST_DEPTH, MOST_NODES = 1_000_000, 40, 100_000
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_NUMBERS = {  # decimal only: YAML 1.1 would read 010 as 8 and 1:30 as 90, and JSON's 1e-05 as text
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
        r"|\.(?:nan|NaN|NAN)$"
    ),
}
_DROPPED = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "value")}
_ADVICE = {  # by the start of PyYAML's reason
    "found character '\\t'": "; indent with spaces, not with tabs",
    "mapping values are not allowed": "; put text that contains a colon and a space in quotes",
    "found undefined alias": "; put text that starts with * in quotes",
    "found character '%'": "; put text that starts with % in quotes",
    "found character '@'": "; put text that starts with @ in quotes",
    "found character '`'": "; put text that starts with ` in quotes",
    "but found another document": ": the file has two documents, divided by ---; give one",
}
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"} | {
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class PlainYamlError(ValueError):
    """Text that is not plain YAML; the message is one line with the position and the reason."""


class _Loader(yaml.SafeLoader):
    """Safe loader without tags and dates. A key is text as it is written: `no`, `1` and `null` are names.

    It refuses a key given twice, of which PyYAML would drop one.
    """

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
        if isinstance(node, yaml.ScalarNode):
            node.value = _joined(node.value)
            if bad := _UNPRINTABLE.search(node.value):
                _refuse(f"character {bad[0]!a} is not allowed", event.start_mark)
        if isinstance(node, yaml.MappingNode):
            node.value = _named(node.value)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > 20:
            _refuse(f"the number {node.value[:20]}... has {len(node.value)} digits; allowed: 20", node.start_mark)
        return super().construct_yaml_int(node)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that puts text in quotes that `_Loader` would read as a number, and SafeDumper would not."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBERS["tag:yaml.org,2002:float"], list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refuse(problem: str, mark: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


def _named(pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return the pairs of a mapping with their keys as text. A key `<<` that is not in quotes merges a mapping."""
    seen: set[str] = set()
    named = []
    for key, value in pairs:
        if not isinstance(key, yaml.ScalarNode):
            _refuse("a key must be text, not a list or mapping", key.start_mark)
        if key.value in seen:
            _refuse(f"key '{key.value}' is given twice", key.start_mark)
        seen.add(key.value)
        tag = _MERGE if key.tag == _MERGE else _TEXT
        named.append((yaml.ScalarNode(tag, key.value, key.start_mark, key.end_mark, key.style), value))
    return named


def _joined(text: str) -> str:
    """Return a text in which each pair of surrogates, as JSON writes a character, is that character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def parse(text: str) -> Any:
    """Return the value of a YAML text. Raises PlainYamlError if it is not plain YAML."""
    loader = None
    if text.lstrip().startswith(("{", "[")):
        text = text.replace("\t", " ")  # JSON that is indented with tabs, which YAML does not allow
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} " if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        advice = next((said for start, said in _ADVICE.items() if reason.startswith(start)), "")
        raise PlainYamlError(f"{where}is not YAML: {' '.join(reason.split())}{advice}") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump(content: Any) -> str:
    """Return plain data as YAML, from which `parse` makes the same data."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read(path: Path) -> Any:
    """Return the value in a YAML file of at most 1 MB. Raises PlainYamlError if it is not plain YAML, or OSError."""
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise PlainYamlError(f"has more than {MOST_BYTES:,} bytes")
    return parse(decoded(raw))


def decoded(raw: bytes) -> str:
    """Return the text of a file: UTF-8, or what its byte order mark says. Raises PlainYamlError if it is neither."""
    encoding = next((name for mark, name in _BOMS.items() if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise PlainYamlError(
            f"is not {encoding.removesuffix('-sig').upper()} text (offset {error.start}); save it as UTF-8"
        ) from None
