"""Damage to bytes, drawn at random: bits, cuts, splices, lengths; and damage that keeps the checksums of PNG and tar right."""

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

_BLOCK = 512  # of tar
_PNG = b"\x89PNG\r\n\x1a\n"
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
)
_WORDS = (
    *("", "-1", "0", "1e309", "nan", "null", "true", "[]", "{}", '"', ",", ",,", "\0", "\r", "\n\n", "../../x", "/", "\ufeff"),
    *("99999999999999999999", "\u202e", "\u0664", "a" * 5000, "[" * 3000, "%s", "{0..9}", "\ud800"),
)


def damaged(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The name of a mutation, and what it makes of a file; some files are damaged twice or three times."""
    names: list[str] = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name = draw.choice([*mutations(content)])
        content = mutations(content)[name](content, draw)
        names.append(name)
    return " + ".join(names), content


def mutations(content: bytes) -> dict[str, Mutation]:
    """What can be done to a file with this content, by name."""
    found: dict[str, Mutation] = {
        "bits": _bits,
        "cut": _cut,
        "removed": _removed,
        "spliced": _spliced,
        "overwritten": _overwritten,
        "length": _length,
        "noise": _noise,
    }
    if content.startswith(_PNG):
        found["png chunk"] = _png_chunk
    if content[257:262] == b"ustar":
        found["tar header"] = _tar_header
    if _is_text(content):
        found |= {"word": _word, "line": _line}
    if content[:1] in (b"{", b"["):
        found["json value"] = _json_value
    return found


def _is_text(content: bytes) -> bool:
    return not any(byte < 9 for byte in content[:200])


def _place(content: bytes, draw: random.Random) -> int:
    """A place; every other time near an end, where headers and directories are."""
    size = len(content)
    near = draw.choice((0, max(0, size - 64), -1, -1))
    return draw.randrange(max(1, size)) if near < 0 else min(max(0, size - 1), near + draw.randrange(64))


def _span(content: bytes, draw: random.Random) -> slice:
    start = _place(content, draw)
    return slice(start, start + draw.choice((1, 2, 4, 16, 64, 512, len(content) // 4 + 1)))


def _bits(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 2, 8, 64)) if content else 0):
        changed[_place(content, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: _place(content, draw)]


def _removed(content: bytes, draw: random.Random) -> bytes:
    span = _span(content, draw)
    return content[: span.start] + content[span.stop :]


def _spliced(content: bytes, draw: random.Random) -> bytes:
    part, place = content[_span(content, draw)], _place(content, draw)
    return content[:place] + part * draw.choice((1, 1, 2, 50)) + content[place:]


def _overwritten(content: bytes, draw: random.Random) -> bytes:
    span = _span(content, draw)
    filling = draw.choice((b"\0", b"\xff", content[_span(content, draw)] or b"a"))
    length = min(span.stop, len(content)) - span.start
    return content[: span.start] + (filling * (length + 1))[: max(0, length)] + content[span.stop :]


def _length(content: bytes, draw: random.Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes, of either byte order, in the place of what is there."""
    place, size = _place(content, draw), draw.choice((1, 2, 4, 8))
    number = draw.choice(_NUMBERS) % 256**size
    return content[:place] + number.to_bytes(size, draw.choice(("little", "big"))) + content[place + size :]


def _noise(content: bytes, draw: random.Random) -> bytes:
    place = _place(content, draw)
    return content[:place] + draw.randbytes(draw.choice((1, 16, 700))) + content[place:]


def _png_chunk(content: bytes, draw: random.Random) -> bytes:
    """A damaged chunk with the right checksum."""
    chunks, place = list[tuple[bytes, bytes]](), len(_PNG)
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return content
    number = draw.randrange(len(chunks))
    kind, body = chunks[number]
    chunks[number] = kind, draw.choice((_bits, _length, _removed, _spliced))(body, draw)
    return _PNG + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _tar_header(content: bytes, draw: random.Random) -> bytes:
    """A damaged header with the right checksum: a name, a size, a type, also numbers that are negative or too large."""
    starts = [at for at in range(0, len(content) - _BLOCK + 1, _BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    start = draw.choice(starts)
    header = bytearray(content[start : start + _BLOCK])
    number = draw.choice((-1, -512, -1024, -1536, 1, 511, 2**33, 2**62))
    field = draw.choice(("size", "size", "type", "name", "bits"))
    if field == "size":
        header[124:136] = tar_number(number)
    elif field == "type":
        header[156] = draw.choice(b"0123456 7LKxgSDVM\0\xff")
    elif field == "name":
        header[draw.randrange(100)] = draw.choice(b"\0/.\xff ")
    else:
        header[draw.randrange(_BLOCK)] ^= 1 << draw.randrange(8)
    return content[:start] + tar_summed(header) + content[start + _BLOCK :]


def tar_number(number: int) -> bytes:
    """A number of a tar header as GNU writes those that are negative or large."""
    return b"\x80" + number.to_bytes(11, "big") if number >= 0 else (256**12 + number).to_bytes(12, "big")


def tar_summed(header: bytearray) -> bytes:
    """A tar header with its checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _word(content: bytes, draw: random.Random) -> bytes:
    """One word of a text is another."""
    words = content.split(draw.choice((b",", b" ", b'"', b"\n")))
    separator = content[len(words[0]) : len(words[0]) + 1]
    words[draw.randrange(len(words))] = draw.choice(_WORDS).encode("utf-8", "surrogatepass")
    return (separator or b" ").join(words)


def _line(content: bytes, draw: random.Random) -> bytes:
    """A line is there again, missing, or in another encoding."""
    lines = content.split(b"\n")
    number = draw.randrange(len(lines))
    other = lines[number].decode("latin-1").encode(draw.choice(("utf-16", "utf-7", "latin-1")))
    lines[number : number + 1] = draw.choice(([], [lines[number]] * 2, [other], [lines[number] + b"\xff\xfe"]))
    return b"\n".join(lines)


def _json_value(content: bytes, draw: random.Random) -> bytes:
    """One value of a JSON file is of another kind."""
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return content
    top: dict[Any, Any] = {"": root}
    holder: Any = top
    while True:
        key = draw.choice([*holder] if isinstance(holder, dict) else [*range(len(holder))])
        inner = holder[key]
        if not (isinstance(inner, dict | list) and inner and draw.random() < 0.8):
            break
        holder = inner
    value = draw.choice((None, -1, 2**70, 1.5, float("nan"), "x", "", [], {}, [[]], {"a": None}, True))
    holder[key] = value
    return json.dumps(top[""]).encode()
