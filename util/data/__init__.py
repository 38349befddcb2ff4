"""Datasets: reading, augmentation and loading of images."""

# Policies of random operations on colour and geometry, see util.data.random_transforms.
AUTO_AUGMENT = ("off", "ra", "ta_wide", "augmix", "imagenet", "cifar10")
MIN_IMAGE_SIZE = 32  # pixels, side of the smallest image that the networks accept
MAX_IMAGE_PIXELS = 178_956_970  # per file; Pillow calls a larger image a decompression bomb
