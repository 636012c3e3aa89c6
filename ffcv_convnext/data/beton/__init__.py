"""What a .beton is. `tables` and `writer` need ffcv and are imported by name."""

from ffcv_convnext.data.beton.manifest import Manifest, SkippedFile, Split, check_header, tables_digest

__all__ = ["Manifest", "SkippedFile", "Split", "check_header", "tables_digest"]
