"""Tables of events and feedback into a topic: read in chunks, mapped to records, checked as a worker would, sent."""

from stream.publishing.files import FILE_FORMATS, Chunk, RowFile
from stream.publishing.mapping import RowMapping, Times
from stream.publishing.sender import Sender

__all__ = ["FILE_FORMATS", "Chunk", "RowFile", "RowMapping", "Sender", "Times"]
