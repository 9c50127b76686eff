"""Data of a federation: sources, partitions, proxy sets, batches.

Nothing here imports torchvision, Hugging Face datasets or flwr-datasets before one of them is needed.
"""

from fedkd.data.batches import ArrayData, Batch, augment_images, epoch_order, step_order
from fedkd.data.cache import cache_folder
from fedkd.data.federation import Federation, assign_architectures, build_federation
from fedkd.data.partition import Partition
from fedkd.data.proxy import ProxySet
from fedkd.data.shards import Split, local_split
from fedkd.data.skew import Skew, label_counts, skew
from fedkd.data.sources import Dataset, load, load_source

__all__ = [
    "ArrayData",
    "Batch",
    "Dataset",
    "Federation",
    "Partition",
    "ProxySet",
    "Skew",
    "Split",
    "assign_architectures",
    "augment_images",
    "build_federation",
    "cache_folder",
    "epoch_order",
    "label_counts",
    "load",
    "load_source",
    "local_split",
    "skew",
    "step_order",
]
