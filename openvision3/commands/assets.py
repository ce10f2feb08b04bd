"""`ov3 assets list` and `fetch`: the weights and vocabularies that are fetched by name."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from openvision3 import assets
from openvision3.commands import common
from openvision3.config import OpenVisionError

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def assets_list(json: Path | None = None, overwrite: Flag = False) -> int:
    """Prints every asset: what it is, the size of its download, its licence, and whether it is cached.

    Args:
        json: file for the same figures, with sha256 and origin.
        overwrite: replace that file.
    """
    common.refuse_existing(json, overwrite)
    rows: list[dict[str, Any]] = []
    for asset in assets.list_assets():
        path = assets.cached_path(asset.name)
        rows.append(
            {
                "name": asset.name,
                "about": asset.about,
                "licence": asset.licence,
                "project": asset.archive.project,
                "file": asset.archive.filename,
                "bytes": asset.archive.size,
                "sha256": asset.archive.sha256,
                "cached": str(path) if path.is_file() else None,
            }
        )
    lines = []
    for row in rows:
        cached, megabytes = "yes" if row["cached"] else "no", f"{row['bytes'] / 1e6:.0f} MB"
        lines.append((row["name"], megabytes, cached, row["about"], row["licence"]))
    common.print_table(
        f"assets (cache: {assets.cache_dir()})", ("name", "download", "cached", "what", "licence"), lines
    )
    common.write_json(json, rows, overwrite)
    return 0


def assets_fetch(
    names: tyro.conf.Positional[tuple[str, ...]], json: Path | None = None, overwrite: Flag = False
) -> int:
    """Fetches assets into the cache and prints where each lies; the exit code is 1 where some could not be had.

    Args:
        names: of assets, or "all".
        json: file for the same paths.
        overwrite: replace that file.
    """
    common.refuse_existing(json, overwrite)
    known = [asset.name for asset in assets.list_assets()]
    wanted = known if names == ("all",) else list(names)
    if not wanted:
        raise OpenVisionError(f"name what to fetch: all, {', '.join(known)}")
    for name in wanted:
        assets.cached_path(name)  # a misspelt name is refused before anything is fetched
    rows: dict[str, str | None] = {}
    for name in wanted:
        try:
            rows[name] = str(assets.fetch(name))
            print(f"{name}: {rows[name]}")
        except OpenVisionError as error:
            rows[name] = None
            common.fail(f"{name}: {error}")
    common.write_json(json, rows, overwrite)
    return 1 if None in rows.values() else 0
