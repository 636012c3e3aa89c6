"""JPEG and pixels: decoding, compressed-domain crops, resizing. Enter through its files."""
