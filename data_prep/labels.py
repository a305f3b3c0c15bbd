"""Label maps: the files that number labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from data_prep.errors import UserError
from data_prep.reading import json_of, read_text, word

# A number takes a place in a list of names, so a huge one is a mistake that would fill the memory.
MOST_LABELS = 1_000_000
# Of protobuf's text format what label maps use: entries that hold fields with one word or a quoted text.
_PROTO_FIELD = re.compile(r"""(\w+)\s*:\s*(?:(["'])(.*?)\2|(\d+|\w+))""")
_PROTO_ENTRY = re.compile(r"""\b(?:label|item)\s*\{((?:"[^"]*"|'[^']*'|[^{}"'])*)\}""")
_NUMBERED = re.compile(r"([0-9]{1,9}): +(.*)")


def read_label_map(path: str) -> list[str]:
    """Label names by number from a file; numbers without a name get an empty one.

    One name a line (an empty line is a number without a name), `number: name` lines, a JSON object
    `{name: number}` (Something-Something V2), or AVA's `.pbtxt` of labels or items. Raises UserError for a name
    that comes twice and a number that has two names.
    """
    text = read_text(path, "--label-map")
    if path.endswith(".json"):
        pairs = list(_json_labels(text, path))
    elif path.endswith(".pbtxt"):
        pairs = list(_text_proto_labels(text, path))
    else:
        pairs = list(_line_labels(text, path))
    numbered: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for number, name in pairs:
        word(name, f"--label-map {path}", f"the name of label {number}")
        if number >= MOST_LABELS:
            raise UserError(
                f"--label-map {path}: {name!r} has the number {number}; below {MOST_LABELS} is possible"
            )
        if numbers.setdefault(name, number) != number:
            raise UserError(f"--label-map {path}: {name!r} is both {numbers[name]} and {number}")
        if numbered.setdefault(number, name) != name:
            raise UserError(f"--label-map {path}: {number} is both {numbered[number]!r} and {name!r}")
    if not numbered:
        raise UserError(f"--label-map {path}: it names no labels")
    return [numbered.get(index, "") for index in range(max(numbered) + 1)]


def _line_labels(text: str, path: str) -> Iterator[tuple[int, str]]:
    lines = [line.strip() for line in text.split("\n")]
    matches = [_NUMBERED.fullmatch(line) for line in lines]
    numbered = [match for match in matches if match]
    if not numbered:
        yield from ((number, line) for number, line in enumerate(lines) if line)
        return
    for number, (line, match) in enumerate(zip(lines, matches, strict=True), 1):
        if line and not match:
            raise UserError(
                f"--label-map {path}: line {number} is not `number: name` as others are: {line!r}"
            )
    yield from ((int(match[1]), match[2]) for match in numbered)


def _json_labels(text: str, path: str) -> Iterator[tuple[int, str]]:
    numbers = json_of(text, path)
    if not isinstance(numbers, dict):
        raise UserError(f'--label-map {path}: not a JSON object of {{"name": number}}')
    for name, number in numbers.items():
        if isinstance(number, bool) or not re.fullmatch(r"[0-9]{1,9}", str(number)):
            raise UserError(
                f'--label-map {path}: not a JSON object of {{"name": number}}: {name!r} has {number!r}'
            )
        yield int(number), name


def _text_proto_labels(text: str, path: str) -> Iterator[tuple[int, str]]:
    """`label { name: "..." label_id: 1 label_type: ... }`, or `item { name: "..." id: 1 }` (AVA at ActivityNet)."""
    for entry in _PROTO_ENTRY.findall(text):
        fields = {name: quoted or bare for name, _, quoted, bare in _PROTO_FIELD.findall(entry)}
        index = fields.get("label_id", fields.get("id", ""))
        if not re.fullmatch(r"[0-9]{1,9}", index) or "name" not in fields:
            raise UserError(f"--label-map {path}: no name and number in {' '.join(entry.split())!r}")
        yield int(index), fields["name"]


def numbered_names(names: Iterable[str], label_map: str | None) -> list[str]:
    """All label names by number: those of the label map, or `names` in their order.

    Raises UserError if the label map lacks one of `names`.
    """
    used = sorted(set(names))
    if label_map is None:
        return used
    labels = read_label_map(label_map)
    known = set(labels) - {""}
    unknown = [name for name in used if name not in known]
    if unknown:
        raise UserError(f"--label-map {label_map}: {len(unknown)} labels are not in it, first {unknown[0]!r}")
    return labels
