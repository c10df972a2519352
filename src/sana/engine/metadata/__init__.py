"""What a picture file says about itself, written into PNG text chunks and read back without torch.

Written: the label that the picture was generated (IPTC digital source type, in XMP), our own JSON with the exact
request, and the text line that AUTOMATIC1111 made common and viewers show. Read: these, and what other programs write.
"""

from sana.engine.metadata.dialects import DIALECTS
from sana.engine.metadata.reading import Metadata, read_metadata
from sana.engine.metadata.record import (
    COMPOSITE_TYPE,
    LEVELS,
    RECORD_KEY,
    RECORD_VERSION,
    SOURCE_TYPE,
    XMP_PACKET,
    Level,
    parameters_of,
    png_info,
    record_of,
)
from sana.engine.metadata.settings import Settings, nearest_sampler, shortened

__all__ = [
    "COMPOSITE_TYPE",
    "DIALECTS",
    "LEVELS",
    "RECORD_KEY",
    "RECORD_VERSION",
    "SOURCE_TYPE",
    "XMP_PACKET",
    "Level",
    "Metadata",
    "Settings",
    "nearest_sampler",
    "parameters_of",
    "png_info",
    "read_metadata",
    "record_of",
    "shortened",
]
