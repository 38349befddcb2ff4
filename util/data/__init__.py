"""Datasets: reading, augmentation and loading of images."""

MIN_IMAGE_SIZE = 32  # pixels, side of the smallest image that the networks accept
