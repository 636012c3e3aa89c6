"""Images on their way to the device, in five rooms.

codec/    JPEG and pixels: decoding, compressed-domain crops, resizing (numba, libjpeg-turbo)
beton/    what a .beton is: tables, manifest, writer
convert/  any source of images -> .beton
load/     .beton -> batches on the device
check/    verify, describe and repair .beton files

Import from a room: `from ffcv_convnext.data.load import TrainLoader`.
"""
