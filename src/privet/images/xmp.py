"""XMP, the metadata packet of photo editors: what tells a place or is no longer true is taken out of it."""

from __future__ import annotations

from collections.abc import Callable
from xml.dom import minidom

# Names without their prefix: photoshop:City, Iptc4xmpCore:Location, Iptc4xmpExt:LocationCreated and their kin.
# The address of a creator, who writes it there to be reached, has other names.
PLACES = frozenset(
    (
        "city",
        "country",
        "countrycode",
        "countryname",
        "location",
        "locationcreated",
        "locationname",
        "locationshown",
        "provincestate",
        "state",
        "sublocation",
        "worldregion",
    )
)


def is_place(name: str) -> bool:
    """Say whether a property of this name tells where an image was taken."""
    bare = name.rpartition(":")[2].casefold()
    return bare in PLACES or bare.startswith("gps")


def is_stale(name: str) -> bool:
    """Say whether a property of this name holds small copies of the old image, or tells how that is to be turned."""
    bare = name.rpartition(":")[2].casefold()
    return "thumbnail" in bare or bare == "orientation"


def without(packet: bytes, unwanted: Callable[[str], bool]) -> bytes | None:
    """Return a packet without the properties that have an unwanted name, or None if it cannot be read.

    A packet that has none of them keeps its bytes.
    """
    text = packet.strip(b" \t\r\n\0")
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:  # no editor writes them
        return None
    try:
        document = minidom.parseString(text)
        found = False
        for element in document.getElementsByTagName("*"):
            for name, _ in list(element.attributes.items()):
                if unwanted(name):
                    element.removeAttribute(name)
                    found = True
            if unwanted(element.tagName) and element.parentNode is not None:
                element.parentNode.removeChild(element)
                found = True
        if not found:
            return packet
        written: bytes = b"".join(node.toxml("utf-8") for node in document.childNodes)
    except Exception:  # whatever strangers wrote there
        return None
    return written
