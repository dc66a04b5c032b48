"""Data sets on disk as training tasks: folders of images and masks, nnU-Net's layout, and packs."""

from icseg.data.folders.cache import read_pair
from icseg.data.folders.config import SourceConfig
from icseg.data.folders.listing import Listing, list_source
from icseg.data.folders.tasks import DataSet, FolderTask, open_data_set

__all__ = ["DataSet", "FolderTask", "Listing", "SourceConfig", "list_source", "open_data_set", "read_pair"]
