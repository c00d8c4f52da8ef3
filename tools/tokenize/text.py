"""The documents of text files, in parts that workers read on their own."""

import gzip
import json
import os

PIECE = 1 << 20  # characters of text that are encoded at once; a piece ends with a line


class Refused(Exception):
    """What a person has to mend."""


def parts_of(files, part_bytes):
    """[file, begin, end] in bytes: ranges that begin and end with a line. A compressed file is one part."""
    parts = []
    for file in files:
        size = file.stat().st_size
        if file.suffix == ".gz":
            parts.append([str(file), 0, size])
            continue
        with open(file, "rb") as stream:
            begin = 0
            while begin < size:
                stream.seek(min(begin + part_bytes, size) - 1)
                stream.readline()
                parts.append([str(file), begin, stream.tell()])
                begin = stream.tell()
    return parts


def lines_of(part):
    """The bytes of each line."""
    file, begin, end = part
    with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as stream:
        stream.seek(begin)
        for line in stream:
            yield line
            begin += len(line)
            if begin >= end and not file.endswith(".gz"):
                return


def is_jsonl(file):
    return file.removesuffix(".gz").endswith(".jsonl")


def pieces_of(part, field, separator):
    """(text, whether a document ends with it) of a part, in pieces of about PIECE bytes."""
    if is_jsonl(part[0]):
        for number, line in enumerate(lines_of(part)):
            try:
                text = json.loads(line)[field] if line.strip() else ""
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                where = f"{part[0]}, line {number + 1} from byte {part[1]}"
                raise Refused(f'{where}: no JSON object with a text named "{field}"') from None
            if text:
                yield text, True
        return
    text = ""
    for line in lines_of(part):
        *ended, rest = line.decode(errors="replace").split(separator) if separator else [line.decode(errors="replace")]
        for end in ended:
            yield text + end, True
            text = ""
        text += rest
        if len(text) >= PIECE:
            yield text, False
            text = ""
    is_last = part[0].endswith(".gz") or part[2] >= os.path.getsize(part[0])
    if text or is_last:
        yield text, is_last
