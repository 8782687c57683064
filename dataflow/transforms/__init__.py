"""What happens to samples between storage and batch: images, sound, video, tokens, any callable, wherever it runs."""

from dataflow.transforms.callables import OnField
from dataflow.transforms.columns import ColumnTransform, over_columns
from dataflow.transforms.cropped import ArrayCrop, CroppedDataset
from dataflow.transforms.crops import CenterCrop, Crop, RandomResizedCrop, Region, WholeImage
from dataflow.transforms.draws import Draws
from dataflow.transforms.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from dataflow.transforms.media import DecodeAudio, DecodeVideo
from dataflow.transforms.ragged import Padded, Ragged
from dataflow.transforms.tokens import Cast, TokenWindow
from dataflow.transforms.transformed import TransformedDataset

__all__ = [
    "ArrayCrop",
    "Cast",
    "CenterCrop",
    "ColumnTransform",
    "Crop",
    "CroppedDataset",
    "DecodeAudio",
    "DecodeVideo",
    "Draws",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageTransform",
    "OnField",
    "Padded",
    "Ragged",
    "RandomResizedCrop",
    "Region",
    "TokenWindow",
    "TransformedDataset",
    "WholeImage",
    "over_columns",
]
