"""What instructions a cubin holds, read from the ELF file: the toolkit may come without cuobjdump.

An instruction of sm_80 and later is 16 bytes. Its low 12 bits are the opcode, bits 73 to 75 the width of an access. The
numbers are not documented; probe.cu has one of each and says when a toolkit changes them.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_NAMES = {
    "HMMA": (0x23C,),
    "LDSM": (0x83B,),
    "LDGSTS": (0xFAE,),
    "LDG": (0x981, 0x381),
    "STG": (0x986, 0x386),
    "LDS": (0x984,),
    "STS": (0x388, 0x988),
    "LDL": (0x983,),
    "STL": (0x387, 0x987),
    "LD": (0x980,),
    "ST": (0x385, 0x985),
    "BAR": (0xB1D,),
    "SHFL": (0x389, 0x589, 0x989, 0xF89),
    "RED": (0x3A6, 0x98E, 0x9A6),
    "ATOMG": (0x3A3, 0x9A3, 0x3A8, 0x9A8),
    "DFMA": (0x22B,),
    "DADD": (0x229,),
    "DMUL": (0x228,),
}
_OPCODES = {code: name for name, codes in _NAMES.items() for code in codes}
_WITH_WIDTH = {"LDG", "STG", "LDS", "STS", "LDGSTS"}
_WIDTHS = {0: 8, 1: 8, 2: 16, 3: 16, 4: 32, 5: 64, 6: 128}
_NOBITS = 8


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    names = headers[names_index][4]
    for name, kind, _, _, offset, length in headers:
        end = data.index(b"\0", names + name)
        yield data[names + name : end].decode(), b"" if kind == _NOBITS else data[offset : offset + length]


def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """For each kernel, by its mangled name: how often every opcode above occurs, alone and as in ``LDG.128``, and the
    number of all ``instructions``."""
    result = {}
    for section, code in _sections(cubin.read_bytes()):
        if not section.startswith(".text."):
            continue
        counts: Counter[str] = Counter(instructions=len(code) // 16)
        for low, high in struct.iter_unpack("<QQ", code):
            name = _OPCODES.get(low & 0xFFF)
            if name is None:
                continue
            counts[name] += 1
            if name in _WITH_WIDTH:
                counts[f"{name}.{_WIDTHS.get(high >> 9 & 7, 0)}"] += 1
        result[section.removeprefix(".text.")] = counts
    return result
