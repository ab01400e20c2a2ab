"""The demo's data: grouping of tags, the answer's form, the fixed split, and the numbers of the real file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lorakit.demo.addresses import HELD_OUT, INSTRUCTION, Address, parse, prepare, split, to_json, to_row


def tagged(*words: str) -> bytes:
    """Label XML of one address, from words written ``Tag:word``."""
    tokens = " ".join("<{0}>{1}</{0}>".format(*word.split(":")) for word in words)
    return f"<AddressCollection>\n  <AddressString>{tokens}</AddressString>\n</AddressCollection>".encode()


def test_tags_become_the_fields_that_a_person_wants() -> None:
    xml = tagged(
        "Recipient:Ann",
        "Recipient:Lee,",
        "BuildingName:Old",
        "BuildingName:Mill;",
        "AddressNumber:12",
        "AddressNumberSuffix:1/2 ",
        "StreetNamePreDirectional:N.",
        "StreetName:Main",
        "StreetNamePostType:St.,",
        "OccupancyType:Apt",
        "OccupancyIdentifier:4,",
        "SubaddressType:floor",
        "SubaddressIdentifier:2,",
        "USPSBoxType:PO",
        "USPSBoxType:Box",
        "USPSBoxID:9",
        "PlaceName:St.",
        "PlaceName:Paul,",
        "StateName:MN",
        "ZipCode:55101",
        "ZipPlus4:1234",
        "CountryName:USA",
    )
    [address] = parse(xml)
    assert address.text == (
        "Ann Lee, Old Mill; 12 1/2 N. Main St., Apt 4, floor 2, PO Box 9 St. Paul, MN 55101 1234 USA"
    )
    assert to_json(address.fields) == (
        '{"recipient":"Ann Lee","building":"Old Mill","number":"12 1/2","street":"N. Main St.",'
        '"unit":"Apt 4, floor 2","po_box":"PO Box 9","city":"St. Paul","state":"MN","zip":"55101 1234",'
        '"country":"USA"}'
    )


def test_fields_keep_the_order_of_the_address() -> None:
    [address] = parse(tagged("USPSBoxType:box", "USPSBoxID:7", "LandmarkName:Pier", "AddressNumber:1"))
    assert list(address.fields) == ["po_box", "building", "number"]


def test_a_field_of_nothing_but_punctuation_is_no_field() -> None:
    [address] = parse(tagged("AddressNumber:1", "OccupancyIdentifier:,", "StreetName:Élan"))
    assert to_json(address.fields) == '{"number":"1","street":"Élan"}'


@pytest.mark.parametrize("tag", ["CornerOf", "IntersectionSeparator", "NotAddress", "SomethingNew"])
def test_rows_with_other_tags_are_left_out(tag: str) -> None:
    assert parse(tagged("StreetName:First", f"{tag}:and", "StreetName:Second")) == []


def test_a_row_is_a_chat() -> None:
    assert to_row(Address("1 Elm", {"number": "1", "street": "Elm"})) == {
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": "1 Elm"},
            {"role": "assistant", "content": '{"number":"1","street":"Elm"}'},
        ]
    }


def test_the_split_is_fixed_and_keeps_spellings_together() -> None:
    addresses = [Address(f"{number} Elm St.", {"number": str(number)}) for number in range(30)]
    addresses += [Address(f"{number} ELM ST", {"number": str(number)}) for number in range(30)]
    train, test = split(addresses, 11)
    assert (len(train), len(test)) == (50, 10)
    assert {row.fields["number"] for row in train}.isdisjoint(row.fields["number"] for row in test)
    assert all(count == 2 for count in Counter(row.fields["number"] for row in test).values())
    assert set(map(str, split(addresses[::-1], 11)[1])) == set(map(str, test))


@pytest.mark.real_model
def test_the_real_file(tmp_path: Path) -> None:
    paths = prepare(tmp_path)
    assert [path.name for path in paths] == ["train.jsonl", "test.jsonl"]
    before = [path.read_bytes() for path in paths]
    train, test = ([json.loads(line)["messages"] for line in text.decode().splitlines()] for text in before)
    assert (len(train), len(test)) == (1280, HELD_OUT)
    assert {row[1]["content"] for row in train}.isdisjoint(row[1]["content"] for row in test)
    assert [row[1]["content"] for row in test[:2]] == [
        "350 W. 22nd St., Lombard, IL 60148",
        "819 Gaffield Place, Evanston, 60201",
    ]
    fields = Counter(name for row in train + test for name in json.loads(row[2]["content"]))
    assert fields == {
        "number": 1266,
        "street": 1285,
        "unit": 494,
        "po_box": 159,
        "recipient": 81,
        "building": 80,
        "city": 1006,
        "state": 921,
        "zip": 947,
        "country": 22,
    }
    prepare(tmp_path)
    assert [path.read_bytes() for path in paths] == before
