r"""The framing of the spool's segments: one record per line, with its length and checksum.

    00000011 a1b2c3d4 {"id": "..."}\n
    length   CRC-32   payload

Length (of the payload, in bytes) and CRC-32 (of the payload) are eight hexadecimal digits each. A payload holds no line
feed, so after damage the next record is found at the next line.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

_HEADER_BYTES = 18
_HEADER = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ")
MAX_PAYLOAD_BYTES = 0xFFFF_FFFF


@dataclass(slots=True)
class FrameScan:
    """What was found in a stretch of a segment.

    Attributes:
        payloads: The valid records, in order.
        end: Just behind the last valid record: where a torn tail begins, if there is one.
        damaged_bytes: Bytes before `end` that belong to no valid record. A crash tears only the tail, so these mean
            that the disk or a person changed the file.
    """

    payloads: list[bytes] = field(default_factory=list)
    end: int = 0
    damaged_bytes: int = 0


def encode_frames(payloads: Sequence[bytes]) -> bytes:
    """Frame payloads.

    Raises:
        ValueError: One holds a line feed or is 4 GiB or longer.
    """
    parts = []
    for payload in payloads:
        if b"\n" in payload:
            raise ValueError("a spooled record must not hold a line feed")
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError("a spooled record must be shorter than 4 GiB")
        parts.append(b"%08x %08x " % (len(payload), zlib.crc32(payload)))
        parts.append(payload)
        parts.append(b"\n")
    return b"".join(parts)


def scan_frames(data: bytes, *, max_records: int | None = None) -> FrameScan:
    """Read the records of a stretch that begins at a record's start. Never fails: what is not valid is passed over."""
    scan, position = FrameScan(), 0
    while position < len(data) and (max_records is None or len(scan.payloads) < max_records):
        end = _frame_end(data, position)
        if end is None:
            newline = data.find(b"\n", position)
            if newline < 0:
                break
            position = newline + 1
            continue
        scan.damaged_bytes += position - scan.end
        scan.payloads.append(data[position + _HEADER_BYTES : end - 1])
        scan.end = position = end
    return scan


def _frame_end(data: bytes, start: int) -> int | None:
    header = _HEADER.match(data, start)
    if header is None:
        return None
    end = start + _HEADER_BYTES + int(header[1], 16) + 1
    if end > len(data) or data[end - 1 : end] != b"\n":
        return None
    checksum = zlib.crc32(memoryview(data)[start + _HEADER_BYTES : end - 1])
    return end if checksum == int(header[2], 16) else None
