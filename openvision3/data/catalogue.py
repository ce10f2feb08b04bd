"""The catalogue of a folder of tars: how many samples each has, so that any position is found at once."""

import json

from openvision3.data.store import Location, Store

CATALOGUE = "_counts.idx.json"
CATALOGUE_VERSION = 1
MAX_CATALOGUE_BYTES = 1 << 30


def read_catalogue(place: Location, store: Store) -> dict[str, tuple[int, int]]:
    """Size and sample count of each tar of a folder, by the tar's name; empty where there is no catalogue."""
    content = store.read_all(place, MAX_CATALOGUE_BYTES)
    if content is None:
        return {}
    try:
        data = json.loads(content)
        if data["format_version"] != CATALOGUE_VERSION:
            return {}
        tars = {name: (size, count) for name, (size, count) in data["tars"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    whole = all(type(size) is int and type(count) is int and 0 <= count <= size for size, count in tars.values())
    return tars if whole else {}


def write_catalogue(place: Location, tars: dict[str, tuple[int, int] | None], store: Store) -> None:
    """Writes the catalogue of a folder, adding to what is there already; with None, a tar is taken out."""
    before = read_catalogue(place, store)
    after = {name: known for name, known in {**before, **tars}.items() if known}
    if after == before:
        return
    data = {"format_version": CATALOGUE_VERSION, "tars": after}
    store.write(place, (json.dumps(data, separators=(",", ":")) + "\n").encode())
