"""Safetensors files that are the same bytes for the same content."""

import json


def canonical(content: bytes) -> tuple[bytes, memoryview]:
    """A file's ``content`` as (header, tensors), with its metadata in the order of their names.

    safetensors' own writer puts metadata into another order in every process.

    >>> text = b'{"__metadata__":{"b":"2","a":"1"}}'
    >>> canonical(len(text).to_bytes(8, "little") + text)[0][8:]
    b'{"__metadata__":{"a":"1","b":"2"}}      '
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors stay aligned
    return len(text).to_bytes(8, "little") + text, memoryview(content)[end:]
