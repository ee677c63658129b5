"""The image format of a file by its first bytes, whatever its suffix."""

import re

HEAD_BYTES = 32  # bytes that `image_format` needs

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    **dict.fromkeys((b"GIF87a", b"GIF89a"), "GIF"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
}
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes
_NETPBM = re.compile(rb"P[1-6][ \t\r\n]+[#\d]")
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIF"),
}


def image_format(head: bytes) -> str | None:
    """Pillow's name of the image format that `head` is the beginning of, or None.

    Two letters are not enough: a text may begin with `BM` or `P1`.
    """
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS and len(head) >= 18:
        return "BMP"
    if _NETPBM.match(head):
        return "PPM"
    if head[4:8] == b"ftyp":
        # the major brand, then the compatible ones
        brands = [head[8:12], *(head[place : place + 4] for place in range(16, len(head), 4))]
        found = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
        # AVIF files list mif1, a brand of HEIF, as compatible too
        return "AVIF" if "AVIF" in found else next(iter(found), None)
    return None
