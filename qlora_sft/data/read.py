"""Former place of `Conversation`, `Source` and `read_sources`; to be removed once nothing imports them from here."""

from qlora_sft.data.formats import Conversation as Conversation
from qlora_sft.data.sources import Source as Source
from qlora_sft.data.sources import read_sources as read_sources
