"""The demo's task: US addresses as people write them, turned into JSON.

The data are the training labels of ``usaddress`` 0.5.16 (MIT): 1,513 addresses whose words are tagged by
hand. The library's fine tags are grouped into the fields that a person wants. The 33 rows with a tag that
belongs to none of them (street corners, words that are no address) are left out, and 1,480 remain.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lorakit.files import cache_folder, write_text
from lorakit.models.pypi import fetch

INSTRUCTION = "Turn the US address into JSON."
HELD_OUT = 200

FIELD_OF_TAG = {
    "AddressNumberPrefix": "number",
    "AddressNumber": "number",
    "AddressNumberSuffix": "number",
    "StreetNamePreModifier": "street",
    "StreetNamePreDirectional": "street",
    "StreetNamePreType": "street",
    "StreetName": "street",
    "StreetNamePostType": "street",
    "StreetNamePostDirectional": "street",
    "StreetNamePostModifier": "street",
    "OccupancyType": "unit",
    "OccupancyIdentifier": "unit",
    "SubaddressType": "unit",
    "SubaddressIdentifier": "unit",
    "USPSBoxType": "po_box",
    "USPSBoxID": "po_box",
    "USPSBoxGroupType": "po_box",
    "USPSBoxGroupID": "po_box",
    "Recipient": "recipient",
    "BuildingName": "building",
    "LandmarkName": "building",
    "PlaceName": "city",
    "StateName": "state",
    "ZipCode": "zip",
    "ZipPlus4": "zip",
    "CountryName": "country",
}


class Address(NamedTuple):
    """An address as it was written, and its fields in order of first appearance."""

    text: str
    fields: dict[str, str]


def prepare(folder: Path) -> tuple[Path, Path]:
    """Write ``train.jsonl`` (1,280 rows) and ``test.jsonl`` (200 rows) in ``messages`` form.

    Returns:
        The two paths.
    """
    train, test = split(parse(_labelled_xml()))
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, rows in zip(paths, (train, test), strict=True):
        write_text(path, "".join(json.dumps(to_row(row), ensure_ascii=False) + "\n" for row in rows))
    return paths


def parse(xml: bytes) -> list[Address]:
    """The addresses of a label file whose tags all belong to a field."""
    addresses = []
    for element in ET.fromstring(xml):
        words = [(token.tag, (token.text or "").strip()) for token in element]
        if all(tag in FIELD_OF_TAG for tag, _ in words):
            addresses.append(Address(" ".join(word for _, word in words), _fields(words)))
    return addresses


def _fields(words: Sequence[tuple[str, str]]) -> dict[str, str]:
    parts: dict[str, list[str]] = {}
    for tag, word in words:
        parts.setdefault(FIELD_OF_TAG[tag], []).append(word)
    values = {name: " ".join(words).rstrip(",; ") for name, words in parts.items()}
    return {name: value for name, value in values.items() if value}


def split(addresses: Sequence[Address], held_out: int = HELD_OUT) -> tuple[list[Address], list[Address]]:
    """Training and held-out rows: a fixed shuffle that keeps spellings of one address together."""
    train: list[Address] = []
    test: list[Address] = []
    for _, same in groupby(sorted(addresses, key=_shuffle_key), key=_shuffle_key):
        rows = list(same)
        (test if len(test) + len(rows) <= held_out else train).extend(rows)
    return train, test


def _shuffle_key(address: Address) -> str:
    letters = "".join(char for char in address.text.casefold() if char.isalnum())
    return hashlib.sha256(letters.encode()).hexdigest()


def to_row(address: Address) -> dict[str, list[dict[str, str]]]:
    """One training row: the instruction, the address, and the JSON to answer with."""
    return {
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": address.text},
            {"role": "assistant", "content": to_json(address.fields)},
        ]
    }


def to_json(fields: dict[str, str]) -> str:
    """The answer's form: without blanks, which would cost a fifth more tokens."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def _labelled_xml() -> bytes:
    archive = fetch(
        "usaddress==0.5.16",
        "usaddress-0.5.16.tar.gz",
        "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
        folder=cache_folder() / "downloads",
        source_only=True,
    )
    with tarfile.open(archive) as tar:
        member = tar.extractfile("usaddress-0.5.16/training/labeled.xml")
        assert member is not None  # the archive's sha256 was checked
        return member.read()
