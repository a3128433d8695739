"""TFRecord files of tf.train.Example messages, without TensorFlow.

A record is its length (uint64, little-endian), the masked CRC-32C of those 8 bytes, the data, and the masked CRC-32C of the
data (tensorflow.org, "TFRecord and tf.train.Example"). The message is Example.features (field 1) -> map<string, Feature>
(1) -> one of bytes_list (1), float_list (2), int64_list (3), each with repeated values in field 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from diffalign.errors import DataError

DAMAGED = "a damaged record"
POINTER = b"version https://git-lfs"
HEADER = struct.Struct("<QI")


def _table() -> list[int]:
    """Remainders of all bytes by Castagnoli's polynomial, bits reversed (RFC 3720, appendix B.4)."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C."""
    crc, table = 0xFFFFFFFF, TABLE
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """CRC-32C, turned and shifted, as checksums of data that hold checksums are."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(file: Path) -> Iterator[bytes | None]:
    """The data of every record; None for a damaged one. After a damaged length the next whole header is looked for.

    Raises:
        DataError: it is no file of records at all.
    """
    size, before = file.stat().st_size, 0
    with file.open("rb") as f:
        if f.read(len(POINTER)) == POINTER:
            raise DataError(f"{file}: a Git LFS pointer, not the file itself", hint="run `git lfs pull` where you cloned it")
        f.seek(0)
        while (at := f.tell()) < size:
            found = _length(f.read(HEADER.size), size - at)
            if found is None:
                yield None
                if not _seek_header(f, at + 1, size):
                    if not before:
                        raise DataError(f"{file}: not a TFRecord file")
                    return
                continue
            data, check = f.read(found), f.read(4)
            yield data if masked(data) == int.from_bytes(check, "little") else None
            before += 1


def _length(header: bytes, rest: int) -> int | None:
    """The length that a header states, if its checksum holds and the file is long enough."""
    if len(header) < HEADER.size:
        return None
    length, check = HEADER.unpack(header)
    return length if length + HEADER.size + 4 <= rest and masked(header[:8]) == check else None


def _seek_header(f: BinaryIO, start: int, size: int) -> bool:
    """Go to the first header at or after ``start``; False where there is none."""
    f.seek(start)
    rest = f.read()
    for i in range(len(rest) - HEADER.size + 1):
        if _length(rest[i : i + HEADER.size], size - start - i) is not None:
            f.seek(start + i)
            return True
    return False


def example(data: bytes) -> dict[str, list[Any]]:
    """The features of a tf.train.Example by name: lists of bytes, floats or integers.

    Raises:
        ValueError: the bytes are no such message.
    """
    out: dict[str, list[Any]] = {}
    for number, features in _fields(data):
        for inner, entry in _fields(features) if number == 1 and isinstance(features, bytes) else ():
            if inner == 1 and isinstance(entry, bytes):
                parts = dict(_fields(entry))
                name, feature = parts.get(1), parts.get(2)
                if isinstance(name, bytes) and isinstance(feature, bytes):
                    out[name.decode()] = _values(feature)
    return out


def _values(feature: bytes) -> list[Any]:
    values: list[Any] = []
    for kind, inner in _fields(feature):
        for number, value in _fields(inner) if isinstance(inner, bytes) else ():
            if number != 1:
                continue
            if kind == 1:
                values.append(value)
            elif kind == 2:  # packed, or one at a time
                values += [x for (x,) in struct.iter_unpack("<f", value)] if isinstance(value, bytes) else [value]
            elif kind == 3:
                whole = _varints(value) if isinstance(value, bytes) else [value]
                values += [x - (1 << 64) if isinstance(x, int) and x >> 63 else x for x in whole]
    return values


def _varints(data: bytes) -> list[int]:
    out, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        out.append(value)
    return out


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError("a number is cut short")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: bytes, integers, or floats of 4 bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value: Any
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            length, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field is cut short")
            value, at = data[at : at + length], at + length
            value = struct.unpack("<f", value)[0] if wire == 5 else value
        else:
            raise ValueError(f"no wire type {wire}")
        yield number, value


def tfrecord_rows(file: Path) -> Iterator[dict[str, Any]]:
    """A row a record: one value a feature, or a list of several; ``{"error": ...}`` for a damaged one."""
    for data in records(file):
        try:
            found = None if data is None else example(data)
        except ValueError:  # also of names that are no UTF-8
            found = None
        yield {"error": DAMAGED} if found is None else {k: v[0] if len(v) == 1 else v or None for k, v in found.items()}
