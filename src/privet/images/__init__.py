"""Image sets on disk and in memory: open, write, verify, augment, compare."""

from privet.images.augment import Augmentation, FlipCrop, ResizedCrop, augmentation_for
from privet.images.budget import Budget
from privet.images.image_set import ImageSet, SourceFile
from privet.images.open import align, open_images, pair
from privet.images.picture import Picture, PictureError
from privet.images.similarity import Similarity, by_psnr, compare, compare_all
from privet.images.source import Skip
from privet.images.write import Written, write_images

__all__ = [
    "Augmentation",
    "Budget",
    "FlipCrop",
    "ImageSet",
    "Picture",
    "PictureError",
    "ResizedCrop",
    "Similarity",
    "Skip",
    "SourceFile",
    "Written",
    "align",
    "augmentation_for",
    "by_psnr",
    "compare",
    "compare_all",
    "open_images",
    "pair",
    "write_images",
]
